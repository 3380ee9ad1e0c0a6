"""Sets of images that the evaluation compares: real images from shards, and samples from their directory.

A set knows the label and the lesion of each of its images and reads images when they are asked for, so its memory does not grow
with the size of the images. Of a real image it keeps about 20 bytes.
"""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc.data.shards import BadSample
from hpc.errors import UserError
from lesiongen.data import images
from lesiongen.data.augment import centre
from lesiongen.data.packed import Packed, name_number
from lesiongen.data.stream import ImageShards
from lesiongen.data.tables import read_csv
from lesiongen.evaluation import feature_cache
from lesiongen.evaluation.feature_cache import Source

BATCH = 64  # images that are read at once


class ImageSet(ABC):
    """A set of images with labels.

    Attributes:
        size: Side of the images, in pixels.
        labels: Labels, int64 [N]; -1 for unlabelled images.
        groups: The lesion of each image, int64 [N]. Equal numbers mean one lesion.
    """

    size: int
    labels: torch.Tensor
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def raw(self, i: int) -> Any:
        """Reads what decode() needs of image i. Called from one thread."""

    @abstractmethod
    def decode(self, raw: Any) -> torch.Tensor:
        """Decodes what raw() returned to an image, uint8 [C, size, size]. Called from several threads."""

    def images(self, indices: Sequence[int] | torch.Tensor | np.ndarray) -> torch.Tensor:
        """Reads images, uint8 [B, C, size, size]."""
        raw = [self.raw(int(i)) for i in indices]  # a shard reader serves one thread; decoding, which takes longer, is shared
        return torch.stack(list(self._threads.map(self.decode, raw)))

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        """The threads that decode."""
        return ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def batches(self, indices: Sequence[int] | torch.Tensor | np.ndarray) -> Iterator[torch.Tensor]:
        """Reads images batch by batch, uint8 [B, C, size, size]."""
        for first in range(0, len(indices), BATCH):
            yield self.images(indices[first : first + BATCH])


class RealImages(ImageSet):
    """All images of some splits, unaugmented, in the order of the shards.

    Attributes:
        name: Names of the splits, for progress bars.
        splits: The splits.
        rows: Index of the split, shard and ordinal of each image, int32 [N, 3].
        classes: The labels' names.
    """

    def __init__(self, shards: Packed, names: Sequence[str]):
        """Reads labels and groups of the splits `names` from the catalogs of the shards."""
        self.splits = [ImageShards(shards, name) for name in names]
        self.readers = [split.reader() for split in self.splits]
        self.name, self.size, self.channels = " + ".join(names), shards.size, shards.channels
        self.classes = shards.classes
        counts = [(k, shard, count) for k, split in enumerate(self.splits) for shard, count in enumerate(split.counts)]
        blocks = [np.array([(k, shard, ordinal) for ordinal in range(count)], np.int32) for k, shard, count in counts]
        self.rows = np.concatenate(blocks) if blocks else np.empty((0, 3), np.int32)
        starts = np.concatenate([[0], np.cumsum([count for *_, count in counts])])
        begin = {(k, shard): int(start) for (k, shard, _), start in zip(counts, starts, strict=False)}
        self._read_catalogs(shards, begin)

    def _read_catalogs(self, shards: Packed, begin: dict[tuple[int, int], int]) -> None:
        """Fills labels and groups. `begin` is the index of the first image of each (split, shard)."""
        label_of = {name: label for label, name in enumerate(shards.classes)}
        number_of = {
            (self.splits[k].sets[shard], self.splits[k].entries[shard]["name"]): first for (k, shard), first in begin.items()
        }
        labels, self.groups = np.full(len(self.rows), -1), np.zeros(len(self.rows), np.int64)
        for number, row in shards.numbered_catalog():
            first = number_of.get((number, row["shard"]))
            if first is not None:
                labels[first + int(row["ordinal"])] = label_of.get(row["dx"], -1)
                self.groups[first + int(row["ordinal"])] = name_number(row["group"])
        self.labels = torch.from_numpy(labels)

    def label_names(self, indices: np.ndarray) -> list[str]:
        """Returns the names of some images' labels; "" for unlabelled images."""
        names = [*self.classes, ""]  # label -1 is the last
        return [names[label] for label in self.labels[torch.from_numpy(indices)].tolist()]

    def raw(self, i: int) -> tuple[int, dict]:
        """Reads the members of image i from its shard. Returns the index of its split, and the members."""
        k, shard, ordinal = self.rows[i].tolist()
        with self._damage_reported(k):
            return k, self.readers[k].read(shard, ordinal)

    def decode(self, raw: tuple[int, dict]) -> torch.Tensor:
        """Decodes an image from its members."""
        k, members = raw
        with self._damage_reported(k):
            return centre(self.splits[k].image(members)[0], self.size)

    @contextlib.contextmanager
    def _damage_reported(self, k: int) -> Iterator[None]:
        """Raises UserError that names the shards, in place of BadSample."""
        try:
            yield
        except BadSample as error:
            name = self.splits[k].packed.name
            raise UserError(f"The shards in {name} are damaged: {error}. See `lesiongen verify`.") from None

    def in_split(self, name: str) -> np.ndarray:
        """Returns which images are in a split, bool [N]."""
        return np.isin(self.rows[:, 0], [k for k, split in enumerate(self.splits) if split.split == name])

    def groups_by_shard(self) -> dict[str, list[np.ndarray]]:
        """Returns the lesions of each split's images, an array [S] for each shard, as the code store numbers the shards."""
        found, first = {}, 0
        for split in self.splits:
            ends = first + np.cumsum(split.counts)
            found[split.split] = np.split(self.groups[first : ends[-1]], ends[:-1] - first)
            first = int(ends[-1])
        return found

    def sources(self, locations: Sequence[str | Path], run: Path) -> tuple[list[Path], list[Source]]:
        """Returns the shards as sources for the feature cache, in the order of the images, and the folder for each.

        Args:
            locations: Directory or URL of each packed set. The cache lies in the directory.
            run: Directory for the cache of sets that cannot be written.
        """
        folders, sources, first = [], [], 0
        for split in self.splits:
            for shard, (number, entry) in enumerate(zip(split.sets, split.entries, strict=True)):
                indices = range(first, first + split.counts[shard])
                name, checksum = f"{split.split}-{shard:06d}", f"{entry['crc32']:08x}"
                sources.append(Source(name, checksum, len(indices), partial(self.batches, indices)))
                folders.append(feature_cache.cache_folder(locations[number], run))
                first = indices.stop
        return folders, sources


def refuse_shared(a: RealImages, b: RealImages) -> None:
    """Raises UserError if a lesion is in both sets: figures on held-out images would then be meaningless."""
    if len(shared := np.intersect1d(a.groups, b.groups)):
        first = int(np.flatnonzero(np.isin(a.groups, shared))[0])
        k, shard, ordinal = a.rows[first].tolist()
        image = f"{a.splits[k].entries[shard]['name']}[{ordinal}]"
        raise UserError(
            f"{len(shared)} lesions are in the training split and in a held-out split, such as that of {image}. Pack the "
            "images again (--fresh shards)."
        )


class SampleImages(ImageSet):
    """The samples of the sample stage.

    Attributes:
        rows: The rows of metadata.csv, in order.
    """

    def __init__(self, folder: Path, classes: list[str], size: int, channels: int):
        """Reads the table of the samples.

        Args:
            folder: Directory of the samples.
            classes: Class names of the real images, which number the labels.
            size: Side of the images, in pixels.
            channels: 1 or 3.
        """
        self.folder, self.size, self.channels = folder, size, channels
        self.rows = read_csv(folder / "metadata.csv")
        label_of = {name: label for label, name in enumerate(classes)}
        self.labels = torch.tensor([label_of.get(row["label"], -1) for row in self.rows], dtype=torch.int64)
        self.groups = np.arange(len(self.rows))

    def raw(self, i: int) -> Path:
        """Returns the path of sample i."""
        return self.folder / self.rows[i]["file"]

    def decode(self, raw: Path) -> torch.Tensor:
        """Reads and decodes a file. Raises UserError if it cannot be read."""
        try:
            image = images.read(raw, self.channels)
        except (OSError, images.BadImage) as error:
            raise UserError(f"{raw} cannot be read ({error}). Sample again (--fresh samples).") from None
        return centre(images.to_tensor(image), self.size)


class ArrayImages(ImageSet):
    """Images that are in memory already."""

    def __init__(self, images_NCHW: torch.Tensor, labels_N: torch.Tensor):
        """Keeps the images, uint8, and their labels."""
        self.pixels, self.labels, self.size = images_NCHW, labels_N, images_NCHW.shape[-1]
        self.groups = np.arange(len(images_NCHW))

    def raw(self, i: int) -> torch.Tensor:
        """Returns image i."""
        return self.pixels[i]

    def decode(self, raw: torch.Tensor) -> torch.Tensor:
        """Returns the image unchanged."""
        return raw
