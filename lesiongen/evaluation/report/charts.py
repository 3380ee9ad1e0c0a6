"""Charts of the report, as PNG bytes, each with a text that says what is seen: confusion, distances, utility.

A chart is 4.6 inches wide, so that its letters are still 11 px high on a telephone. Lines differ in style and marker too.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lesiongen.evaluation.plots import HELD_OUT, TRAIN, new_figure, to_png
from lesiongen.evaluation.report.words import ARMS, interval, joined, number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 4.6  # inches
LABELS, TICKS = 10.5, 10  # font sizes in points
LOOKS = {"synthetic": ("#6b7280", "--"), "real": ("#2a6fbb", "o-"), "augmented": ("#a34c00", "s-"), "mixed": ("#1e7b45", "D-")}


def confusion(classifier: dict) -> tuple[bytes, str] | None:
    """Draws the classes that the classifier sees in the samples of each class, as shares of a row.

    Args:
        classifier: metrics["classifier"].

    Returns:
        PNG bytes and what is seen; None if it was not measured, or no class has samples.
    """
    if not classifier["confusion"]:
        return None
    names, counts = classifier["classes"], np.asarray(classifier["confusion"], float)
    rows = [i for i, row in enumerate(counts) if row.sum()]
    if not rows:
        return None
    shares = counts[rows] / counts[rows].sum(1, keepdims=True)
    figure, (axis,) = new_figure(WIDTH, 1.5 + 0.42 * len(rows))
    axis.grid(False)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (y, x), share in np.ndenumerate(shares):
        if share >= 0.005 and len(names) <= 9:
            axis.text(x, y, f"{share * 100:.0f}", ha="center", va="center", fontsize=TICKS, color="w" if share > 0.5 else "k")
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=TICKS)
    axis.set_yticks(range(len(rows)), [names[i] for i in rows], fontsize=TICKS)
    axis.set_xlabel("seen by the classifier, in %", fontsize=LABELS)
    axis.set_ylabel("requested", fontsize=LABELS)
    return to_png(figure), "Confusion matrix. " + " ".join(
        _row_in_words(names, i, share) for i, share in zip(rows, shares, strict=True)
    )


def _row_in_words(names: list[str], row: int, shares: np.ndarray) -> str:
    """Returns a row of the confusion matrix as a sentence."""
    text = f"{names[row]}: {percent(shares[row])} recognised"
    others = shares.copy()
    others[row] = 0
    return f"{text}, {percent(others.max())} taken for {names[int(others.argmax())]}." if others.max() > 0 else f"{text}."


def histogram(samples: Sequence[float], held_out: Sequence[float], threshold: float) -> bytes:
    """Draws how much closer samples and held-out images are to training images than to unseen ones, and the threshold.

    Args:
        samples: Closeness of the samples (see evaluation/privacy/copies.py).
        held_out: Closeness of the held-out images.
        threshold: Closeness below which an image is a copy.

    Returns:
        PNG bytes.
    """
    figure, (axis,) = new_figure(WIDTH, 3.7)
    top = max(float(np.quantile([*samples, *held_out], 0.995)), 1e-12)
    for values, label, colour, style in ((held_out, "held-out images", HELD_OUT, "-"), (samples, "samples", TRAIN, "--")):
        weights = [100 / len(values)] * len(values)
        shown = np.minimum(values, top)
        axis.hist(shown, bins=40, range=(0, top), weights=weights, alpha=0.45, color=colour)
        axis.hist(shown, bins=40, range=(0, top), weights=weights, histtype="step", color=colour, linestyle=style, label=label)
    axis.axvline(threshold, color="#b3261e", linestyle=":", linewidth=1.8, label="left of this: copies")
    axis.set_xlabel("distance to the nearest training image ÷ to the nearest unseen one", fontsize=LABELS)
    axis.set_ylabel("share in %", fontsize=LABELS)
    axis.tick_params(labelsize=TICKS)
    _legend_above(axis)
    return to_png(figure)


def _legend_above(axis: "Axes") -> None:
    """Places the legend above the panel, where it hides nothing."""
    axis.legend(fontsize=TICKS, frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1), borderaxespad=0)


def histogram_in_words(found: dict) -> str:
    """Returns what a histogram of closeness shows, from metrics["privacy"]["copies"]["kinds"][kind]."""
    middle = [
        f"{who} {number(found[key])}" if found.get(key) is not None else f"{who} not measured"
        for key, who in (("median", "samples"), ("held_out_median", "held-out images"))
    ]
    return (
        f"Histogram of the distance to the nearest training image, divided by that to the nearest unseen image. "
        f"Medians: {joined(middle)}. "
        f"{found['copies']} of {found['number']:,} samples are left of the line at {number(found['threshold'])}."
    )


def utility(found: dict) -> tuple[bytes, str]:
    """Draws balanced accuracy on real test images over the number of real training images, one line for each kind of training.

    Args:
        found: metrics["utility"].

    Returns:
        PNG bytes and what is seen.
    """
    figure, (axis,) = new_figure(WIDTH, 4.4)
    sizes, said = [int(size) for size in found["sizes"]], []
    for arm, by_size in found["arms"].items():
        colour, style = LOOKS.get(arm, ("#6b7280", "-"))
        points = {int(size): by_size[size]["balanced_accuracy"] for size in by_size if size != "all"}
        if "all" in by_size:  # training on samples alone uses no real images: a level line
            points = dict.fromkeys((min(sizes), max(sizes)), by_size["all"]["balanced_accuracy"])
        points = {size: figure for size, figure in sorted(points.items()) if figure["value"] is not None}
        if not points:
            continue
        axis.plot(list(points), [100 * f["value"] for f in points.values()], style, color=colour, label=ARMS.get(arm, arm))
        bounds = [[100 * (f[key] if f[key] is not None else f["value"]) for f in points.values()] for key in ("low", "high")]
        axis.fill_between(list(points), *bounds, color=colour, alpha=0.15, linewidth=0)
        said.append(f"{ARMS.get(arm, arm)}: {_ends(points)}.")
    axis.axhline(100 * found["chance"], color="#6b7280", linestyle=":", linewidth=1, label="Chance")
    axis.set_xscale("log")
    axis.set_xticks(sizes, [str(size) for size in sizes], fontsize=TICKS)
    axis.minorticks_off()
    axis.set_xlabel("real training images of each class", fontsize=LABELS)
    axis.set_ylabel("balanced accuracy in %", fontsize=LABELS)
    axis.tick_params(labelsize=TICKS)
    _legend_above(axis)
    return to_png(figure), "Balanced accuracy over the number of real training images of each class. " + " ".join(said)


def _ends(points: dict[int, dict]) -> str:
    """Returns the first and the last value of a line in words."""
    first, last = min(points), max(points)
    (begin, _), (end, _) = interval(points[first], percent), interval(points[last], percent)
    return begin if begin == end else f"{begin} with {first}, {end} with {last}"
