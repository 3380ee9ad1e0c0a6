"""Streams of labelled image batches from packed shards."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.utils.data import default_collate

from hpc import dist
from hpc.data.order import SampleOrder, sample_seed
from hpc.data.shards import BadSample, ShardReader, Source, evaluation_batches, loader, training_batches
from lesiongen.data import images
from lesiongen.data.augment import AugmentConfig, augment, centre
from lesiongen.data.balance import StreamConfig, order_for
from lesiongen.data.packed import Packed


class ImageShards:
    """One split of packed sets."""

    def __init__(self, packed: Packed, split: str):
        self.packed, self.split = packed, split
        self.size, self.channels, self.classes = packed.size, packed.channels, packed.classes
        self.label_of = {name: i for i, name in enumerate(self.classes)}
        self.sets, self.entries = zip(*packed.entries(split), strict=True)
        self.counts = tuple(s["count"] for s in self.entries)

    def __len__(self) -> int:
        return sum(self.counts)

    def reader(self) -> ShardReader:
        return ShardReader([(self.packed.stores[i], s) for i, s in zip(self.sets, self.entries, strict=True)])

    def image(self, raw: dict) -> tuple[torch.Tensor, dict]:
        """Pixels as packed, uint8 [C, H, W], and the facts beside them. Raises BadSample."""
        try:
            content = raw["jpg"] if "jpg" in raw else raw["png"]
            return images.pixels(content, self.channels), json.loads(raw["json"])
        except (images.BadImage, ValueError, KeyError) as error:
            raise BadSample(f"{raw.get('__key__')}: {error}") from None

    def train(
        self,
        position: int,
        batch: int,
        micro: int,
        config: AugmentConfig,
        seed: int,
        workers: int,
        stream: StreamConfig | None = None,
    ) -> Iterator[dict]:
        """This rank's augmented micro-batches from a global position, for ever (see batch_of())."""
        reader, stream = self.reader(), stream or StreamConfig()
        plan = order_for(self.label_counts(), self.sets, batch, seed, stream, partial(self.member, reader))
        batches = partial(training_batches, position, batch, micro, dist.rank(), dist.world())
        return loader(Source(reader, plan, batches), Decoder(self, config, seed), batch_of, micro, workers)

    def first(self, number: int, batch: int, config: AugmentConfig, seed: int) -> Iterator[dict]:
        """The first `number` samples of the training sequence in one batch, on any rank."""
        plan = SampleOrder(self.counts, batch, seed)
        where = [[(position, position % batch) for position in range(number)]]
        return loader(Source(self.reader(), plan, partial(iter, where)), Decoder(self, config, seed), batch_of, number, 0)

    def label_counts(self) -> list[dict[int, int]]:
        """Images of each label, -1 for none, in each shard."""
        return [{self.label_of.get(c, -1): n for c, n in s["classes"].items()} for s in self.entries]

    def member(self, reader: ShardReader, shard: int, label: int, number: int) -> int:
        """Ordinal of the label's member `number` in a shard, whose own set may number its labels otherwise."""
        own = self.packed.manifests[self.sets[shard]]["classes"]
        return reader.member(shard, own.index(self.classes[label]) if label >= 0 else -1, number)

    def held_out(self, micro: int) -> Iterator[dict]:
        """This rank's share of the split, unaugmented, once, in shard order."""
        plan = SampleOrder(self.counts, batch=1, shuffle=False)
        batches = partial(evaluation_batches, len(self), micro, dist.rank(), dist.world())
        return loader(Source(self.reader(), plan, batches), Decoder(self), batch_of, micro, workers=0)


@dataclass(frozen=True)
class Decoder:
    """Raw sample → view, label and facts; augmented by what only seed and position decide, or the centre."""

    data: ImageShards
    config: AugmentConfig | None = None
    seed: int = 0

    def __call__(self, raw: dict) -> dict:
        image, facts = self.data.image(raw)
        if self.config:
            rng = torch.Generator().manual_seed(sample_seed(self.seed, raw["position"]))
            view = augment(image, self.data.size, self.config, rng)
        else:
            view = centre(image, self.data.size)
        kept = {k: raw[k] for k in ("position", "slot", "shard", "ordinal")}
        label = self.data.label_of.get(facts.get("dx", ""), -1)
        return {**kept, "key": raw["__key__"], "image": view, "label": label, "facts": facts}


def batch_of(samples: list[dict]) -> dict:
    """image uint8 [B, C, H, W]; label [B], -1 for unlabelled; position, slot, shard, ordinal [B]; key, facts, bad lists."""
    numbers = ("label", "position", "slot", "shard", "ordinal")
    return {
        "image": default_collate([s["image"] for s in samples]),  # a worker's directly into shared memory
        **{name: np.array([s[name] for s in samples]) for name in numbers},
        "key": [s["key"] for s in samples],
        "facts": [s["facts"] for s in samples],
        "bad": [b for s in samples for b in s["bad"]],
    }
