"""How like real images the samples are, and whether the tokenizer or the priors cause a difference.

Two models make a sample: the priors draw codes, and the tokenizer's decoder turns the codes into an image. Four comparisons
show which model causes a distance. In each, both sets have the same size and the same mix of classes:

- "floor": real training images against real held-out images. No generator can be expected to be nearer.
- "tokenizer": reconstructions of real training images against real held-out images. The codes are those of real
  images; the difference is what the decoder loses.
- "prior": samples against reconstructions of held-out images. One decoder makes both; the codes differ. If the priors do
  not know the label, a polished decoder is told the labels of the reconstructions alone, which differ by that too.
- "both": samples against real held-out images.

Each comparison is made with every ruler, a network whose features are compared. A ruler that something
was trained against is never the only one.
"""

from dataclasses import dataclass

import numpy as np

from lesiongen.evaluation import distances
from lesiongen.evaluation.image_sets import ImageSet

NUMBER = 1000  # images on each side
CLASS_FROM = 50  # classes with more held-out images are also compared by themselves


@dataclass(frozen=True)
class Selection:
    """The images that are compared. All sets have the same number of images of each class.

    Attributes:
        train, held_out, samples: Indices of images of each set.
        labels: The label of each image. It is the same in the three sets.
    """

    train: np.ndarray
    held_out: np.ndarray
    samples: np.ndarray
    labels: np.ndarray


def select(train: ImageSet, held_out: ImageSet, samples: ImageSet, seed: int, number: int = NUMBER) -> Selection:
    """Draws the images to compare: samples at random, and real images with the same mix of classes.

    Within a class, every image is drawn once before any is drawn twice. Samples of classes that one of the sets lacks are left
    out. If no sample has a label, because the priors were trained without, all images count as one class.

    Args:
        train: The training images.
        held_out: The held-out images.
        samples: The samples.
        seed: Seed of the draws.
        number: Images in each set, at most.
    """
    sets = {"train": train, "held_out": held_out, "samples": samples}
    labels = {name: image_set.labels.numpy() for name, image_set in sets.items()}
    if (labels["samples"] < 0).all():
        labels = {name: np.full_like(values, -1) for name, values in labels.items()}
    common = set.intersection(*(set(np.unique(values).tolist()) for values in labels.values()))
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(np.flatnonzero(np.isin(labels["samples"], sorted(common))))[:number]
    mix = {label: int((labels["samples"][drawn] == label).sum()) for label in sorted(common)}
    chosen = {"samples": np.concatenate([drawn[labels["samples"][drawn] == label] for label in mix] or [drawn])}
    for name in ("train", "held_out"):
        parts = [draw_repeated(np.flatnonzero(labels[name] == label), n, rng) for label, n in mix.items()]
        chosen[name] = np.concatenate(parts or [drawn])
    return Selection(chosen["train"], chosen["held_out"], chosen["samples"], labels["samples"][chosen["samples"]])


def draw_repeated(members: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Draws `number` of the members at random, each once before any twice."""
    rounds = [rng.permutation(members) for _ in range(-(-number // len(members)))]
    return np.concatenate([*rounds, members[:0]])[:number]


def likeness(
    features: dict[str, dict[str, np.ndarray]],
    about: dict[str, str],
    groups: dict[str, np.ndarray],
    labels: np.ndarray,
    alone: list[int],
    classes: list[str],
    seed: int,
) -> dict:
    """Compares samples, reconstructions and real images with every ruler.

    Args:
        features: For each ruler, the features [N, D] of the selected images of "train", "held_out" and "samples", and of
            "reconstructed train" and "reconstructed held_out".
        about: What each ruler is, in words.
        groups: The lesion of each image of "train", "held_out" and "samples", [N].
        labels: The label of each image, [N].
        alone: Labels of the classes that are also compared by themselves.
        classes: Class names in the order of their labels.
        seed: Seed of the draws.

    Returns:
        "number", "mix" {class: images}, and "rulers": {ruler: {"about", "all": {comparison: figures}, "classes": {class:
        {comparison: figures}}}}, with figures as `distances.compare` returns them.
    """
    mix = {classes[label] if label >= 0 else "": int((labels == label).sum()) for label in np.unique(labels).tolist()}
    found: dict = {"number": len(labels), "mix": mix, "rulers": {}}
    for ruler, by_set in features.items():
        found["rulers"][ruler] = {
            "about": about[ruler],
            "all": _comparisons(by_set, groups, labels >= -1, seed),
            "classes": {classes[label]: _comparisons(by_set, groups, labels == label, seed) for label in alone},
        }
    return found


def _comparisons(features: dict[str, np.ndarray], groups: dict[str, np.ndarray], chosen: np.ndarray, seed: int) -> dict:
    """Returns the figures of the four comparisons over the chosen images."""
    pairs = {
        "floor": ("train", "held_out"),
        "tokenizer": ("reconstructed train", "held_out"),
        "prior": ("samples", "reconstructed held_out"),
        "both": ("samples", "held_out"),
    }
    return {
        name: distances.compare(
            features[a][chosen],
            features[b][chosen],
            groups[a.removeprefix("reconstructed ")][chosen],
            groups[b.removeprefix("reconstructed ")][chosen],
            seed,
        )
        for name, (a, b) in pairs.items()
    }
