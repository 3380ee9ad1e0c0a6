"""Images in memory as thumbnails: real ones from shards, samples from their directory."""

import contextlib
import csv
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from hpc.data.shards import BadSample
from hpc.errors import UserError
from hpc.run.progress import bar
from lesiongen.data import images
from lesiongen.data.augment import centre
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.evaluation import classifier


class Pictures:
    """Images in memory as thumbnails, 12 kB each, for figures; read again at full size to be shown.

    images: uint8 [N, C, ≤64, ≤64]; labels: int64 [N], -1 for unlabelled.
    """

    def __init__(self, size: int, channels: int, number: int, what: str):
        self.size, side = size, min(size, classifier.SIDE)
        self.images = torch.empty(number, channels, side, side, dtype=torch.uint8)
        self.labels = torch.full((number,), -1)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, bar(number, what) as progress:
            for first in range(0, number, 256):
                rows = range(first, min(first + 256, number))
                raw = [self.raw(i) for i in rows]  # one reader, one thread; decoding is what takes long
                for i, (image, facts) in zip(rows, pool.map(self._thumbnail, raw), strict=True):
                    self.images[i], self.labels[i] = image, self.note(i, facts)
                progress.update(len(rows))

    def _thumbnail(self, raw) -> tuple[torch.Tensor, dict]:
        image, facts = self.decode(raw)
        return classifier.shrink(image), facts

    def full(self, indices) -> torch.Tensor:
        """uint8 [B, C, size, size]."""
        return torch.stack([self.decode(self.raw(int(i)))[0] for i in indices])


class Real(Pictures):
    """Splits of the shards, unaugmented, in their order, whole on this rank."""

    def __init__(self, shards: Packed, names: list[str]):
        self.sets = [ImageShards(shards, name) for name in names]
        self.readers = [s.reader() for s in self.sets]
        self.numbers = {c: i for i, c in enumerate(self.sets[0].classes)}
        self.places = [(k, shard, i) for k, s in enumerate(self.sets) for shard, n in enumerate(s.counts) for i in range(n)]
        self.groups: dict[str, str] = {}  # group: split
        super().__init__(self.sets[0].size, self.sets[0].channels, len(self.places), f"read {' + '.join(names)}")

    def raw(self, i: int) -> tuple[int, dict]:
        k, shard, ordinal = self.places[i]
        with self._sound(k):
            return k, self.readers[k].read(shard, ordinal)

    def decode(self, raw: tuple[int, dict]) -> tuple[torch.Tensor, dict]:
        k, sample = raw
        with self._sound(k):
            image, facts = self.sets[k].image(sample)
        return centre(image, self.size), facts

    @contextlib.contextmanager
    def _sound(self, k: int):
        try:
            yield
        except BadSample as error:
            where = self.sets[k].packed.name
            raise UserError(f"The shards in {where} are damaged: {error}. See `lesiongen verify`.") from None

    def note(self, i: int, facts: dict) -> int:
        group = facts["group"]
        split = self.sets[self.places[i][0]].split
        refuse_shared({group: split}, self.groups)
        self.groups[group] = split
        return self.numbers.get(facts.get("dx", ""), -1)


def refuse_shared(a: dict[str, str], b: dict[str, str]) -> None:
    """Raises UserError for a lesion that is in two splits: no figure on held-out images would mean anything then."""
    for group in a.keys() & b.keys():
        if a[group] != b[group]:
            raise UserError(
                f"Lesion '{group}' is in two splits, {a[group]} and {b[group]}: pack the images again (--fresh shards)."
            )


class Samples(Pictures):
    """What the sample stage wrote, in the order of its table."""

    def __init__(self, folder: Path, classes: list[str], size: int, channels: int):
        self.folder, self.channels = folder, channels
        with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
            self.rows = list(csv.DictReader(file))
        self.numbers = {c: i for i, c in enumerate(classes)}
        super().__init__(size, channels, len(self.rows), "read samples")

    def raw(self, i: int) -> dict:
        return self.rows[i]

    def decode(self, raw: dict) -> tuple[torch.Tensor, dict]:
        try:
            image = images.read(self.folder / raw["file"], self.channels)
        except (OSError, images.BadImage) as error:
            path = self.folder / raw["file"]
            raise UserError(f"{path} cannot be read ({error}). Sample again (--fresh samples).") from None
        return centre(images.to_tensor(image), self.size), raw

    def note(self, i: int, facts: dict) -> int:
        return self.numbers.get(facts["label"], -1)
