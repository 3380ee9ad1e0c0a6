"""Decodes codes to images: those of samples, of training views, and of real images, which are then reconstructions."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from hpc.data.codestore import CodeStore
from lesiongen.data.images import to_uint8
from lesiongen.evaluation.image_sets import BATCH, RealImages
from lesiongen.tokenizers.tokenizer import Tokenizer


@torch.no_grad()
def decode_batches(
    net: Tokenizer, codes: dict[str, np.ndarray], labels: Sequence[str] | None, batch: int = BATCH
) -> Iterator[torch.Tensor]:
    """Decodes codes to images, batch by batch.

    Args:
        net: The tokenizer.
        codes: Codes of each level, [N, h, w].
        labels: The label of each image, which a polished decoder is told, "" for none; None to tell it no labels.
        batch: Images that are decoded at once.

    Yields:
        uint8 [B, C, H, W], on the CPU.
    """
    device, number = next(net.parameters()).device, len(next(iter(codes.values())))
    label_N = net.label_numbers([""] * number if labels is None else labels)
    for first in range(0, number, batch):
        part = {name: torch.from_numpy(array[first : first + batch].astype(np.int64)) for name, array in codes.items()}
        label_B = label_N[first : first + batch]
        yield to_uint8(net.decode_codes({name: levels.to(device) for name, levels in part.items()}, label_B)).cpu()


def decode(net: Tokenizer, codes: dict[str, np.ndarray], labels: Sequence[str] | None, batch: int = BATCH) -> torch.Tensor:
    """Decodes codes to images, uint8 [N, C, H, W], on the CPU. Arguments as for decode_batches()."""
    return torch.cat(list(decode_batches(net, codes, labels, batch)))


class Reconstructions:
    """Decodes the unaugmented codes of real images.

    The code store's shard k of a split holds the images of the split's image shard k.

    Attributes:
        store: The code store.
        net: A tokenizer that decodes these codes; its decoder may be polished.
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

    def batches(self, images: RealImages, indices: np.ndarray, with_labels: bool = True) -> Iterator[torch.Tensor]:
        """Yields the reconstructions of some images batch by batch, uint8 [B, C, size, size].

        Args:
            images: The set that the images are of.
            indices: Their indices.
            with_labels: Whether a polished decoder is told their labels, as it is when it decodes samples.
        """
        for first in range(0, len(indices), BATCH):
            part = indices[first : first + BATCH]
            yield decode(self.net, self.codes(images, part), images.label_names(part) if with_labels else None)
