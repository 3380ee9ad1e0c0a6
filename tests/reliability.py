"""Reads the table of faults in docs/reliability.md, and prints it with the outcomes of the tests that ran."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def page() -> str:
    """Returns the text of the page."""
    return (ROOT / "docs" / "reliability.md").read_text()


def rows() -> dict[str, tuple[str, list[str]]]:
    """Returns {"F1": (the fault, the names of its tests), …}."""
    found = re.findall(r"^\| (F\d+) \| (.*?) \|(.*)\|$", page(), re.MULTILINE)
    return {number: (fault, re.findall(r"`(test_\w+)`", row)) for number, fault, row in found}


def summary(outcomes: dict[str, set[str]]) -> list[str]:
    """Returns a line for each fault, with the outcome of each of its tests.

    Args:
        outcomes: For the name of each test that ran, the outcomes of its cases, such as {"passed"}.
    """
    lines = []
    for number, (fault, tests) in rows().items():
        ran = [(name, outcomes[name]) for name in tests if name in outcomes]
        worst = next((word for word in ("failed", "error", "skipped") if any(word in seen for _, seen in ran)), "passed")
        elsewhere = len(tests) - len(ran)
        counts = f"{len(ran)} of {len(tests)} tests" if elsewhere else f"{len(tests)} tests"
        lines.append(f"{number:4}{worst if ran else 'not run':9}{counts:16}{fault}")
    return lines
