"""Whether samples show their class, judged by a classifier of real images, and how varied they are within a class.

The classifier is also applied to reconstructions of held-out images. The tokenizer decodes samples too, so the reconstructions
show how much of a loss is due to the tokenizer, and how often the tokenizer changes the label of an image. A polished decoder
is told the label, so that its reconstructions keep it more often than their codes would. So changes of labels are counted in
reconstructions whose decoder is not told.

Shapes: N images, K classes, D features.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from lesiongen.evaluation.intervals import ROUNDS, balanced_accuracy, figure, from_rounds, mean, resampled_weights, share

PER_CLASS = 200  # images of a class, at most, whose distances to one another are averaged


@dataclass(frozen=True)
class Judged:
    """The classifier's judgement of one source of images.

    Attributes:
        labels: True or requested labels, [N]; none is -1.
        probabilities: Probability of each class, [N, K].
        groups: The lesion of each image, [N].
    """

    labels: np.ndarray
    probabilities: np.ndarray
    groups: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """The likeliest label of each image, [N]."""
        return self.probabilities.argmax(1)

    def within(self, labels: list[int]) -> "Judged":
        """Returns the images with these labels."""
        kept = np.isin(self.labels, labels)
        return Judged(self.labels[kept], self.probabilities[kept], self.groups[kept])


def fidelity(judged: dict[str, Judged], classes: list[str], trained_on: list[int]) -> dict:
    """Measures how often the classifier sees the true or requested class, over the classes that all sources have.

    Args:
        judged: The judgement of "real" held-out images, "reconstructions" of them in the same order, and "samples"; also of
            the reconstructions "before_polish" and of those decoded "without_label", if the decoder was polished.
        classes: Class names in the order of their labels.
        trained_on: Labels that training images have.

    Returns:
        "chance", "reason", "balanced_accuracy", "recall", "confusion", "classes" and "flips", the share of images whose
        reconstruction gets another label. If the decoder was polished, also "flips_before_polish" and "flips_by_polish", the
        difference. If nothing can be measured, "reason" says why, and the others are None.
    """
    before, without_label = judged.get("before_polish"), judged.get("without_label", judged["reconstructions"])
    judged = {source: judged[source] for source in ("real", "reconstructions", "samples")}
    common = sorted(set(trained_on).intersection(*(set(j.labels.tolist()) for j in judged.values())))
    reason = None
    if len(trained_on) < 2:
        reason = "the training images have fewer than two classes, so there is nothing to tell apart"
    elif not common:
        reason = "no class has both samples and held-out images"
    if reason:
        keys = ("balanced_accuracy", "recall", "confusion", "flips")
        return {"chance": 1 / max(1, len(classes)), "reason": reason, "classes": classes} | dict.fromkeys(keys)
    same = {source: j.within(common) for source, j in judged.items()}
    samples = same["samples"]
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (samples.labels, samples.predicted), 1)
    real = judged["real"]
    flipped = real.predicted != without_label.predicted
    flips = {"flips": mean(flipped, real.groups)}
    if before is not None:
        flipped_before = real.predicted != before.predicted
        flips["flips_before_polish"] = mean(flipped_before, real.groups)
        flips["flips_by_polish"] = mean(flipped.astype(float) - flipped_before, real.groups)
    return {
        "chance": 1 / len(classes),
        "reason": None,
        "classes": classes,
        "balanced_accuracy": {source: balanced_accuracy(j.labels, j.predicted, j.groups) for source, j in same.items()},
        "recall": {classes[label]: {source: _recall(j, label) for source, j in same.items()} for label in common},
        "confusion": confusion.tolist(),
        **flips,
    }


def _recall(judged: Judged, label: int) -> dict:
    """Returns the recall of a class, with the number of images."""
    mine = judged.within([label])
    right = mine.predicted == label
    if len(np.unique(mine.groups)) == len(right):
        return share(int(right.sum()), len(right)) | {"number": len(right)}
    return mean(right, mine.groups) | {"number": len(right)}


def diversity(features: dict[str, np.ndarray], labels: np.ndarray, classes: list[str], seed: int = 0) -> dict:
    """Measures the mean distance of two images of a class, relative to that of real images.

    Args:
        features: Features [N, D] of "real" held-out images, "reconstructions" and "samples". Image n has the same label in all.
        labels: The labels, [N].
        classes: Class names in the order of their labels.
        seed: Seed of the bootstrap.

    Returns:
        "all" and "classes" {class: …}, each with a figure for each source and "ratio", samples / real; and "reason", which says
        why there is nothing to measure. "all" is the mean over classes.
    """
    spread: dict[str, dict[str, tuple[float, np.ndarray]]] = {}
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)[:PER_CLASS]
        if len(members) > 2:
            name = classes[label] if label >= 0 else ""
            spread[name] = {source: _spread(values[members], seed) for source, values in features.items()}
    if not spread:
        return {"all": None, "classes": {}, "reason": "no class has three samples and three held-out images"}
    over_classes = {
        source: (
            float(np.mean([by_source[source][0] for by_source in spread.values()])),
            np.mean([by_source[source][1] for by_source in spread.values()], axis=0),
        )
        for source in features
    }
    return {"all": _spread_figures(over_classes), "classes": {k: _spread_figures(v) for k, v in spread.items()}, "reason": None}


def _spread(features_ND: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
    """Returns the mean distance of two different images, and the same in each resample of a bootstrap."""
    x = torch.from_numpy(features_ND).double()
    distance_NN = torch.cdist(x, x).numpy()
    # Images of rare classes occur several times in a set; a distance of 0 between repetitions says nothing about diversity.
    different_NN = (distance_NN > 1e-9).astype(float)

    def mean_distance(w: np.ndarray) -> float:
        pairs = w @ different_NN @ w
        return float(w @ distance_NN @ w / pairs) if pairs else math.nan

    weights = resampled_weights(np.arange(len(x)), ROUNDS, seed).astype(float)
    return mean_distance(np.ones(len(x))), np.array([mean_distance(w) for w in weights])


def _spread_figures(spread: dict[str, tuple[float, np.ndarray]]) -> dict:
    figures: dict = {source: from_rounds(value, rounds) for source, (value, rounds) in spread.items()}
    (samples, of_samples), (real, of_real) = spread["samples"], spread["real"]
    figures["ratio"] = from_rounds(samples / real, of_samples / of_real) if real else figure(math.nan)
    return figures
