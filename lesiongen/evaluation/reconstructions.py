"""Reconstructions of real images, decoded from their unaugmented codes in the code store."""

from collections.abc import Iterator

import numpy as np
import torch

from hpc.data.codestore import CodeStore
from lesiongen.data.images import to_uint8
from lesiongen.evaluation.image_sets import BATCH, RealImages
from lesiongen.tokenizers.tokenizer import Tokenizer


class Reconstructions:
    """Decodes the codes of real images. The code store's shard k of a split holds the images of the split's image shard k.

    Attributes:
        store: The code store.
        net: The tokenizer that made the codes.
    """

    def __init__(self, store: CodeStore, net: Tokenizer):
        self.store, self.net = store, net

    def codes(self, images: RealImages, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the codes of each level of some images, without augmentation, {level: int64 [B, h, w]}."""
        rows = images.rows[indices]
        found: dict[str, np.ndarray] = {}
        for k in np.unique(rows[:, 0]).tolist():
            members = np.flatnonzero(rows[:, 0] == k)
            locations = np.stack([np.zeros(len(members), np.int64), *rows[members, 1:].T], 1)
            columns = [f"codes.{name}" for name in self.net.names]
            part = self.store.gather_rows(images.splits[k].split, locations, columns, np.int64)
            for name in self.net.names:
                values = part[f"codes.{name}"]
                found.setdefault(name, np.empty((len(rows), *values.shape[1:]), np.int64))[members] = values
        return found

    @torch.no_grad()
    def batches(self, images: RealImages, indices: np.ndarray) -> Iterator[torch.Tensor]:
        """Yields the reconstructions of some images batch by batch, uint8 [B, C, size, size]."""
        device = next(self.net.parameters()).device
        for first in range(0, len(indices), BATCH):
            codes = self.codes(images, indices[first : first + BATCH])
            levels = {name: torch.from_numpy(values).to(device) for name, values in codes.items()}
            yield to_uint8(self.net.decode_codes(levels)).cpu()
