"""The sections of the data: slices by body site, sex, age and skin tone, and the counts of images and licences."""

from lesiongen.evaluation.card import statement
from lesiongen.evaluation.report import markup, words
from lesiongen.evaluation.report.markup import Html, figure_cell
from lesiongen.evaluation.report.readings import why_missing

MEMBERS = ("lesions", "patients", "groups")


def fairness(found: dict | None) -> Html:
    """Returns the section of metrics["fairness"]."""
    title = "Who is shown, and how well?"
    if reason := why_missing(found) or why_missing((found or {}).get("slices")):
        return markup.section("fairness", title, markup.not_measured(reason))
    note = (
        "The shares of each group among training images, held-out images and samples. For held-out images of the group: the "
        "quality of the reconstruction, the share that the classifier labels right, and the bits that the priors need."
    )
    parts = [markup.paragraph(note), markup.terms("PSNR", "Bits per image", "ITA"), markup.paragraph(found.get("note") or "")]
    head = ["Group", "Training", "Held-out", "Samples", "PSNR", "Labelled right", "Bits per image"]
    for fact, values in found["slices"].items():
        totals = {key: sum(about.get(key) or 0 for about in values.values()) for key in ("train", "held_out")}
        rows = []
        for value, about in values.items():
            shares = [_counted(about.get(key), totals[key]) for key in totals] + [_share(about.get("samples"))]
            figures = [
                figure_cell(about.get("psnr")),
                figure_cell(about.get("recall"), words.percent),
                figure_cell(about.get("bits")),
            ]
            rows.append([value or "unknown", *shares, *figures])
        parts.append(markup.table(f"By {words.FACTS.get(fact, fact)}", head, rows))
    return markup.section("fairness", title, *parts)


def _share(value: float | None) -> str:
    """Returns a share in percent."""
    return "not known" if value is None else words.percent(value)


def _counted(number: int | None, total: int) -> str:
    """Returns a number of images and its share."""
    return "not known" if number is None else f"{number:,} ({words.percent(number / total if total else 0)})"


def data(found: dict | None) -> Html:
    """Returns the section of metrics["data"]."""
    if reason := why_missing(found):
        return markup.section("data", "The data", markup.not_measured(reason))
    splits, generated = list(found["counts"]), found["generated"]
    names = dict.fromkeys([name for counts in found["counts"].values() for name in counts] + list(generated))
    rows = [
        [
            words.diagnosis(name),
            *(f"{found['counts'][split].get(name, 0):,}" for split in splits),
            f"{generated.get(name, 0):,}",
        ]
        for name in names
    ]
    totals = [sum(found["counts"][split].values()) for split in splits] + [sum(generated.values())]
    rows.append(["All images", *(f"{total:,}" for total in totals)])
    for kind in (kind for kind in MEMBERS if kind in found):
        rows.append([kind.capitalize(), *(f"{found[kind].get(split, 0):,}" for split in splits), "–"])
    parts = [
        markup.table("Images of each diagnosis", ["Diagnosis", *(split.capitalize() for split in splits), "Samples"], rows)
    ]
    parts += [_set(place, one) for place, one in enumerate(found.get("sets") or [], 1) if len(found["sets"]) > 1]
    note = "Lesions and patients are those with an id in the metadata. Groups are images that may not be in different splits. "
    note += f"{found.get('lesions_in_two_splits') or 'No'} group is in two splits. "
    note += f"{found.get('rejected', 0):,} images or rows of metadata were rejected."
    return markup.section("data", "The data", *parts, markup.paragraph(note, "note"))


def _set(place: int, found: dict) -> Html:
    """Returns a line about one of several packed sets."""
    counts = ", ".join(f"{found[kind]:,} {kind}" for kind in ("images", *MEMBERS) if kind in found)
    return markup.paragraph(f"Set {place} ({', '.join(found['sources']) or 'unknown source'}): {counts}", "note")


def summary(found: dict | None) -> list[str]:
    """Returns lines about samples, real data and licence, for the head of the page."""
    if why_missing(found):
        return []
    sources = ", ".join(source or "unknown source" for source in found.get("sources") or {})
    listed = ", ".join(f"{sum(counts.values()):,} {split}" for split, counts in found["counts"].items())
    members = ", ".join(f"{sum(found[kind].values()):,} {kind}" for kind in MEMBERS if any(found.get(kind, {}).values()))
    return [
        f"{sum(found['generated'].values()):,} samples of {found['size']} × {found['size']} px",
        f"Real data: {sources or 'unknown source'}; {listed} images" + (f" of {members}" if members else ""),
        f"Strictest licence of the data: {statement(found)}",
    ]
