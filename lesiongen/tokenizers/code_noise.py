"""Replaces some codes of training images by similar codes, as a prior's samples have them (RobusTok, arXiv:2509.12474).

The codes of a sample go together less well than those of an image. A decoder that was trained on codes of images alone draws
samples worse. So polishing trains the decoder to draw an image also from codes of which some are wrong.
"""

import torch

from lesiongen.tokenizers.texture import uniform
from lesiongen.tokenizers.tokenizer import Tokenizer

NEIGHBOURS = 16  # a code is replaced by one of the 16 codes whose vectors are nearest to its own
SEED = 0x5EED
CHUNK = 1024  # codes whose distances are computed at once


class CodeNoise:
    """Replaces codes at random. For each image, the share of its codes that is replaced is drawn between 0 and `share`.

    Attributes:
        share: The largest share of the codes of an image that are replaced.
        neighbours: The codes nearest to each code, {level: int64 [K, N]}.
    """

    def __init__(self, tokenizer: Tokenizer, share: float):
        """Finds the neighbours of each code.

        Args:
            tokenizer: The trained tokenizer, whose codebooks no longer change.
            share: The largest share of the codes of an image that are replaced.
        """
        self.share = share
        self.neighbours = {name: _nearest_others(tokenizer.codebook(name).float()) for name in tokenizer.names}

    def __call__(self, codes: dict[str, torch.Tensor], number_B: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the codes with noise, {level: int64 [B, h, w]}.

        Args:
            codes: The codes of each level.
            number_B: An integer for each image, whose hash decides what is replaced.
        """
        found = {}
        for level, (name, codes_BHW) in enumerate(codes.items()):
            flat = codes_BHW.flatten(1)
            # Fractions from 0 to 1: of the share for each image, and for each code whether and by which it is replaced.
            fractions = uniform(number_B ^ (SEED + level), (1 + 2 * flat.shape[1],)) / 12**0.5 + 0.5
            share_B1, replaced, which = fractions.split([1, flat.shape[1], flat.shape[1]], 1)
            neighbours = self.neighbours[name]
            choice = (which * neighbours.shape[1]).long().clamp(0, neighbours.shape[1] - 1)
            noisy = torch.where(replaced < self.share * share_B1, neighbours[flat, choice], flat)
            found[name] = noisy.view_as(codes_BHW)
        return found


def _nearest_others(codebook_KD: torch.Tensor) -> torch.Tensor:
    """Returns the codes whose vectors are nearest to those of each code, int64 [K, N], N = NEIGHBOURS or less."""
    number = min(NEIGHBOURS, len(codebook_KD) - 1)
    parts = []
    for first, rows in zip(range(0, len(codebook_KD), CHUNK), codebook_KD.split(CHUNK), strict=True):
        distances = torch.cdist(rows, codebook_KD)
        distances.diagonal(first).fill_(torch.inf)  # not the code itself
        parts.append(distances.topk(number, largest=False).indices)
    return torch.cat(parts)
