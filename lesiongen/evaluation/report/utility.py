"""The section "Does it help?": classifiers trained with and without samples, judged on real test images."""

from lesiongen.evaluation.report import charts, markup, words
from lesiongen.evaluation.report.markup import Html, figure_cell
from lesiongen.evaluation.report.readings import why_missing

METHODS = {
    "probe": "a linear classifier on fixed features of a network",
    "finetune": "a network of which all weights are trained",
}
SIZE = "Real images of each class"
GAINS = {"gain": "Real and samples, minus real augmented", "gain_over_real": "Real and samples, minus real"}


def utility(found: dict | None) -> Html:
    """Returns the section of metrics["utility"]."""
    if reason := why_missing(found):
        return markup.section("utility", "Does it help?", markup.not_measured(reason))
    test = found.get("test") or {}
    counts = ", ".join(f"{test[key]:,} {key}" for key in ("images", "lesions") if key in test)
    note = (
        f"Classifiers ({METHODS.get(found['method'], found['method'])}) are trained with and without samples, "
        f"{found['seeds']} times each, and judged on real test images ({counts}) that no model was trained "
        "on. Where real images and samples are used together, there are as many of the one as of the other."
    )
    drawn, alt = charts.utility(found)
    caption = (
        "Bands are 95 % intervals. Where they overlap widely, a difference may be noise; the table of gains compares in pairs."
    )
    parts = [markup.paragraph(note), markup.terms("AUPRC"), markup.chart(drawn, alt, caption)]
    parts += [_gains(found), _accuracy(found), _classes(found)]
    return markup.section("utility", "Does it help?", *filter(None, parts))


def _sizes(by_size: dict) -> list[str]:
    return sorted(by_size, key=lambda size: -1 if size == "all" else int(size))


def _gains(found: dict) -> Html:
    """Returns the table of differences, compared in pairs over seeds and lesions."""
    rows = []
    for key, title in GAINS.items():
        for size in _sizes(found.get(key) or {}):
            gain = found[key][size]
            cells = [figure_cell(gain.get("balanced_accuracy"), words.points), figure_cell(gain.get("auprc"), words.points)]
            rows.append([title, size, *cells])
    return markup.table(
        "What samples add. An interval that includes 0 shows neither benefit nor harm",
        ["Difference", SIZE, "Balanced accuracy", "AUPRC"],
        rows,
    )


def _accuracy(found: dict) -> Html:
    rows = []
    for arm, by_size in found["arms"].items():
        for size in _sizes(by_size):
            about = by_size[size]
            figures = [figure_cell(about.get(key), words.percent) for key in ("balanced_accuracy", "auprc")]
            size = "none" if size == "all" else size
            rows.append([words.ARMS.get(arm, arm), size, f"{about.get('images', 0):,}", *figures])
    return markup.table("Accuracy on real test images", ["Trained on", SIZE, "Images", "Balanced accuracy", "AUPRC"], rows)


def _classes(found: dict) -> Html | None:
    """Returns the recall of each class at the largest size, by arm."""
    arms = {arm: by_size[_sizes(by_size)[-1]].get("classes") or {} for arm, by_size in found["arms"].items() if by_size}
    names = list(dict.fromkeys(name for classes in arms.values() for name in classes))
    if not names:
        return None
    rows = [
        [
            words.diagnosis(name),
            *(figure_cell((classes.get(name) or {}).get("recall"), words.percent) for classes in arms.values()),
        ]
        for name in names
    ]
    head = ["Diagnosis", *(words.ARMS.get(arm, arm) for arm in arms)]
    return markup.table("Share of real test images of each diagnosis that are labelled right, largest size", head, rows)
