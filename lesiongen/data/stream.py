"""Read packed shards as streams of labelled image batches.

A training stream is endless, augmented, and follows the sample order of lesiongen/data/balance.py. A held-out stream reads a
split once, unaugmented. A batch of a training stream depends only on the config, the seed and the position, not on the number
of ranks or data workers. Batches go to the stages tokenizer and polish and to the evaluation; encode reads single images.

- Position: index in the training sequence. Slot: index in the global batch. Ordinal: index of an image in its shard.
- Set: one of the packed sets that are read as one.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.utils.data import default_collate

from hpc import dist
from hpc.data.order import MixtureOrder, SampleOrder, sample_seed
from hpc.data.shards import BadSample, ShardReader, Source, evaluation_batches, loader, training_batches
from lesiongen.data import images
from lesiongen.data.augment import AugmentConfig, augment, centre
from lesiongen.data.balance import StreamConfig, order_for
from lesiongen.data.device_augment import random_row
from lesiongen.data.packed import Packed


class ImageShards:
    """One split of the packed sets.

    Attributes:
        packed: The sets.
        split: Name of the split.
        size: Side of the views, in pixels.
        channels: Colour channels, 3 or 1.
        classes: Class names; a label is an index into them.
        label_index: The label of each class name.
        sets: For each shard, the index of its set.
        entries: For each shard, its entry in the manifest of its set.
        counts: For each shard, its number of images.
    """

    def __init__(self, packed: Packed, split: str):
        """Lists the split's shards; opens none of them.

        Raises:
            UserError: No set has the split.
        """
        self.packed, self.split = packed, split
        self.size, self.channels, self.classes = packed.size, packed.channels, packed.classes
        self.label_index = {name: i for i, name in enumerate(self.classes)}
        self.sets, self.entries = zip(*packed.entries(split), strict=True)
        self.counts = tuple(entry["count"] for entry in self.entries)

    def __len__(self) -> int:
        return sum(self.counts)

    def reader(self) -> ShardReader:
        """Returns a new reader of the split's shards. Each process needs its own."""
        return ShardReader([(self.packed.stores[i], entry) for i, entry in zip(self.sets, self.entries, strict=True)])

    def image(self, raw: dict) -> tuple[torch.Tensor, dict]:
        """Decodes a raw sample from the reader.

        Returns:
            The image as it was packed, uint8 [C, H, W], and its facts.

        Raises:
            BadSample: The sample cannot be decoded.
        """
        try:
            content = raw["jpg"] if "jpg" in raw else raw["png"]
            return images.decode_tensor(content, self.channels), json.loads(raw["json"])
        except (images.BadImage, ValueError, KeyError) as error:
            raise BadSample(f"{raw.get('__key__')}: {error}") from None

    def label(self, facts: dict) -> int:
        """Returns the label of an image; -1 for an unlabelled one."""
        return self.label_index.get(facts.get("dx", ""), -1)

    def train(
        self,
        position: int,
        batch: int,
        micro_batch: int,
        config: AugmentConfig,
        seed: int,
        workers: int,
        stream: StreamConfig | None = None,
        on_device: bool = False,
    ) -> Iterator[dict]:
        """Yields this rank's augmented micro-batches, without end.

        Args:
            position: Global position to start from, a multiple of `batch`.
            batch: Global batch size.
            micro_batch: Images in each micro-batch.
            config: The augmentation.
            seed: Seed of the sample order and of the augmentation.
            workers: Data workers; 0 = this process decodes.
            stream: Balance of the classes and weights of the sets; None for the defaults.
            on_device: Leave the augmentation to augment_batch() of lesiongen/data/device_augment.py.

        Yields:
            Batches as `collate` describes them, with tensors instead of arrays.

        Raises:
            UserError: `stream` does not fit the batch or the sets.
        """
        reader = self.reader()
        order = self.order(reader, batch, seed, stream)
        batches = partial(training_batches, position, batch, micro_batch, dist.rank(), dist.world_size())
        decoder = Decoder(self, config, seed, on_device)
        return loader(Source(reader, order, batches), decoder, collate, micro_batch, workers)

    def order(self, reader: ShardReader, batch: int, seed: int, stream: StreamConfig | None) -> SampleOrder | MixtureOrder:
        """Returns the order of the training sequence. Arguments as for train(); `reader` reads the shards' indices."""
        return order_for(self.label_counts(), self.sets, batch, seed, stream or StreamConfig(), partial(self.member, reader))

    def first(self, number: int, batch: int, config: AugmentConfig, seed: int) -> Iterator[dict]:
        """Yields one batch with the first images of the training sequence (without balance or weights), the same on every rank.

        Args:
            number: Images in the batch.
            batch: Global batch size of the training.
            config: The augmentation.
            seed: Seed of the sample order and of the augmentation.
        """
        order = SampleOrder(self.counts, batch, seed)
        batches = [[(position, position % batch) for position in range(number)]]
        return loader(Source(self.reader(), order, partial(iter, batches)), Decoder(self, config, seed), collate, number, 0)

    def label_counts(self) -> list[dict[int, int]]:
        """Returns, for each shard, the number of images of each label; label -1 stands for unlabelled images."""
        return [{self.label_index.get(c, -1): n for c, n in entry["classes"].items()} for entry in self.entries]

    def member(self, reader: ShardReader, shard: int, label: int, number: int) -> int:
        """Returns the ordinal in a shard of a label's image number `number`, counted from 0.

        The shard's index holds labels as the shard's own set numbers its classes, so the label is translated first.

        Args:
            reader: Reads the shard's index.
            shard: The shard.
            label: The label; -1 for unlabelled images.
            number: Which of the images with this label.

        Raises:
            BadSample: The shard holds fewer images with this label.
        """
        classes = self.packed.manifests[self.sets[shard]]["classes"]
        return reader.member(shard, classes.index(self.classes[label]) if label >= 0 else -1, number)

    def held_out(self, micro_batch: int) -> Iterator[dict]:
        """Yields this rank's share of the split once, in the order of the shards, unaugmented.

        Args:
            micro_batch: Images in each batch; the last batch may be smaller.

        Yields:
            Batches as `collate` describes them, with tensors instead of arrays. Here, position and slot are the indices of an
            image in the split and in the batch.
        """
        order = SampleOrder(self.counts, batch=1, shuffle=False)
        batches = partial(evaluation_batches, len(self), micro_batch, dist.rank(), dist.world_size())
        return loader(Source(self.reader(), order, batches), Decoder(self), collate, micro_batch, workers=0)


@dataclass(frozen=True)
class Decoder:
    """Decodes a raw sample and makes a view of it. Data workers call it; loader() sends it to them.

    Attributes:
        data: The split that the sample is from.
        config: The augmentation; None for the unaugmented, central view.
        seed: Together with the position, decides every random number of the view.
        on_device: Return the whole image and what augment_batch() needs to know of the view, instead of the view.
    """

    data: ImageShards
    config: AugmentConfig | None = None
    seed: int = 0
    on_device: bool = False

    def __call__(self, raw: dict) -> dict:
        """Returns a sample for `collate`. Raises BadSample."""
        image, facts = self.data.image(raw)
        sample = {k: raw[k] for k in ("position", "slot", "shard", "ordinal")}
        if self.on_device:
            sample["view"] = random_row(self.config, self.seed, raw["position"], self.data.size, *image.shape[1:])
            view = image
        elif self.config:
            rng = torch.Generator().manual_seed(sample_seed(self.seed, raw["position"]))
            view = augment(image, self.data.size, self.config, rng)
        else:
            view = centre(image, self.data.size)
        return {**sample, "key": raw["__key__"], "image": view, "label": self.data.label(facts), "facts": facts}


def collate(samples: list[dict]) -> dict:
    """Collates decoded samples to a batch.

    Returns:
        image: tensor uint8 [B, C, H, W]. Whole images of several sizes are padded at the bottom and the right.
        view: array [B, V], rows for augment_batch(); only if the augmentation is left to the device.
        label: array [B], -1 for unlabelled images.
        position, slot, shard, ordinal: arrays [B].
        key: list of the images' keys in their shards.
        facts: list of the images' facts, as dicts.
        bad: list of {"position", "error"} of samples that could not be read and were replaced.
    """
    numbers = ("label", "position", "slot", "shard", "ordinal")
    views = {"view": np.array([s["view"] for s in samples], np.float32)} if "view" in samples[0] else {}
    return {
        # In a data worker, default_collate stacks directly into shared memory.
        "image": default_collate(images.pad_to_one_size([s["image"] for s in samples])),
        **views,
        **{name: np.array([s[name] for s in samples]) for name in numbers},
        "key": [s["key"] for s in samples],
        "facts": [s["facts"] for s in samples],
        "bad": [b for s in samples for b in s["bad"]],
    }
