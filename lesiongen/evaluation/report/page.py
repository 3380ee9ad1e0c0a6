"""The HTML page of an evaluation, for clinicians and reviewers: the verdict first, then what it rests on.

The page is one file that opens from disk: pictures are embedded, and nothing is loaded from elsewhere. All numbers come from
metrics.json, so that the two agree. The evaluate stage writes the page.
"""

from collections.abc import Sequence

from lesiongen.evaluation.report import markup, words
from lesiongen.evaluation.report.data import data, fairness, summary
from lesiongen.evaluation.report.likeness import likeness
from lesiongen.evaluation.report.made import made
from lesiongen.evaluation.report.markup import Html, element, escape, join
from lesiongen.evaluation.report.models import models
from lesiongen.evaluation.report.privacy import NearestPair, gate, privacy
from lesiongen.evaluation.report.samples import Strips, samples
from lesiongen.evaluation.report.style import STYLE
from lesiongen.evaluation.report.utility import utility
from lesiongen.evaluation.report.verdict import reasons, verdict

__all__ = ["NearestPair", "Strips", "page"]

OVERALL = {  # overall → sign's mark, title, what it means
    "use": ("good", "Use", "No rule speaks against using and sharing the samples within the licence of the data."),
    "caution": ("fair", "Use with caution", "Read the reasons before you use the samples, and before you share them."),
    "do not share": ("poor", "Do not share", "Samples or generator may give away training images. Keep both inside."),
}
TOPICS = {
    "likeness": "Is it like the real thing?",
    "use": "Does it help?",
    "privacy": "Does it leak?",
    "model": "The models",
    "data": "The data",
}


def page(
    name: str, metrics: dict, pictures: dict[str, bytes], strips: Strips, pairs: Sequence[NearestPair] = (), share: bool = False
) -> str:
    """Builds the page.

    Args:
        name: Name of the run.
        metrics: The content of metrics.json, schema 2. Any part may be missing.
        pictures: PNG bytes by name: "curves", "reconstructions", and "distances <kind>" for each kind of copy (see
            `charts.histogram`). Others are ignored.
        strips: For each class a strip of samples and one of training images, uint8 [C, H, W], or None.
        pairs: The nearest pairs of samples and training images, nearest first.
        share: Whether the page is for others: real images, and pictures that show them, are left out.

    Returns:
        The HTML.
    """
    sections = [
        _verdict(metrics),
        samples(strips, share),
        likeness(metrics),
        utility(metrics.get("utility")),
        privacy(metrics.get("privacy"), pictures, pairs, share),
        gate(metrics.get("gate")),
        fairness(metrics.get("fairness")),
        models(metrics, pictures, share),
        data(metrics.get("data")),
        made(metrics.get("made"), metrics.get("data"), share),
    ]
    body = join(
        [
            element("a", "Skip to the verdict", href="#verdict", class_="skip"),
            _header(name, metrics, share),
            element("main", join(filter(None, sections)), id="content"),
            element("footer", markup.paragraph("For research only, not for diagnosis. docs/report.md explains every figure.")),
        ]
    )
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<meta name="color-scheme" content="light dark"><title>{escape(name)}: report</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _header(name: str, metrics: dict, share: bool) -> Html:
    """Returns the title and the lines about the data."""
    date = str((metrics.get("made") or {}).get("date") or "")[:10]
    facts = [*([date] if date else []), *summary(metrics.get("data"))]
    facts.append(
        "This copy shows no real image."
        if share
        else "This page shows real training images: share it only as the licence allows, or make a copy without them (--share)."
    )
    title = element("h1", join([name, element("span", "synthetic images", class_="tag")], " "))
    lines = join([element("li", fact) for fact in facts])
    return element("header", join([title, element("ul", lines, class_="facts")]))


def _verdict(metrics: dict) -> Html:
    """Returns the verdict, its reasons, and all findings by topic."""
    found = metrics.get("verdict") or verdict(metrics)
    mark, title, meaning = OVERALL[found["overall"]]
    character = element("span", markup.SIGNS[mark][0], aria_hidden="true", class_="big")
    overall = element("p", join([character, element("strong", title)], " "), class_=f"overall {mark}")
    against = reasons(found["findings"])
    parts = [overall, markup.paragraph(meaning), _intervals()]
    if against:
        parts += [markup.heading("Reasons"), _list(against)]
    rest = [finding for finding in found["findings"] if finding not in against]
    for topic, question in TOPICS.items():
        if about := [finding for finding in rest if finding["topic"] == topic]:
            parts += [markup.heading(question), _list(about)]
    return markup.section("verdict", "Verdict", *parts)


def _intervals() -> Html:
    """Returns the sentences without which the findings cannot be read."""
    interval = join([markup.dfn("95 % interval"), words.TERMS["95 % interval"]], ": ")
    works = (
        "How samples are made: a tokenizer turns images into codes and back, and priors invent codes for a diagnosis. "
        "Held-out images were never trained on."
    )
    return markup.paragraph(join([works, interval], " "), "note")


def _list(findings: list[dict]) -> Html:
    """Returns findings as a list of signs, words and sentences."""
    items = [element("li", join([markup.sign(f["mark"]), element("span", f["sentence"])], " ")) for f in findings]
    return element("ul", join(items), class_="findings")
