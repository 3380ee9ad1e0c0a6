"""Utility: does training a classifier with the samples help on real test images?

Four kinds of training sets ("arms") are compared at several numbers of real images per class:

- "real": the real images.
- "augmented": the real images and classical augmentation, that is, other views of the same images.
- "mixed": the real images and samples, as many per class as "augmented" has views ("equal dose").
- "synthetic": samples alone, all of them.

Each is repeated with several seeds, which draw other real images and other samples. The gain of the samples is mixed minus
augmented: what they add beyond what a user has without a generator. All arms are scored on the lesions of the real test split.
CheXGenBench (arXiv:2505.10496) likewise measures utility beside fidelity and privacy.

The evaluate stage calls utility() on rank 0. Of each training image, only its label and its lesion are kept in memory;
training_sets.py reads the images that some arm uses.

Shapes: N test images, M training images, R resamples, K classes, S seeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from hpc.data.order import sample_seed
from hpc.run.progress import progress_bar
from lesiongen.evaluation.intervals import ROUNDS, Figure, figure
from lesiongen.evaluation.lesion_scores import TestLesions, drawn_seeds, over_seeds
from lesiongen.evaluation.probe import Probe
from lesiongen.evaluation.training_sets import Pool, TrainingSets, Views

ARMS = ("real", "augmented", "mixed")  # what is trained at each size; besides "synthetic"
SCORES = ("balanced_accuracy", "auprc")

# Trains a classifier on items [M, …], labels [M] and a seed, and returns the probabilities of the test images [N, K].
Fit = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class UtilityConfig:
    """The test of whether samples help to train a classifier."""

    # probe = logistic regression on frozen features, a few minutes on a CPU; finetune = trains the whole network each time
    method: Literal["probe", "finetune"] = "probe"
    seeds: int = 5  # repetitions with other real images and other samples
    sizes: tuple[int, ...] = (10, 30, 100, 500)  # real images per class; a class with fewer gives all it has
    dose: float = 1.0  # samples, or views, that are added for each real image
    fine_tuning_samples: int = 5000  # length of each training of the method finetune, in images
    most_samples: int = 2000  # samples per class in the arm without real images, at most
    most_tests: int = 1000  # test lesions per class, at most

    def __post_init__(self):
        if self.seeds < 1 or self.dose <= 0 or self.most_samples < 1 or self.most_tests < 1:
            raise ValueError("seeds, dose, most_samples and most_tests must be above 0")
        if not self.sizes or min(self.sizes) < 1 or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"sizes={list(self.sizes)} must be numbers above 0 that rise")


def utility(
    real: Pool,
    views: Views,
    samples: Pool,
    test: Pool,
    classes: Sequence[str],
    config: UtilityConfig,
    seed: int,
    classifier: Callable[[np.ndarray, int], Fit] = Probe,
    progress: bool = True,
) -> dict:
    """Measures whether samples help to train a classifier.

    Args:
        real: The training split.
        views: Maps indices of training images [M] and the number of a view of each, from 0, to the items of these views, which
            are of the same kind as the items of the pools. See training_sets.classical_views().
        samples: The samples.
        test: The real test split.
        classes: Names of the classes, which number the labels.
        config: The settings.
        seed: Decides every draw.
        classifier: Makes the function that trains and scores, from the test images' items and the number of classes. The labels
            that this function gets are numbered anew, from 0, because classes without test images or samples are left out.
            Must be passed if config.method is "finetune".
        progress: Whether a progress bar is shown.

    Returns:
        The part "utility" of metrics.json: the scores of each arm at each size, and the gains of the samples. If fewer than two
        classes have training images, samples and test images, only a "reason".

    Raises:
        ValueError: The method is "finetune" and no classifier was passed.
    """
    if config.method != "probe" and classifier is Probe:
        raise ValueError(f"method={config.method} needs a classifier that trains by this method")
    kept = [c for c in range(len(classes)) if all((pool.labels_N == c).any() for pool in (real, samples, test))]
    if len(kept) < 2:
        return {"reason": "Fewer than two classes have real training images, samples and real test images."}
    # Draw the training sets and the test lesions.
    seeds = [sample_seed(seed, 1 + s) % 2**31 for s in range(config.seeds)]
    sets = TrainingSets(real, views, samples, kept, config.sizes, config.dose, config.most_samples, seeds)
    tested_N = _test_images(test, kept, config.most_tests, seed)
    labels_N = np.searchsorted(kept, test.labels_N[tested_N])
    lesions = TestLesions(labels_N, test.groups_N[tested_N], len(kept), sample_seed(seed, 0) % 2**31)
    fit = classifier(test.items(tested_N), len(kept))

    # Train and score every arm at every size.
    trained = {("synthetic", "all"): 0} | {(arm, str(size)): size for size in sets.sizes for arm in ARMS}
    results: dict[tuple[str, str], _Result] = {key: _Result([], []) for key in trained}
    with progress_bar(config.seeds * len(trained), "utility", unit="fit", shown=progress) as bar:
        for repetition, fit_seed in enumerate(seeds):
            for (arm, size), number in trained.items():
                items, labels = sets.get(arm, number, repetition)
                results[arm, size].add(lesions.measure(fit(items, labels, fit_seed)), len(labels))
                bar.update(1)

    # Summarise over the seeds and the test lesions.
    names = [classes[c] for c in kept]
    drawn_RS = drawn_seeds(config.seeds, ROUNDS, sample_seed(seed, 0) % 2**31)
    arms: dict[str, dict[str, dict]] = {arm: {} for arm in ("synthetic", *ARMS)}
    for (arm, size), result in results.items():
        arms[arm][size] = result.figures(names, drawn_RS)
    return {
        "method": config.method,
        "seeds": config.seeds,
        "test": _described(lesions, labels_N, names),
        "sizes": sets.sizes,
        "arms": arms,
        "gain": {str(n): _gain(results["mixed", str(n)], results["augmented", str(n)], drawn_RS) for n in sets.sizes},
        "gain_over_real": {str(n): _gain(results["mixed", str(n)], results["real", str(n)], drawn_RS) for n in sets.sizes},
        "chance": 1 / len(kept),
    }


class _Result(NamedTuple):
    """The scores of one arm at one size.

    Attributes:
        measured: For each seed, what TestLesions.measure() returned.
        images: For each seed, the number of training images.
    """

    measured: list[dict[str, np.ndarray]]
    images: list[int]

    def add(self, measured: dict[str, np.ndarray], images: int) -> None:
        """Adds the scores of one seed."""
        self.measured.append(measured)
        self.images.append(images)

    def by_class(self, score: str) -> np.ndarray:
        """Returns a score of each class, [S, 1 + R, K]. score: "recall" or "auprc"."""
        return np.stack([measured[score] for measured in self.measured])

    def overall(self, score: str) -> np.ndarray:
        """Returns a score over all classes, which count alike, [S, 1 + R]. score: one of SCORES."""
        return self.by_class("recall" if score == "balanced_accuracy" else score).mean(-1)

    def figures(self, names: Sequence[str], drawn_RS: np.ndarray) -> dict:
        """Returns the entry of metrics.json."""
        classes = {
            name: {score: _share(over_seeds(self.by_class(score)[..., k], drawn_RS)) for score in ("recall", "auprc")}
            for k, name in enumerate(names)
        }
        overall = {score: _share(over_seeds(self.overall(score), drawn_RS)) for score in SCORES}
        return overall | {"classes": classes, "images": round(float(np.mean(self.images)))}


def _gain(a: _Result, b: _Result, drawn_RS: np.ndarray) -> dict[str, Figure]:
    """Returns how much better a is than b. The difference is taken within each seed and each resample of the lesions."""
    return {score: over_seeds(a.overall(score) - b.overall(score), drawn_RS) for score in SCORES}


def _share(value: Figure) -> Figure:
    """Returns the figure with its interval cut to what a share can be, from 0 to 1."""
    cut = {key: None if v is None else min(max(v, 0.0), 1.0) for key, v in value.items()}
    return figure(cut["value"], cut["low"], cut["high"])


def _described(lesions: TestLesions, labels_N: np.ndarray, names: Sequence[str]) -> dict:
    """Returns the numbers of test images and lesions, over all and of each class."""
    images, counts = (np.bincount(labels, minlength=len(names)).tolist() for labels in (labels_N, lesions.labels_L))
    classes = {name: {"images": i, "lesions": n} for name, i, n in zip(names, images, counts, strict=True)}
    return {"images": len(labels_N), "lesions": len(lesions.labels_L), "classes": classes}


def _test_images(test: Pool, kept: list[int], most: int, seed: int) -> np.ndarray:
    """Returns the indices of the test images, in order: all photographs of at most `most` lesions of each class."""
    chosen = []
    for c in kept:
        members = np.flatnonzero(test.labels_N == c)
        lesions, lesion_M = np.unique(test.groups_N[members], return_inverse=True)
        drawn = np.random.default_rng([sample_seed(seed, 0), c]).permutation(len(lesions))[:most]
        chosen.append(members[np.isin(lesion_M, drawn)])
    return np.sort(np.concatenate(chosen))
