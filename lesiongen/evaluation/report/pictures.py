"""Pictures of the images of a run: strips of each class, and samples beside the training views that they are nearest to."""

from collections.abc import Iterator

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from hpc.data.codestore import CodeStore
from lesiongen.data import images
from lesiongen.data.augment import dihedral
from lesiongen.evaluation.image_sets import ImageSet
from lesiongen.evaluation.privacy.copies import Copies
from lesiongen.evaluation.reconstructions import decode
from lesiongen.evaluation.report.privacy import NearestPair
from lesiongen.evaluation.report.samples import Strips
from lesiongen.tokenizers.tokenizer import Tokenizer

TILES = 8  # images in a strip, and pairs
SIDE = 128  # of the images, at most, in pixels


def strips(samples: ImageSet, train: ImageSet, classes: list[str]) -> Strips:
    """Returns a strip of samples and one of training images for each class. If no sample has a label, one pair for all.

    Args:
        samples: The samples.
        train: The training images.
        classes: Class names in the order of their labels.
    """
    found = {name: (_strip(samples, label), _strip(train, label)) for label, name in enumerate(classes)}
    if not any(strip is not None for strip, _ in found.values()):
        found = {"": (_strip(samples, None), _strip(train, None))}
    return found


def _strip(image_set: ImageSet, label: int | None) -> torch.Tensor | None:
    """Returns the first images of a class in one row, filled up with white, uint8 [C, H, W]. Label None means all images."""
    labels = image_set.labels
    rows = torch.arange(len(labels)) if label is None else torch.nonzero(labels == label).flatten()
    if not len(rows):
        return None
    tiles = shrink(image_set.images(rows[:TILES]))
    blank = torch.full((TILES - len(tiles), *tiles.shape[1:]), 255, dtype=torch.uint8)
    return images.tile_images(torch.cat([tiles, blank]), TILES)


def shrink(images_BCHW: torch.Tensor) -> torch.Tensor:
    """Resizes square images to at most SIDE pixels, with antialiasing."""
    if images_BCHW.shape[-1] <= SIDE:
        return images_BCHW
    return F.resize(images_BCHW, [SIDE, SIDE], antialias=True)


def nearest_pairs(found: Copies, samples: dict[str, np.ndarray], store: CodeStore, net: Tokenizer) -> Iterator[NearestPair]:
    """Yields the samples that are nearest to a training view, each with this view.

    Both are decoded without labels, as they were compared. The closeness of different kinds is compared in multiples of its
    threshold.

    Args:
        found: The nearest training view of each sample, by kind of distance.
        samples: Codes of the samples of each level, [N, h, w].
        store: The code store.
        net: The tokenizer.
    """
    kinds = [kind for kind, threshold in found.thresholds.items() if threshold > 0]
    relative = np.stack([found.samples[kind].closeness / found.thresholds[kind] for kind in kinds])
    for i in relative.min(0).argsort(kind="stable")[:TILES].tolist():
        nearest = found.samples[kinds[int(relative[:, i].argmin())]]
        columns = [f"codes.{level}" for level in samples]
        codes = store.gather_rows("train", nearest.row[i : i + 1], columns, np.int64)
        view = decode(net, {level: codes[f"codes.{level}"] for level in samples}, None)[0]
        sample = decode(net, {level: values[i : i + 1] for level, values in samples.items()}, None)[0]
        distances = {kind: float(found.samples[kind].closeness[i]) for kind in found.samples}
        yield NearestPair(shrink(sample[None])[0], shrink(dihedral(view, int(nearest.form[i]))[None])[0], distances)
