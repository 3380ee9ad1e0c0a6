"""The decoded training images in the memory of the training device, so that a step reads no files and copies no images."""

from collections.abc import Iterator
from itertools import accumulate

import torch

from hpc import dist
from hpc.data.shards import BadSample, training_batches
from hpc.run.progress import progress_bar
from lesiongen.data import images
from lesiongen.data.augment import AugmentConfig
from lesiongen.data.balance import StreamConfig
from lesiongen.data.device_augment import random_row
from lesiongen.data.stream import ImageShards

DEVICE_SHARE = 0.25  # of a GPU's free memory that the images may take
USUAL_ASPECT = 1.5  # width / height of a photograph, to estimate the memory before any image is decoded


class ResidentImages:
    """All images of a training split, uint8, padded to one size, on the device. Each rank holds all of them.

    Attributes:
        data: The split.
        pixels: The images, [N, C, H, W], shard after shard.
        sizes: Height and width of each image.
        keys: The images' keys in their shards.
        labels: The images' labels; -1 for unlabelled images.
    """

    def __init__(self, data: ImageShards, device: torch.device):
        """Decodes the images. Raises BadSample if one cannot be decoded."""
        reader, decoded = data.reader(), []
        self.data, self.keys, self.labels = data, [], []
        with progress_bar(len(data), "decode", shown=dist.rank() == 0) as progress:
            for shard, count in enumerate(data.counts):
                for ordinal in range(count):
                    raw = reader.read(shard, ordinal)
                    image, facts = data.image(raw)
                    decoded.append(image)
                    self.labels.append(data.label(facts))
                    self.keys.append(raw["__key__"])
                progress.update(count)
        self.sizes = [tuple(image.shape[1:]) for image in decoded]
        self._first = [0, *accumulate(data.counts)]
        self.pixels = torch.stack(images.pad_to_one_size(decoded)).to(device)

    def train(
        self, position: int, batch: int, micro_batch: int, config: AugmentConfig, seed: int, stream: StreamConfig | None
    ) -> Iterator[dict]:
        """Yields this rank's micro-batches, without end: which images, and their views for augment_batch().

        The order and the views are those of ImageShards.train(), with the same arguments.

        Yields:
            Dicts with index, label, slot and position [B], view [B, V], and the lists key and bad.
        """
        order = self.data.order(self.data.reader(), batch, seed, stream)
        for places in training_batches(position, batch, micro_batch, dist.rank(), dist.world_size()):
            members = [self._first[shard] + ordinal for shard, ordinal in (order.sample(p) for p, _ in places)]
            rows = [
                random_row(config, seed, p, self.data.size, *self.sizes[i]) for i, (p, _) in zip(members, places, strict=True)
            ]
            yield {
                "index": torch.tensor(members),
                "label": torch.tensor([self.labels[i] for i in members]),
                "view": torch.tensor(rows),
                "position": torch.tensor([p for p, _ in places]),
                "slot": torch.tensor([slot for _, slot in places]),
                "key": [self.keys[i] for i in members],
                "bad": [],
            }


def load_if_small(data: ImageShards, device: torch.device) -> ResidentImages | None:
    """Loads a split onto a GPU. Returns None if it takes more than DEVICE_SHARE of the free memory or has unreadable images."""
    if device.type != "cuda":
        return None
    estimate = len(data) * data.channels * data.size**2 * USUAL_ASPECT
    if estimate > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return None
    try:
        return ResidentImages(data, device)
    except BadSample:
        return None  # the stream replaces samples that cannot be read
