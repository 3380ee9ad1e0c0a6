"""docs/reliability.md names 28 faults, and every test that it names exists."""

import re

from tests.reliability import ROOT, page, rows


def test_the_page_names_tests_that_exist():
    assert list(rows()) == [f"F{number}" for number in range(1, 29)]
    named = set(re.findall(r"`(test_\w+)`", page()))
    defined = {name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert not named - defined
    assert all(tests for _, tests in rows().values())
    assert "Open:" not in page()
