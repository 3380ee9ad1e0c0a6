"""The training sets of the utility test: which real images, samples and augmented views a classifier is trained on.

Every seed orders the real images and the samples of each class at random. A training set takes the first ones of each class, so
the set of 10 real images per class is part of the set of 30 of the same seed, and the arms of a seed share their real images.
What the classifier reads of an image is read once, for all seeds and sizes together: memory grows with the settings of the test
and not with the number of training images.

Shapes: N images of a pool, M images that are read, B images of a batch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from hpc.data.order import sample_seed
from lesiongen.data.augment import AugmentConfig, augment

CLASSICAL = AugmentConfig(crop=0.85, dihedral=True, brightness=0.1, contrast=0.1)  # the views of the arm "augmented"
VIEW_BITS = 20  # bits for the number of an image's view

# Maps indices of training images [M] and the number of a view of each to the items of these views.
Views = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Pool(NamedTuple):
    """Images that can be drawn, and how to read what a classifier is trained on.

    Attributes:
        labels_N: The class of each image; -1 for unlabelled images, which are never drawn.
        groups_N: The lesion of each image, integers or strings. Samples have a number of their own each.
        items: Maps indices [M], in ascending order, to what the classifier reads of these images, an array [M, …]: features, or
            for fine-tuning anything by which the classifier finds the images, such as their indices.
    """

    labels_N: np.ndarray
    groups_N: np.ndarray
    items: Callable[[np.ndarray], np.ndarray]


class _Draw(NamedTuple):
    """What one seed may use: for each class, indices into a pool, in random order.

    Attributes:
        real: Training images of each class; photographs of other lesions come before second photographs of a lesion.
        samples: Samples of each class.
    """

    real: list[np.ndarray]
    samples: list[np.ndarray]


class TrainingSets:
    """The training sets of every arm, size and seed.

    Attributes:
        sizes: Real images per class. A size that would give the same sets as the size before is left out.
    """

    def __init__(
        self,
        real: Pool,
        views: Views,
        samples: Pool,
        kept: Sequence[int],
        sizes: Sequence[int],
        dose: float,
        most_samples: int,
        seeds: Sequence[int],
    ):
        """Draws the images of every seed and reads what the classifier needs of them.

        Args:
            real: The training split.
            views: Reads augmented views of training images.
            samples: The samples.
            kept: The labels that are used; each has real images and samples. The sets number them from 0.
            sizes: Real images per class, rising.
            dose: Samples, or views, that are added for each real image.
            most_samples: Samples of a class that a seed may use, at most.
            seeds: A seed for each repetition.
        """
        most = max(int((real.labels_N == c).sum()) for c in kept)
        self.sizes = [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < most]
        self._dose = dose
        self._draws = [_draw(real, samples, kept, self.sizes[-1], most_samples, seed) for seed in seeds]
        self._real = _Read.all([i for draw in self._draws for i in draw.real], real.items)
        self._samples = _Read.all([i for draw in self._draws for i in draw.samples], samples.items)
        # A view is known by one number: its image and, in the lowest bits, the number of the view.
        pairs = [self._views_of(draw, size) for draw in self._draws for size in self.sizes]
        self._views = _Read.all(pairs, lambda keys: views(keys >> VIEW_BITS, keys & (1 << VIEW_BITS) - 1))

    def get(self, arm: str, size: int, repetition: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a training set.

        Args:
            arm: "real", "augmented", "mixed", or "synthetic", which takes all samples.
            size: Real images per class; has no effect on "synthetic".
            repetition: Index of the seed.

        Returns:
            The items [M, …] and the labels [M], from 0.
        """
        draw = self._draws[repetition]
        if arm == "synthetic":
            return self._samples.get(np.concatenate(draw.samples)), _labels([len(i) for i in draw.samples])
        real = [indices[:size] for indices in draw.real]
        items, labels = self._real.get(np.concatenate(real)), _labels([len(i) for i in real])
        if arm == "real":
            return items, labels
        added = self._added(draw, size)
        if arm == "augmented":
            more = self._views.get(self._views_of(draw, size))
        else:
            more = self._samples.get(np.concatenate([i[:n] for i, n in zip(draw.samples, added, strict=True)]))
        return np.concatenate([items, more]), np.concatenate([labels, _labels(added)])

    def _added(self, draw: _Draw, size: int) -> list[int]:
        """Returns for each class how many samples, or as many views, are added to `size` real images."""
        real = [min(size, len(indices)) for indices in draw.real]
        return [min(max(1, round(self._dose * n)), len(i)) for n, i in zip(real, draw.samples, strict=True)]

    def _views_of(self, draw: _Draw, size: int) -> np.ndarray:
        """Returns the keys of the views that are added, class by class. Each image gives a view before any gives two."""
        keys = []
        for indices, added in zip(draw.real, self._added(draw, size), strict=True):
            number, position = np.divmod(np.arange(added), min(size, len(indices)))
            keys.append(indices[position] << VIEW_BITS | number)
        return np.concatenate(keys)


class _Read(NamedTuple):
    """What the classifier reads of some images: their keys, ascending, and an item for each key."""

    keys_M: np.ndarray
    items_M: np.ndarray

    @classmethod
    def all(cls, keys: list[np.ndarray], read: Callable[[np.ndarray], np.ndarray]) -> "_Read":
        """Reads each image once, in ascending order of the keys."""
        unique = np.unique(np.concatenate(keys))
        return cls(unique, read(unique))

    def get(self, keys: np.ndarray) -> np.ndarray:
        """Returns the items of images in the order of `keys`."""
        return self.items_M[np.searchsorted(self.keys_M, keys)]


def _labels(counts: Sequence[int]) -> np.ndarray:
    """Returns each class's number as often as it has images, class by class."""
    return np.repeat(np.arange(len(counts)), counts)


def _draw(real: Pool, samples: Pool, kept: Sequence[int], largest: int, most_samples: int, seed: int) -> _Draw:
    """Draws the real images and the samples of one seed."""
    drawn = _Draw([], [])
    for c in kept:
        rng = np.random.default_rng([seed, c])
        members = np.flatnonzero(real.labels_N == c)
        drawn.real.append(lesions_first(members, real.groups_N[members], rng)[:largest])
        drawn.samples.append(rng.permutation(np.flatnonzero(samples.labels_N == c))[:most_samples])
    return drawn


def lesions_first(indices_M: np.ndarray, groups_M: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shuffles images so that one photograph of each lesion comes first, then second photographs, and so on.

    Args:
        indices_M: The images.
        groups_M: The lesion of each.
        rng: Source of the order.

    Returns:
        The same images in the new order. Any beginning of it has two photographs of a lesion only if it has all lesions.
    """
    shuffled = rng.permutation(len(indices_M))
    _, lesion_M = np.unique(groups_M[shuffled], return_inverse=True)
    by_lesion = np.argsort(lesion_M, kind="stable")
    firsts = np.searchsorted(lesion_M[by_lesion], lesion_M[by_lesion])
    photograph_M = np.empty(len(shuffled), np.int64)  # 0 for the first photograph of a lesion in the shuffled order
    photograph_M[by_lesion] = np.arange(len(shuffled)) - firsts
    return indices_M[shuffled[np.argsort(photograph_M, kind="stable")]]


def classical_views(images_BCHW: torch.Tensor, indices_B: np.ndarray, views_B: np.ndarray, seed: int) -> torch.Tensor:
    """Makes classically augmented views of real images: symmetries, small crops, brightness and contrast.

    A view depends on its image's index, the number of the view and the seed, and not on the batch.

    Args:
        images_BCHW: Square images, uint8.
        indices_B: Index of each image in the training split.
        views_B: Number of each image's view, from 0.
        seed: Seed of the views.

    Returns:
        The views, uint8 [B, C, H, W].
    """
    out = []
    for image, index, view in zip(images_BCHW, indices_B.tolist(), views_B.tolist(), strict=True):
        rng = torch.Generator().manual_seed(sample_seed(sample_seed(seed, view), index))
        out.append(augment(image, image.shape[-1], CLASSICAL, rng))
    return torch.stack(out) if out else images_BCHW.clone()
