"""docs/reliability.md names 28 faults, and every test that it names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_names_tests_that_exist():
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| F(\d+) \|(.*)\|$", page, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 29))
    named = set(re.findall(r"`(test_\w+)`", page))
    defined = {name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert not named - defined
    for number, row in rows:
        assert "`test_" in row or "Open" in row, f"F{number} has neither a test nor a word on what is open"
