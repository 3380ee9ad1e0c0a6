"""What a rule of the verdict is, how its limits mark a reading, and how the rules are printed for the documentation."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lesiongen.evaluation.report.readings import Reading


@dataclass(frozen=True)
class Limits:
    """Limits of a rule.

    Attributes:
        worse: "above" or "below": the side on which a value is worse.
        good: A reading is "good" if its whole interval is on the better side of this, or at it.
        poor: A reading is "poor" if its whole interval is on the worse side of this. None: never.
        floor: A reading whose whole interval is on the worse side of this is not "good".
        passing: Whether a good reading must be beyond `good`, not at it.
    """

    worse: str
    good: float
    poor: float | None = None
    floor: float | None = None
    passing: bool = False

    def mark(self, reading: Reading) -> str:
        """Marks a reading. Without an interval it is never "good", and it is "poor" if its value is beyond the limit."""
        sign = 1 if self.worse == "above" else -1  # of numbers that are larger where things are worse
        bounds = [sign * bound for bound in (reading.low, reading.high) if bound is not None]
        best, worst = (min(bounds), max(bounds)) if len(bounds) == 2 else (sign * reading.value, math.inf)
        if self.poor is not None and best > sign * self.poor:
            return "poor"
        if self.floor is not None and best > sign * self.floor:
            return "fair"
        good = worst < sign * self.good if self.passing else worst <= sign * self.good
        return "good" if good else "fair"

    def in_words(self) -> tuple[str, str]:
        """Returns what makes a reading good, and what makes it poor."""
        above = self.worse == "above"
        sign = ("<" if self.passing else "≤") if above else (">" if self.passing else "≥")
        good = f"{'upper' if above else 'lower'} bound {sign} {self.good:g}"
        good += (
            f" and the interval includes or is {'below' if above else 'above'} {self.floor:g}" if self.floor is not None else ""
        )
        poor = "–" if self.poor is None else f"{'lower' if above else 'upper'} bound {'>' if above else '<'} {self.poor:g}"
        return good, poor


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        name: Its name in metrics.json.
        title: What it is about, in words.
        topic: "likeness", "use", "privacy", "model" or "data".
        reads: What it reads, in words, for the documentation.
        read: Reads it from all metrics. Raises NotMeasured.
        why: The reason of the limits.
        sentence: What was measured. Fields: value, low, high, what, the reading's facts, and hits (what has the rule's mark).
        says: Mark → the conclusion, with the same fields.
        limits: None: each reading has its own mark.
        several: Of several readings, "each" is a finding, or the "worst" is one, or one finding takes the mark of "half".
        needs: Name of a rule that must be good or fair; otherwise this one says nothing.
        shows: How value, low and high are written: "percent", "points", "number" or "count".
    """

    name: str
    title: str
    topic: str
    reads: str
    read: Callable[[dict], list[Reading]]
    why: str
    sentence: str
    says: dict[str, str]
    limits: Limits | None = None
    several: str = "each"
    needs: str = ""
    shows: str = "percent"

    def mark(self, reading: Reading) -> str:
        """Marks a reading: an alarm is "poor", then its own mark counts, then the limits."""
        if reading.alarm:
            return "poor"
        return reading.mark or (self.limits.mark(reading) if self.limits else "none")


def as_markdown(rules: Iterable[Rule]) -> str:
    """Returns a table of rules for the documentation."""
    lines = ["| rule | topic | reads | good | poor | why |", "|---|---|---|---|---|---|"]
    for rule in rules:
        good, poor = rule.limits.in_words() if rule.limits else ("–", "–")
        lines.append(f"| {rule.name} | {rule.topic} | {rule.reads} | {good} | {poor} | {rule.why} |")
    return "\n".join(lines) + "\n"
