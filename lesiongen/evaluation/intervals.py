"""Figures with 95 % intervals: bootstraps over lesions, and intervals of shares.

A figure is a dict {"value", "low", "high"}; "low" and "high" are None where no interval can be computed. Photographs of one
lesion are not independent of one another, so a bootstrap draws whole lesions (groups), never single photographs.
"""

import math
from collections.abc import Callable

import numpy as np

Figure = dict[str, float | None]
ROUNDS = 200  # resamples of a bootstrap


def figure(value: float, low: float | None = None, high: float | None = None) -> Figure:
    """Returns a figure with an optional interval. Values that are not finite become None, because JSON has no NaN."""
    numbers = {"value": value, "low": low, "high": high}
    return {key: float(v) if v is not None and math.isfinite(v) else None for key, v in numbers.items()}


def from_rounds(value: float, rounds: np.ndarray | list[float]) -> Figure:
    """Returns a figure whose interval is the middle 95 % of its values in a bootstrap.

    Args:
        value: The value on the data themselves.
        rounds: The value in each resample; values that are not finite are left out.
    """
    finite = np.asarray(rounds, float)
    finite = finite[np.isfinite(finite)]
    if len(finite) < 2:
        return figure(value)
    low, high = np.quantile(finite, [0.025, 0.975])
    return figure(value, low, high)


def resampled_weights(groups_N: np.ndarray, rounds: int, seed: int) -> np.ndarray:
    """Draws the resamples of a bootstrap over groups.

    Args:
        groups_N: The group of each image, any integers.
        rounds: Number of resamples.
        seed: Seed of the draws.

    Returns:
        How often each image occurs in each resample, int64 [rounds, N]. All images of a group occur equally often.
    """
    _, member_N = np.unique(groups_N, return_inverse=True)
    number = int(member_N.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = np.stack([np.bincount(rng.integers(number, size=number), minlength=number) for _ in range(rounds)])
    return drawn[:, member_N]


def bootstrap(measure: Callable[[np.ndarray], float], groups_N: np.ndarray, rounds: int = ROUNDS, seed: int = 0) -> Figure:
    """Measures something on some images, and its interval by a bootstrap over groups.

    Args:
        measure: Maps weights [N], how often each image counts, to the value.
        groups_N: The group of each image.
        rounds: Number of resamples.
        seed: Seed of the draws.
    """
    weights = resampled_weights(groups_N, rounds, seed)
    return from_rounds(measure(np.ones(len(groups_N), dtype=np.int64)), [measure(w) for w in weights])


def mean(values_N: np.ndarray, groups_N: np.ndarray, seed: int = 0) -> Figure:
    """Returns the mean over images, with an interval by a bootstrap over groups.

    Args:
        values_N: A number, or whether something holds, for each image.
        groups_N: The group of each image.
        seed: Seed of the draws.
    """
    return bootstrap(lambda weights: float(np.average(values_N, weights=weights)), groups_N, seed=seed)


def balanced_accuracy(labels_N: np.ndarray, predicted_N: np.ndarray, groups_N: np.ndarray, seed: int = 0) -> Figure:
    """Measures the mean recall of the classes that occur, with an interval by a bootstrap over groups.

    A class that a resample of the bootstrap misses is left out of it.

    Args:
        labels_N: True labels, all ≥ 0.
        predicted_N: Predicted labels.
        groups_N: The group of each image.
        seed: Seed of the draws.
    """
    classes, right = int(labels_N.max()) + 1, labels_N == predicted_N

    def measure(weights: np.ndarray) -> float:
        number_K = np.bincount(labels_N, weights, classes)
        hits_K = np.bincount(labels_N, weights * right, classes)
        return float((hits_K[number_K > 0] / number_K[number_K > 0]).mean())

    return bootstrap(measure, groups_N, seed=seed)


def share(hits: int, number: int) -> Figure:
    """Returns a share with its 95 % interval (Wilson 1927), which also holds for few hits or none.

    Args:
        hits: Number of hits.
        number: Number of independent trials.
    """
    if not number:
        return figure(math.nan)
    low, high = wilson(hits, number)
    return figure(hits / number, low, high)


def difference(a: Figure, b: Figure) -> Figure:
    """Returns a − b of two independent shares, with its 95 % interval (Newcombe 1998, method 10).

    Args:
        a, b: Shares with their intervals by Wilson, from share(). Without one of them the difference has no interval.
    """
    value = a["value"] - b["value"]
    if None in a.values() or None in b.values():
        return figure(value)
    below = math.hypot(a["value"] - a["low"], b["high"] - b["value"])
    above = math.hypot(a["high"] - a["value"], b["value"] - b["low"])
    return figure(value, value - below, value + above)


def wilson(hits: int, number: int, z: float = 1.959964) -> tuple[float, float]:
    """Returns the 95 % interval of a share (Wilson 1927).

    Args:
        hits: Number of hits.
        number: Number of trials, at least 1.
        z: Quantile of the normal distribution; the default gives 95 %.
    """
    p = hits / number
    middle = (p + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * math.sqrt(p * (1 - p) / number + z**2 / (4 * number**2))
    return max(0.0, middle - half), min(1.0, middle + half)
