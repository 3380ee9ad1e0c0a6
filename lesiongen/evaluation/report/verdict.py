"""The verdict: applies the rules to metrics.json, and says whether samples may be used and shared.

Marks are "good", "fair", "poor", and "none" where something was not measured. A mark is "good" or "poor" only if the whole 95 %
interval is on that side of the limit, so a value that may be noise gets neither.
"""

from contextlib import suppress
from functools import partial
from typing import Any

from lesiongen.evaluation.report import words
from lesiongen.evaluation.report.readings import NotMeasured, Reading, distance_of, main_ruler
from lesiongen.evaluation.report.rule import Rule
from lesiongen.evaluation.report.rules import RULES

ORDER = ("poor", "fair", "none", "good")  # from the worst mark to the best
SHOWN = 5  # reasons that the terminal shows
Finding = dict[str, str]  # rule, topic, mark, sentence


def verdict(metrics: dict) -> dict[str, Any]:
    """Judges a run by its metrics.

    Args:
        metrics: The content of metrics.json, schema 2. Parts may be missing.

    Returns:
        {"overall": "use", "caution" or "do not share", "findings": [{"rule", "topic", "mark", "sentence"}, …]}.
    """
    findings: list[Finding] = []
    for rule in RULES:
        if rule.name == "rulers":
            findings += _disagreement(metrics, rule)
        elif rule.needs and not _passed(rule.needs, findings):
            findings.append(
                _finding(rule, "none", f"{rule.title}: not judged, because it means little unless samples show it.")
            )
        else:
            findings += _apply(rule, metrics)
    return {"overall": _overall(findings), "findings": findings}


def reasons(findings: list[Finding]) -> list[Finding]:
    """Returns the findings that keep the verdict from being "use"."""
    return [f for f in findings if _stops(f) or _warns(f)]


def in_lines(found: dict[str, Any]) -> str:
    """Returns a verdict and its gravest reasons as lines for the terminal. `found` is what verdict() returns."""
    gravest = sorted(reasons(found["findings"]), key=lambda finding: ORDER.index(finding["mark"]))
    lines = [f"verdict: {found['overall']}", *(f"- {finding['sentence']}" for finding in gravest[:SHOWN])]
    if len(gravest) > SHOWN:
        lines.append(f"- and {len(gravest) - SHOWN} more reasons, see the report")
    return "\n  ".join(lines)


def in_markdown(found: dict[str, Any]) -> str:
    """Returns a verdict and its reasons as Markdown, for the note on a run in MLflow."""
    lines = [f"**Verdict: {found['overall']}**", "", *(f"- {finding['sentence']}" for finding in reasons(found["findings"]))]
    return "\n".join(lines) + "\n"


def headline(metrics: dict) -> dict[str, float]:
    """Returns the few figures by which runs are compared, as far as they were measured. `metrics` as for verdict()."""
    likeness = metrics.get("likeness") or {}
    ruler = main_ruler(likeness) if likeness.get("rulers") else ""
    places = {
        **{name: ("likeness", "rulers", ruler, "all", "both", name) for name in ("kid", "precision", "recall", "coverage")},
        "kid_reconstructions": ("likeness", "rulers", ruler, "all", "tokenizer", "kid"),
        "recognised": ("classifier", "balanced_accuracy", "samples"),
        "trained_on_samples": ("utility", "arms", "synthetic", "all", "balanced_accuracy"),
    }
    found = {}
    for name, place in places.items():
        figure: Any = metrics
        for key in place:
            figure = (figure or {}).get(key)
        if figure and figure.get("value") is not None:
            found[name] = float(figure["value"])
    return found


def _overall(findings: list[Finding]) -> str:
    if any(map(_stops, findings)):
        return "do not share"
    return "caution" if any(map(_warns, findings)) else "use"


def _stops(finding: Finding) -> bool:
    return finding["topic"] == "privacy" and finding["mark"] == "poor"


def _warns(finding: Finding) -> bool:
    unsure = finding["topic"] == "privacy" and finding["mark"] in ("fair", "none")
    return finding["mark"] == "poor" or unsure or finding["rule"] == "drawings"


def _passed(name: str, findings: list[Finding]) -> bool:
    return any(f["rule"] == name and f["mark"] in ("good", "fair") for f in findings)


def _apply(rule: Rule, metrics: dict) -> list[Finding]:
    """Returns the findings of one rule."""
    try:
        readings = rule.read(metrics)
    except NotMeasured as reason:
        return [_finding(rule, "none", f"{rule.title}: not measured. {_as_sentence(str(reason))}")]
    marks = [rule.mark(reading) for reading in readings]
    if rule.several == "each" or not readings:
        return [_judged(rule, m, r, r.what) for m, r in zip(marks, readings, strict=True)]
    overall = _most(marks) if rule.several == "half" else min(marks, key=ORDER.index)
    hits = [r for m, r in zip(marks, readings, strict=True) if m == overall] or readings
    return [_judged(rule, overall, max(hits, key=partial(_badness, rule)), words.joined([r.what for r in hits]))]


def _badness(rule: Rule, reading: Reading) -> tuple[bool, float]:
    """Returns a key by which the worst of several readings is the largest."""
    return bool(reading.alarm), -reading.value if rule.limits and rule.limits.worse == "below" else reading.value


def _most(marks: list[str]) -> str:
    """Returns "good" or "poor" if at least half of the marks are so and none says the opposite, or else "fair"."""
    for found, opposite in (("good", "poor"), ("poor", "good")):
        if 2 * marks.count(found) >= len(marks) and opposite not in marks:
            return found
    return "fair"


def _disagreement(metrics: dict, rule: Rule) -> list[Finding]:
    """Returns a finding if two rulers give the distance to real images different marks."""
    distance, marks = next(r for r in RULES if r.name == "distance"), {}
    for name in (metrics.get("likeness") or {}).get("rulers") or {}:
        with suppress(NotMeasured):
            marks[name] = distance.mark(distance_of(metrics, name))
    if not marks:
        return []  # the rule "distance" gives the reason
    if len(marks) < 2:
        return [_finding(rule, "none", f"{rule.title}: not measured. There is only one ruler.")]
    if len(set(marks.values())) < 2:
        return []
    what = ", ".join(f"{m} by {name}" for name, m in marks.items())
    return [_judged(rule, "fair", Reading(0, None, None, what), what)]


def _judged(rule: Rule, found: str, reading: Reading, hits: str) -> Finding:
    """Returns a finding in words. A comparison without an interval says so."""
    show = {"percent": words.percent, "points": words.points, "number": words.number, "count": "{:.0f}".format}[rule.shows]
    low, high = ("unknown" if bound is None else show(bound) for bound in (reading.low, reading.high))
    fields = {
        "value": show(reading.value),
        "low": words.without_unit(low, high),
        "high": high,
        "what": reading.what,
        "hits": hits,
    } | reading.facts
    conclusion = reading.alarm or rule.says.get(found, "").format(**fields)
    return _finding(rule, found, f"{rule.sentence.format(**fields)} {conclusion}".strip())


def _finding(rule: Rule, found: str, sentence: str) -> Finding:
    return {"rule": rule.name, "topic": rule.topic, "mark": found, "sentence": sentence}


def _as_sentence(text: str) -> str:
    """Returns text with a capital at its beginning and a full stop at its end."""
    return text[:1].upper() + text[1:].rstrip(".") + "." if text else ""
