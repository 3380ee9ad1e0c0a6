"""Sets of images for the evaluate stage: real images from shards, and samples from their directory.

A set holds thumbnails of all its images in memory, 12 kB each, for the metrics. Images for the report are read again at full
size.
"""

import contextlib
import csv
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from hpc.data.shards import BadSample
from hpc.errors import UserError
from hpc.run.progress import progress_bar
from lesiongen.data import images
from lesiongen.data.augment import centre
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.evaluation import classifier


class ImageSet(ABC):
    """A set of images with labels. A subclass sets its own attributes first and then calls __init__, which reads all images.

    Attributes:
        size: Side of the images at full size, in pixels.
        images: Thumbnails, uint8 [N, C, h, w], at most 64 px.
        labels: Labels, int64 [N]; -1 for unlabelled images.
    """

    def __init__(self, size: int, channels: int, number: int, what: str):
        """Reads all images.

        Args:
            size: Side of the images at full size, in pixels.
            channels: 1 or 3.
            number: Number of images.
            what: Text of the progress bar.
        """
        self.size, side = size, min(size, classifier.SIDE)
        self.images = torch.empty(number, channels, side, side, dtype=torch.uint8)
        self.labels = torch.full((number,), -1)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, progress_bar(number, what) as progress:
            for first in range(0, number, 256):
                rows = range(first, min(first + 256, number))
                raw = [self.raw(i) for i in rows]  # a shard reader serves one thread; decoding, which takes longer, is shared
                for i, (image, facts) in zip(rows, pool.map(self._thumbnail, raw), strict=True):
                    self.images[i], self.labels[i] = image, self.label(i, facts)
                progress.update(len(rows))

    @abstractmethod
    def raw(self, i: int) -> Any:
        """Reads what decode() needs of image i. Called from one thread."""

    @abstractmethod
    def decode(self, raw: Any) -> tuple[torch.Tensor, dict]:
        """Decodes an image. Called from several threads.

        Args:
            raw: What raw() returned.

        Returns:
            The image, uint8 [C, size, size], and its facts.
        """

    @abstractmethod
    def label(self, i: int, facts: dict) -> int:
        """Returns the label of image i, or -1. Called once for each image, in order."""

    def _thumbnail(self, raw: Any) -> tuple[torch.Tensor, dict]:
        image, facts = self.decode(raw)
        return classifier.shrink(image), facts

    def full(self, indices: Iterable[int | torch.Tensor]) -> torch.Tensor:
        """Reads images again at full size, uint8 [B, C, size, size]."""
        return torch.stack([self.decode(self.raw(int(i)))[0] for i in indices])


class RealImages(ImageSet):
    """All images of one or more splits, unaugmented, in the order of the shards.

    Attributes:
        groups: The split of each group. A group is a lesion, or the images that are kept together with it.
    """

    def __init__(self, shards: Packed, names: list[str]):
        """Reads the splits `names` of the shards. Raises UserError for damaged shards, or a group in two splits."""
        self.splits = [ImageShards(shards, name) for name in names]
        self.readers = [split.reader() for split in self.splits]
        self.label_numbers = {name: label for label, name in enumerate(self.splits[0].classes)}
        self.positions = [
            (k, shard, ordinal)
            for k, split in enumerate(self.splits)
            for shard, count in enumerate(split.counts)
            for ordinal in range(count)
        ]
        self.groups: dict[str, str] = {}
        first = self.splits[0]
        super().__init__(first.size, first.channels, len(self.positions), f"read {' + '.join(names)}")

    def raw(self, i: int) -> tuple[int, dict]:
        """Reads the members of image i from its shard. Returns the index of its split, and the members."""
        k, shard, ordinal = self.positions[i]
        with self._damage_reported(k):
            return k, self.readers[k].read(shard, ordinal)

    def decode(self, raw: tuple[int, dict]) -> tuple[torch.Tensor, dict]:
        """Decodes an image from its members."""
        k, members = raw
        with self._damage_reported(k):
            image, facts = self.splits[k].image(members)
        return centre(image, self.size), facts

    @contextlib.contextmanager
    def _damage_reported(self, k: int) -> Iterator[None]:
        """Raises UserError that names the shards, in place of BadSample."""
        try:
            yield
        except BadSample as error:
            name = self.splits[k].packed.name
            raise UserError(f"The shards in {name} are damaged: {error}. See `lesiongen verify`.") from None

    def label(self, i: int, facts: dict) -> int:
        """Returns the label of image i, and records the split of its group."""
        group = facts["group"]
        split = self.splits[self.positions[i][0]].split
        refuse_shared({group: split}, self.groups)
        self.groups[group] = split
        return self.label_numbers.get(facts.get("dx", ""), -1)


def refuse_shared(a: dict[str, str], b: dict[str, str]) -> None:
    """Raises UserError if a group is in two splits: metrics on held-out images would then be meaningless.

    Args:
        a: Group → split.
        b: Group → split, of other images.
    """
    for group in a.keys() & b.keys():
        if a[group] != b[group]:
            raise UserError(
                f"Lesion '{group}' is in two splits, {a[group]} and {b[group]}. Pack the images again (--fresh shards)."
            )


class SampleImages(ImageSet):
    """The samples of the sample stage.

    Attributes:
        rows: The rows of metadata.csv, in order.
    """

    def __init__(self, folder: Path, classes: list[str], size: int, channels: int):
        """Reads all samples. Raises UserError for one that cannot be read.

        Args:
            folder: Directory of the samples.
            classes: Class names of the real images, which number the labels.
            size: Side of the images, in pixels.
            channels: 1 or 3.
        """
        self.folder, self.channels = folder, channels
        with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
            self.rows = list(csv.DictReader(file))
        self.label_numbers = {name: label for label, name in enumerate(classes)}
        super().__init__(size, channels, len(self.rows), "read samples")

    def raw(self, i: int) -> dict:
        """Returns the row of sample i in metadata.csv."""
        return self.rows[i]

    def decode(self, raw: dict) -> tuple[torch.Tensor, dict]:
        """Reads and decodes the file that a row names."""
        path = self.folder / raw["file"]
        try:
            image = images.read(path, self.channels)
        except (OSError, images.BadImage) as error:
            raise UserError(f"{path} cannot be read ({error}). Sample again (--fresh samples).") from None
        return centre(images.to_tensor(image), self.size), raw

    def label(self, i: int, facts: dict) -> int:
        """Returns the label of sample i."""
        return self.label_numbers.get(facts["label"], -1)
