"""The section "Does it leak?": copies, the nearest pairs, membership, extraction, and the gate.

No id of a training image is shown in any copy of the report, and no real image in a shared one.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from lesiongen.data import images
from lesiongen.evaluation.report import charts, markup, words
from lesiongen.evaluation.report.markup import Html, element, figure_cell, join
from lesiongen.evaluation.report.readings import why_missing

TITLE = "Does it leak?"


class NearestPair(NamedTuple):
    """A sample and its nearest training image, turned to match.

    Attributes:
        sample_CHW, real_CHW: The images, uint8.
        distances: Their closeness by kind ("pixels", "features", "codes <level>").
    """

    sample_CHW: torch.Tensor
    real_CHW: torch.Tensor
    distances: dict[str, float]


def privacy(found: dict | None, pictures: dict[str, bytes], pairs: Sequence[NearestPair], share: bool) -> Html:
    """Returns the section.

    Args:
        found: metrics["privacy"].
        pictures: PNG bytes; "distances <kind>" is the histogram of a kind of copy.
        pairs: The pairs that are nearest to each other, nearest first.
        share: Whether to leave out real images.
    """
    if reason := why_missing(found):
        return markup.section("privacy", TITLE, markup.not_measured(reason))
    parts = [*_copies(found.get("copies"), pictures), *_pairs(found.get("copies") or {}, pairs, share)]
    parts += [*_membership(found.get("membership")), *_extraction(found.get("extraction"))]
    return markup.section("privacy", TITLE, *parts)


def _copies(found: dict | None, pictures: dict[str, bytes]) -> list[Html]:
    title = markup.heading("Copies of training images")
    if reason := why_missing(found):
        return [title, markup.not_measured(reason)]
    note = (
        f"Every sample is compared with {found['views']:,} views of the training images, as the priors were trained on them "
        f"({found['draws']} of each image, cut and turned in different ways). Its distance to the nearest "
        "view is divided by its distance to the nearest of some images that were never trained on, because typical images are "
        f"near to all images. {found['held_out']:,} other held-out images are compared in the same way; the 1 % of them that "
        "are closest set the limit of each kind."
    )
    rows = []
    for kind, about in found["kinds"].items():
        counted = f"{about['copies']:,} of {about['number']:,}"
        cells = [figure_cell(about.get("rate"), words.percent), counted, figure_cell(about.get("held_out_rate"), words.percent)]
        cells += [_number(about.get(key)) for key in ("threshold", "median", "held_out_median", "least", "held_out_least")]
        rows.append([words.kind_name(kind).capitalize(), *cells])
    if any_kind := found.get("any"):
        cells = [figure_cell(any_kind.get("rate"), words.percent), f"{any_kind['copies']:,} of {any_kind['number']:,}"]
        rows.append(["Any kind", *cells, figure_cell(any_kind.get("held_out_rate"), words.percent), *["–"] * 5])
    head = ["Compared in", "Rate", "Copies", "Rate, held-out"]
    head += ["Limit", "Median", "Median, held-out", "Smallest", "Smallest, held-out"]
    parts = [title, markup.paragraph(note), markup.terms("Copy")]
    parts += [markup.table("Copies, and how close samples are to training images", head, rows)]
    drawn = {kind: pictures.get(f"distances {kind}") for kind in found["kinds"]}
    charts_of = [
        markup.chart(png, charts.histogram_in_words(found["kinds"][kind]), f"Closeness in {words.kind_name(kind)}.")
        for kind, png in drawn.items()
        if png
    ]
    if charts_of:
        wanted = "Samples should be no closer to the training images than held-out images are."
        parts += [markup.paragraph(wanted), markup.side_by_side(charts_of)]
    return parts


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def _pairs(copies: dict, pairs: Sequence[NearestPair], share: bool) -> list[Html]:
    """Returns the samples that are nearest to the training data, each above its nearest training image."""
    title = markup.heading("The nearest pairs")
    if share:
        return [title, markup.paragraph("The pairs show real images. They are in the private copy of this report.")]
    if not pairs:
        return [title, markup.not_measured("No pairs were drawn")]
    kinds = copies.get("kinds") or {}
    figures = []
    for place, pair in enumerate(pairs, 1):
        lines = [f"{words.kind_name(kind)}: {distance:.3g}" for kind, distance in pair.distances.items()]
        near = [kind for kind, distance in pair.distances.items() if kind in kinds and distance < kinds[kind]["threshold"]]
        parts = [
            markup.image(images.encode_png(pair.sample_CHW), f"Sample of pair {place}"),
            markup.image(images.encode_png(pair.real_CHW), f"Training image of pair {place}"),
        ]
        verdict = [element("b", f"✗ counts as a copy in {words.joined(list(map(words.kind_name, near)))}")] if near else []
        caption = element("figcaption", join([f"Pair {place}", *lines, *verdict], Html("<br>")))
        figures.append(element("figure", join([*parts, caption]), class_="pair"))
    note = "The samples that are nearest to the training data (left), each beside its nearest training image (right), "
    note += "turned to match. "
    note += "Look at the first pair first: is it the same lesion?"
    return [title, markup.paragraph(note), element("div", join(figures), class_="pairs")]


def _membership(found: dict | None) -> list[Html]:
    title = markup.heading("Can one tell who was in the training data?")
    if reason := why_missing(found):
        return [title, markup.not_measured(reason)]
    note = (
        f"An attacker who has the priors scores {found['members']:,} training images and {found['non_members']:,} images "
        f"that no model saw. {found['how'].rstrip('.')}."
    )
    scores = (
        "Likelihood: how probable a prior finds the codes of an image, by level. Contrast: the same, minus what it is without "
    )
    scores += "the diagnosis. Reference: the same, minus that of a simpler model."
    rows = [
        [score.capitalize(), figure_cell(about.get("auc")), figure_cell(about.get("tpr_at_1_fpr"), words.percent)]
        for score, about in found["scores"].items()
    ]
    table = markup.table("Attack by each score", ["Score", "AUC", "TPR at 1 % FPR"], rows)
    return [title, markup.paragraph(note), markup.paragraph(scores), markup.terms("AUC", "TPR at 1 % FPR"), table]


def _extraction(found: dict | None) -> list[Html]:
    title = markup.heading("Can training images be drawn out of the prior?")
    if reason := why_missing(found):
        return [title, markup.not_measured(reason)]
    note = (
        f"The prior of level {found['level']} gets the first {found['prompt']:,} codes of an image and completes "
        f"{found['completed']:,} more, the likeliest each time. It must not complete training images better than images it "
        "never saw."
    )
    accuracy, exact = found["accuracy"], found.get("exact") or {}
    counted = [f"{exact.get(key, 0):,} of {found[key]:,}" for key in ("members", "non_members")]
    rows = [
        ["Codes completed right", *(figure_cell(accuracy.get(key), words.percent) for key in ("members", "non_members"))],
        ["Images completed exactly", *counted],
    ]
    gain, auc = (words.interval(found.get(key), show) for key, show in (("gain", words.points), ("auc", words.number)))
    sentence = f"Difference: {gain[0]} (95 % interval {gain[1] or 'unknown'}). "
    sentence += f"Training images told from unseen ones by this: AUC {auc[0]} (95 % interval {auc[1] or 'unknown'})."
    table = markup.table("Completion of images", ["Figure", "Training images", "Unseen images"], rows)
    return [title, markup.paragraph(note), table, markup.paragraph(sentence)]


def gate(found: dict | None) -> Html | None:
    """Returns the section of metrics["gate"]; None if there was no gate."""
    if not found:
        return None
    if reason := why_missing(found):
        return markup.section("gate", "The gate", markup.not_measured(reason))
    counts = [
        f"{found[key]:,} {title}"
        for key, title in (("rejected", "rejected"), ("replaced", "replaced"), ("given_up", "given up"))
    ]
    note = (
        f"A gate judged {found['candidates']:,} candidates before they became samples: {words.joined(counts)}. The verdict on "
        "privacy is about the generator before the gate, because whoever has the generator can leave the gate out."
    )
    rules = words.joined([f"{name.replace('_', ' ')} {value}" for name, value in (found.get("rules") or {}).items()])
    parts = [markup.paragraph(note), markup.paragraph(f"Settings: {rules or 'none'}.", "note")]
    if found.get("reasons"):
        rows = [[name.capitalize(), f"{number:,}"] for name, number in found["reasons"].items()]
        parts.append(markup.table("Why candidates were rejected", ["Reason", "Candidates"], rows))
    sides = [dict(_leaves(found.get(side) or {})) for side in ("before", "after")]
    if names := list(dict.fromkeys([*sides[0], *sides[1]])):
        rows = [[_title(name), *(figure_cell(side.get(name), _shown(name)) for side in sides)] for name in names]
        parts.append(markup.table("Before and after the gate", ["Figure", "Before", "After"], rows))
    return markup.section("gate", "The gate", *parts)


def _leaves(part: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Yields the figures of nested metrics with their paths. A plain number is a figure without an interval."""
    for key, item in part.items():
        if isinstance(item, dict) and "value" not in item:
            yield from _leaves(item, (*path, key))
        elif isinstance(item, dict):
            yield (*path, key), item
        elif isinstance(item, int | float):
            yield (*path, key), {"value": item, "low": None, "high": None}


def _title(path: tuple[str, ...]) -> str:
    first, *rest = path
    return ", ".join([first.capitalize().replace("_", " "), *(words.kind_name(key).replace("_", " ") for key in rest)])


def _shown(path: tuple[str, ...]) -> Callable[[float], str]:
    return words.percent if {"copies", "rate", "balanced_accuracy", "accuracy"} & set(path) else words.number
