"""Learning curves, as PNG bytes. The training stages draw them at each evaluation, and the report shows them."""

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

Panel = tuple[str, str, tuple[str, ...]]  # stage, title, metrics: training first, held-out second if there is one


def curves(stages: dict[str, list[dict]]) -> bytes | None:
    """Draws training and held-out metrics over the samples seen, one panel for each metric. Classes get thin lines.

    Args:
        stages: The rows of each stage's metrics log.

    Returns:
        PNG bytes; None if the rows hold none of the metrics.
    """
    panels = [p for p in _panels(stages) if any(metric in row for row in stages.get(p[0], []) for metric in p[2][:2])]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(11 if columns == 3 else 5.2 * columns, (2.7 if columns > 1 else 3.6) * rows, rows, columns)
    for axis, (stage, title, metrics) in zip(axes, panels, strict=False):
        lines = [(metric, *look, 1.4) for metric, look in zip(metrics, LOOKS, strict=False)]
        of_classes = tuple(f"{held_out}/" for held_out in metrics[1:2])
        classes = sorted({key for row in stages[stage] for key in row if key.startswith(of_classes)})
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
    return to_png(figure)


def _panels(stages: dict[str, list[dict]]) -> list[Panel]:
    """Lists the panels that the stages may fill."""
    panels: list[Panel] = [
        ("tokenizer", "PSNR in dB", ("train/psnr", "val/psnr")),
        ("tokenizer", "mean squared error, images in [-1, 1]", ("train/reconstruction", "val/mse")),
        ("polish", "polishing: loss without the critic", ("train/compared", "val/loss")),
        ("polish", "polishing: loss of the critic", ("train/critic",)),
        ("polish", "polishing: PSNR in dB, labels told", ("train/psnr", "val/psnr")),
    ]
    keys = sorted({key for row in stages.get("tokenizer", []) for key in row})
    for metric, title in (("usage", "share of codes used"), ("perplexity", "perplexity of codes")):
        levels = sorted({key.split("/")[2] for key in keys if f"/{metric}/" in key})
        panels += [("tokenizer", f"{title}: {v}", (f"train/{metric}/{v}", f"val/{metric}/{v}")) for v in levels]
    bits = ("train/bits_per_token", "val/bits_per_token", "val/bigram_bits", "val/train_bits_per_token")
    priors = [name for name in stages if name.startswith("prior-")]
    return panels + [(name, f"bits per token: {name.removeprefix('prior-')}", bits) for name in priors]


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> "tuple[Figure, np.ndarray]":
    """Returns a figure of `width` × `height` inches, and its panels."""
    from matplotlib.figure import Figure  # not pyplot, which would keep every figure in memory and may need a display

    figure = Figure((width, height), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def to_png(figure: "Figure") -> bytes:
    """Returns a figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
