"""Plots of the report, as PNG bytes: learning curves, confusion matrix, and histogram of distances.

The training stages draw the learning curves too, at each evaluation.
"""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

TRAIN, HELD_OUT, FLOOR = "#2a6fbb", "#d9701a", "#8a8f98"
# Colour, label and style of the lines of a panel. For a prior, training codes have two lines: "training" is the training loss,
# with dropout and augmentation; "no dropout" is measured in the same way as the held-out line, so the two can be compared.
LOOKS = (
    (TRAIN, "training", "-"),
    (HELD_OUT, "held-out", ".-"),
    (FLOOR, "bigram", "--"),
    (TRAIN, "training, no dropout", ".:"),
)

Panel = tuple[str, str, tuple[str, ...]]  # stage, title, metrics: training first, held-out second


def curves(stages: dict[str, list[dict]]) -> bytes | None:
    """Draws training and held-out metrics over the samples seen, one panel for each metric. Classes get thin lines.

    Args:
        stages: The rows of each stage's metrics log.

    Returns:
        PNG bytes; None if the rows hold none of the metrics.
    """
    panels = [p for p in _panels(stages) if any(p[2][0] in row or p[2][1] in row for row in stages.get(p[0], []))]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _figure(11 if columns == 3 else 5.2 * columns, (2.7 if columns > 1 else 3.6) * rows, rows, columns)
    for axis, (stage, title, metrics) in zip(axes, panels, strict=False):
        lines = [(metric, *look, 1.4) for metric, look in zip(metrics, LOOKS, strict=False)]
        classes = sorted({key for row in stages[stage] for key in row if key.startswith(f"{metrics[1]}/")})
        lines += [(key, f"C{i % 10}", key.rpartition("/")[2], ".-", 0.6) for i, key in enumerate(classes)]
        for key, colour, label, style, width in lines:
            points = [(row["samples"], row[key]) for row in stages[stage] if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=width, markersize=4 * width)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=6 if classes else 8, frameon=False, ncols=2 if classes else 1)
        axis.tick_params(labelsize=8)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return _png(figure)


def _panels(stages: dict[str, list[dict]]) -> list[Panel]:
    """Lists the panels that the stages may fill."""
    panels: list[Panel] = [
        ("tokenizer", "PSNR in dB", ("train/psnr", "val/psnr")),
        ("tokenizer", "mean squared error, images in [-1, 1]", ("train/reconstruction", "val/mse")),
    ]
    keys = sorted({key for row in stages.get("tokenizer", []) for key in row})
    for metric, title in (("usage", "share of codes used"), ("perplexity", "perplexity of codes")):
        levels = sorted({key.split("/")[2] for key in keys if f"/{metric}/" in key})
        panels += [("tokenizer", f"{title}: {v}", (f"train/{metric}/{v}", f"val/{metric}/{v}")) for v in levels]
    bits = ("train/bits_per_token", "val/bits_per_token", "val/bigram_bits", "val/train_bits_per_token")
    priors = [name for name in stages if name.startswith("prior-")]
    return panels + [(name, f"bits per token: {name.removeprefix('prior-')}", bits) for name in priors]


def confusion(fidelity: dict, classes: list[str]) -> bytes | None:
    """Draws the classes that the classifier predicts for the samples of each class, as shares of a row.

    Args:
        fidelity: The fidelity metrics.
        classes: Class names.

    Returns:
        PNG bytes; None if fidelity was not measured.
    """
    if fidelity["ratio"] is None:
        return None
    requested = [i for i, row in enumerate(fidelity["confusion"]) if sum(row)]
    shares = [[n / sum(fidelity["confusion"][i]) for n in fidelity["confusion"][i]] for i in requested]
    figure, (axis,) = _figure(5.2, 1.6 + 0.42 * len(requested))
    axis.grid(False)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share >= 0.005 and len(classes) <= 12:
                axis.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=8, color="w" if share > 0.5 else "k")
    axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(requested)), [classes[i] for i in requested], fontsize=8)
    return _png(figure)


def histogram(samples: list[float], held_out: list[float], threshold: float) -> bytes:
    """Draws the distances of samples and held-out images to their nearest training image, and the threshold for copies.

    Args:
        samples: Distances of the samples.
        held_out: Distances of the held-out images.
        threshold: Distance below which an image is a copy.

    Returns:
        PNG bytes.
    """
    figure, (axis,) = _figure(5.2, 3.6)
    top = sorted(samples + held_out)[int(0.995 * (len(samples) + len(held_out) - 1))]
    bins = [top * i / 40 for i in range(41)]
    for values, label, colour in ((held_out, "held-out images", HELD_OUT), (samples, "samples", TRAIN)):
        weights = [100 / len(values)] * len(values)
        axis.hist([min(v, top) for v in values], bins, weights=weights, alpha=0.55, color=colour, label=label)
    axis.axvline(threshold, color="#d0413b", linestyle="--", linewidth=1.2, label="copies are left of this line")
    axis.set_xlabel("distance to the nearest training image", fontsize=9)
    axis.set_ylabel("share in %", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8, frameon=False)
    return _png(figure)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> "tuple[Figure, np.ndarray]":
    """Returns a figure of `width` × `height` inches, and its panels."""
    from matplotlib.figure import Figure  # not pyplot, which would keep every figure in memory and may need a display

    figure = Figure((width, height), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
