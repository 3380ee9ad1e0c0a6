"""The training images as a stream of augmented micro-batches, wherever they are decoded and augmented.

The stages that train on images, tokenizer and polish, make a TrainingImages and hand its batches to the training loop.
"""

from collections.abc import Iterator

import torch

from lesiongen.data.augment import AugmentConfig
from lesiongen.data.balance import StreamConfig
from lesiongen.data.config import DataConfig
from lesiongen.data.device_augment import augment_batch
from lesiongen.data.packed import Packed
from lesiongen.data.resident import load_if_small
from lesiongen.data.stream import ImageShards

NAMES = ("image", "label", "slot", "position", "key", "bad")  # what a training reads of a batch


class TrainingImages:
    """The training split, decoded by data workers or resident on the device, and augmented on either side."""

    def __init__(
        self,
        shards: Packed,
        config: DataConfig,
        augment: AugmentConfig,
        order: StreamConfig,
        batch: int,
        seed: int,
        device: torch.device,
    ):
        """Opens the split. On a GPU, loads small splits onto it.

        Args:
            shards: The images.
            config: Where images are decoded and augmented.
            augment: The views.
            order: How often each image is drawn.
            batch: Global batch size.
            seed: Seed of the order and of the views.
            device: The device that trains.
        """
        self.split = ImageShards(shards, "train")
        self.config, self.augment, self.order, self.batch, self.seed = config, augment, order, batch, seed
        self.on_device = config.augment_on == "device"
        self.resident = load_if_small(self.split, device) if self.on_device and config.resident == "auto" else None

    def stream(self, position: int, micro_batch: int) -> Iterator[dict]:
        """Yields this rank's micro-batches of augmented images, without end.

        Args:
            position: Global position of the first sample.
            micro_batch: Images in each micro-batch.

        Yields:
            Dicts with image uint8 [B, C, H, W], label, slot and position [B], and the lists key and bad. If the augmentation is
            left to the device, also view; and for resident images index in place of image. See finish().
        """
        if self.resident:
            return self.resident.train(position, self.batch, micro_batch, self.augment, self.seed, self.order)
        how = self.augment, self.seed, self.config.workers, self.order, self.on_device
        batches = self.split.train(position, self.batch, micro_batch, *how)
        names = (*NAMES, "view") if self.on_device else NAMES
        return ({k: batch[k] for k in names} for batch in batches)

    def finish(self, batch: dict) -> dict:
        """Augments the images of a batch on the device, if the data workers have left that to it."""
        if "view" not in batch:
            return batch
        batch = dict(batch)
        images = self.resident.pixels[batch.pop("index")] if self.resident else batch["image"]
        batch["image"] = augment_batch(images, batch.pop("view"), batch["position"], self.split.size)
        return batch

    def first(self, number: int) -> torch.Tensor:
        """Returns the first images of the training sequence, uint8 [number, C, H, W], the same on every rank."""
        return next(self.split.first(number, self.batch, self.augment, self.seed))["image"]
