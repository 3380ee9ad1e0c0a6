"""Scores of a classifier on lesions, with intervals that cover both the test lesions and the seeds of the training.

A lesion's probabilities are the mean of those of its photographs. A lesion with many photographs therefore counts no more than
one with a single photograph. The utility test calls this for every classifier that it trains.

Shapes: N test images, L test lesions, K classes, R resamples of the bootstrap, S seeds.
"""

import numpy as np

from lesiongen.evaluation.intervals import ROUNDS, Figure, figure, from_rounds, resampled_weights


class TestLesions:
    """The lesions of a test set and the resamples of its bootstrap.

    All classifiers are measured on the same resamples, so their differences are paired. Each resample keeps the number of
    lesions of each class. Otherwise a rare class would be missing from some resamples, and the precision, which depends on how
    frequent a class is, would vary from one resample to the next.

    Attributes:
        labels_L: The class of each lesion.
        weights: How often each lesion occurs, [1 + R, L]; the first row is the test set itself, all ones.
        classes: Number of classes, K.
    """

    __test__ = False  # pytest would take the class for a group of tests

    def __init__(self, labels_N: np.ndarray, groups_N: np.ndarray, classes: int, seed: int, rounds: int = ROUNDS):
        """Groups the images to lesions and draws the resamples.

        Args:
            labels_N: The class of each image, from 0 to classes - 1.
            groups_N: The lesion of each image, integers or strings. Images of a group that have different labels are counted as
                different lesions, because a group may be a patient.
            classes: Number of classes, K.
            seed: Seed of the resamples.
            rounds: Number of resamples, R.
        """
        _, group_N = np.unique(groups_N, return_inverse=True)
        keys_L, self._lesion_N = np.unique(group_N * classes + labels_N, return_inverse=True)
        self._photographs_L = np.bincount(self._lesion_N)
        self.labels_L, self.classes = keys_L % classes, classes
        # The rows of the transpose lie together in memory, which is what average_precision() reads fastest.
        self.weights = np.ones((len(keys_L), 1 + rounds), np.float32).T
        for label in np.unique(self.labels_L).tolist():
            members = np.flatnonzero(self.labels_L == label)
            self.weights[1:, members] = resampled_weights(np.arange(len(members)), rounds, seed + label)

    def average(self, scores_NK: np.ndarray) -> np.ndarray:
        """Returns the mean of the probabilities of each lesion's photographs, [L, K]."""
        columns = [np.bincount(self._lesion_N, scores, len(self.labels_L)) for scores in scores_NK.T]
        return np.stack(columns, 1) / self._photographs_L[:, None]

    def measure(self, scores_NK: np.ndarray) -> dict[str, np.ndarray]:
        """Measures a classifier on the test set and on each resample.

        Args:
            scores_NK: The probability of each class for each test image.

        Returns:
            "recall" and "auprc" of each class, [1 + R, K]; the first row is the test set itself; NaN for a class without test
            lesions. The recall is the share of a class's lesions whose most probable class is the right one. The auprc is the
            average precision of one class against the rest.
        """
        scores_LK = self.average(scores_NK)
        right_L = scores_LK.argmax(1) == self.labels_L
        recall = np.full((len(self.weights), self.classes), np.nan)
        auprc = recall.copy()
        for label in np.unique(self.labels_L).tolist():
            is_class_L = self.labels_L == label
            weights = self.weights[:, is_class_L]
            recall[:, label] = weights @ right_L[is_class_L] / weights.sum(1)
            auprc[:, label] = average_precision(is_class_L, scores_LK[:, label], self.weights)
        return {"recall": recall, "auprc": auprc}


def average_precision(positive_L: np.ndarray, scores_L: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Computes the average precision, the area under the precision-recall curve, for many resamples at once.

    Equals scikit-learn's average_precision_score with sample_weight, but sorts the scores only once, which makes the bootstrap
    affordable.

    Args:
        positive_L: Whether each lesion has the class; at least one has.
        scores_L: The score of each lesion.
        weights: How often each lesion occurs in each resample, [R, L].

    Returns:
        The average precision in each resample, [R].
    """
    order = np.argsort(-scores_L, kind="stable")
    chosen_LR = weights.T[order]
    # Only thresholds at which lesions of the class are found count. Lesions of equal scores pass a threshold together.
    places = np.flatnonzero(positive_L[order])
    found = scores_L[order][places]
    last = np.append(np.flatnonzero(np.diff(found)), len(found) - 1)  # of the lesions of the class with the same score
    ends = np.searchsorted(-scores_L[order], -found[last], side="right") - 1
    hits_PR = np.cumsum(chosen_LR[places], 0)[last]
    precision_PR = hits_PR / np.maximum(np.cumsum(chosen_LR, 0)[ends], 1)
    return (np.diff(hits_PR, axis=0, prepend=0) * precision_PR).sum(0, dtype=np.float64) / hits_PR[-1]


def drawn_seeds(seeds: int, rounds: int, seed: int) -> np.ndarray:
    """Draws the seeds of each resample, with replacement. Returns how often each seed occurs, float [R, S]."""
    return resampled_weights(np.arange(seeds), rounds, seed).astype(float)


def over_seeds(values: np.ndarray, drawn_RS: np.ndarray) -> Figure:
    """Averages a score over seeds, with an interval over both the seeds and the test lesions.

    The bootstrap has two levels: resample r draws seeds and lesions together. If S seeds are drawn with replacement, the
    variance of their mean is too small by the factor (S - 1) / S, so the deviations that come from the seeds are scaled up.
    The resamples are shifted so that their mean is the value: the average precision of a resample is too high, because a lesion
    that is drawn twice confirms itself.

    Args:
        values: The score of each seed on the test set and on each resample of its lesions, [S, 1 + R].
        drawn_RS: From `drawn_seeds`.

    Returns:
        The mean over the seeds and its interval; None for all three where the score is NaN.
    """
    seeds = len(values)
    mean_R = values[:, 1:].mean(0)
    drawn_R = (drawn_RS * values[:, 1:].T).sum(1) / seeds
    scale = np.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0
    value = float(values[:, 0].mean())
    if not np.isfinite(value):
        return figure(value)
    rounds_R = mean_R + scale * (drawn_R - mean_R)
    return from_rounds(value, rounds_R - rounds_R.mean() + value)
