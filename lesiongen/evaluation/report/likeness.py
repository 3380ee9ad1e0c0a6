"""The section "Is it like the real thing?": distances by every ruler, what causes them, the classifier, and each class."""

from lesiongen.evaluation.report import charts, markup, words
from lesiongen.evaluation.report.markup import Html, element, figure_cell, join
from lesiongen.evaluation.report.readings import main_ruler, why_missing

FIGURES = {  # key → title
    "kid": "KID",
    "frechet": "Fréchet distance",
    "precision": "Precision",
    "recall": "Recall",
    "density": "Density",
    "coverage": "Coverage",
}


def likeness(metrics: dict) -> Html:
    """Returns the section."""
    parts = [*_distances(metrics.get("likeness")), *_classifier(metrics.get("classifier")), *_by_class(metrics)]
    return markup.section("likeness", "Is it like the real thing?", *parts)


def _distances(found: dict | None) -> list[Html]:
    """Returns the tables of all rulers, and the bars that show which model causes the distance."""
    title = markup.heading("Distance to real images")
    reason = why_missing(found) or why_missing((found or {}).get("rulers"))
    if reason:
        return [title, markup.not_measured(reason)]
    note = (
        f"Two sets of {found['number']:,} images are compared at a time, with the same mix of diagnoses. A ruler is a network "
        "that describes an image by numbers. No set of real images equals another, so read every value beside the first "
        "column, the floor."
    )
    compared = join([element("li", join([element("b", name), f": {about}."], "")) for name, about in words.PAIRS.values()])
    parts = [title, markup.paragraph(note), element("ul", compared), markup.terms(*FIGURES.values())]
    for ruler, about in found["rulers"].items():
        head = ["Figure", *(name for name, _ in words.PAIRS.values())]
        rows = [
            [title, *(figure_cell(about["all"].get(pair, {}).get(key)) for pair in words.PAIRS)]
            for key, title in FIGURES.items()
        ]
        parts += [markup.table(f"Ruler “{ruler}”: {about['about']}", head, rows)]
        if ruler == main_ruler(found):
            parts += _bars(about["all"], ruler)
    return parts


def _bars(pairs: dict[str, dict], ruler: str) -> list[Html]:
    """Returns a table whose bars show the KID of each pair."""
    kids = {pair: (pairs.get(pair) or {}).get("kid") or {} for pair in words.PAIRS}
    top = max([abs(kid.get("high") or kid.get("value") or 0) for kid in kids.values()] + [1e-9])
    rows = []
    for pair, kid in kids.items():
        width = 100 * max(0.0, kid.get("value") or 0) / top
        bar = element("span", "", class_="bar", style=f"width:{width:.1f}%", aria_hidden="true")
        rows.append([words.PAIRS[pair][0], figure_cell(kid), element("span", bar, class_="track", aria_hidden="true")])
    return [markup.table(f"Whose part is it? KID by the ruler “{ruler}”", ["Compared", "KID", "Size"], rows)]


def _classifier(found: dict | None) -> list[Html]:
    title = markup.heading("Does a classifier see the diagnosis?")
    if reason := why_missing(found):
        return [title, markup.not_measured(reason)]
    parts = [title, markup.paragraph(f"{found['about'].rstrip('.')}."), markup.terms("Balanced accuracy", "Chance", "Flips")]
    rows = [
        [f"Balanced accuracy: {name.lower()}", figure_cell(found["balanced_accuracy"].get(source), words.percent)]
        for source, name in words.SOURCES.items()
    ]
    rows += [["Chance", element("b", words.percent(found["chance"]))]]
    rows += [["Flips by the tokenizer", figure_cell(found.get("flips"), words.percent)]]
    if before := found.get("flips_before_polish"):
        rows += [["Flips before the decoder was polished", figure_cell(before, words.percent)]]
    shown = [markup.table("What the classifier sees", ["Figure", "Value"], rows)]
    if drawn := charts.confusion(found):
        caption = "Rows: the diagnosis that was requested. Columns: the diagnosis that the classifier sees."
        shown.append(markup.chart(*drawn, caption))
    return [*parts, markup.side_by_side(shown)]


def _by_class(metrics: dict) -> list[Html]:
    """Returns the table of all classes: recognised, spread, and KID where a class has enough held-out images."""
    classifier, diversity = (metrics.get(key) or {} for key in ("classifier", "diversity"))
    rulers = (metrics.get("likeness") or {}).get("rulers") or {}
    ruler = main_ruler({"rulers": rulers})
    distances = rulers.get(ruler, {}).get("classes") or {}
    recall, spread = classifier.get("recall") or {}, diversity.get("classes") or {}
    parts = [markup.heading("Diversity, and each diagnosis"), markup.terms("Spread")]
    if reason := why_missing(metrics.get("diversity")):
        parts.append(markup.not_measured(reason))
    whole_kids = [(rulers.get(ruler, {}).get("all", {}).get(pair) or {}).get("kid") for pair in ("both", "floor")]
    head = ["Diagnosis", "Samples recognised", "Real recognised", "Spread, of real"]
    head += ["KID, samples", "KID, floor"] if ruler else []
    rows = []
    for name in dict.fromkeys([*recall, *spread, *distances]):
        cells = [figure_cell(recall.get(name, {}).get(source), words.percent) for source in ("samples", "real")]
        cells += [figure_cell(spread.get(name, {}).get("ratio"))]
        if ruler:
            cells += [figure_cell((distances.get(name, {}).get(pair) or {}).get("kid")) for pair in ("both", "floor")]
        rows.append([words.diagnosis(name), *cells])
    whole = (diversity.get("all") or {}).get("ratio")
    if whole:
        accuracy = classifier.get("balanced_accuracy") or {}
        cells = [figure_cell(accuracy.get(source), words.percent) for source in ("samples", "real")]
        rows.append(["All", *cells, figure_cell(whole), *(map(figure_cell, whole_kids) if ruler else ())])
    if rows:
        caption = "Each diagnosis" + (". KID needs more than 50 held-out images of a diagnosis" if ruler else "")
        parts.append(markup.table(caption, head, rows))
    return parts
