"""The interface of all tokenizers, whatever their architecture.

The stages use tokenizers through this class alone. Invariant: decode_codes(encode(x)) is the reconstruction that forward(x)
returns, up to rounding.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lesiongen.tokenizers.quantizer import Quantized


class Tokenizer(nn.Module, ABC):
    """Maps images [B, C, H, W] in [-1, 1] to a grid of codes [B, h, w] for each level, and back.

    A subclass sets `config`, `names`, `quantizers` and `decoder`, and implements quantized(), decoder_input() and
    initialise(images).

    Attributes:
        names: Names of the levels, fine to coarse.
        quantizers: One quantizer for each name, in the same order.
        decoder: Maps decoder_input() to images. Encoding does not use it, so its weights may change while codes stay valid.
    """

    names: tuple[str, ...]
    quantizers: nn.ModuleList
    decoder: nn.Module

    @abstractmethod
    def quantized(
        self, x_BCHW: torch.Tensor, slot_B: torch.Tensor | None = None, position_B: torch.Tensor | None = None
    ) -> dict[str, Quantized]:
        """Encodes and quantizes images.

        Args:
            x_BCHW: Images in [-1, 1].
            slot_B: Index of each sample in the global batch; in training only.
            position_B: Index of each sample in the training sequence; in training only.

        Returns:
            {level: Quantized}, coarse to fine. `statistics` are None without slot_B.
        """

    @abstractmethod
    def decoder_input(self, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Joins {level: quantized vectors [B, D, h, w]} on the finest grid, for the decoder."""

    def decode(self, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Decodes {level: quantized vectors [B, D, h, w]} to images [B, C, H, W] in about [-1, 1]."""
        return self._run_part(self.decoder, self.decoder_input(vectors))

    def forward(
        self, x_BCHW: torch.Tensor, slot_B: torch.Tensor | None = None, position_B: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, Quantized]]:
        """Reconstructs images.

        Args:
            x_BCHW: Images in [-1, 1].
            slot_B: As in quantized().
            position_B: As in quantized().

        Returns:
            Reconstructions [B, C, H, W] in about [-1, 1], and {level: Quantized}.
        """
        levels = self.quantized(x_BCHW, slot_B, position_B)
        return self.decode({name: q.x for name, q in levels.items()}), levels

    @property
    def entries(self) -> int:
        """Number of codes in each level's codebook, K."""
        return self.quantizers[0].entries

    def encode(self, x_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encodes images in [-1, 1] to {level: codes [B, h, w]}."""
        return {name: q.codes for name, q in self.quantized(x_BCHW).items()}

    def decode_codes(self, codes: dict[str, torch.Tensor]) -> torch.Tensor:
        """Decodes {level: codes [B, h, w]} to images [B, C, H, W] in about [-1, 1]."""
        quantizers = dict(zip(self.names, self.quantizers, strict=True))
        return self.decode({name: quantizers[name].lookup(codes[name].long()) for name in self.names})

    def codebook(self, name: str) -> torch.Tensor:
        """Returns the vectors of a level's codes as the decoder receives them, [K, D]."""
        quantizer = self.quantizers[self.names.index(name)]
        device = next(self.parameters()).device
        return quantizer.lookup(torch.arange(quantizer.entries, device=device)[None, None])[0, :, 0].T

    def update(self, statistics: torch.Tensor) -> dict[str, torch.Tensor]:
        """Updates the quantizers after an accepted step.

        Args:
            statistics: Those of all levels, fine to coarse, as one vector; summed over the global batch.

        Returns:
            {"<metric>/<level>": value}, the usage metrics of each level.
        """
        parts = statistics.split([q.statistics_size for q in self.quantizers])
        by_level = {n: q.update(s) for n, q, s in zip(self.names, self.quantizers, parts, strict=True)}
        return {f"{metric}/{name}": value for name, metrics in by_level.items() for metric, value in metrics.items()}

    def _run_part(self, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Runs an encoder or decoder, with activation checkpointing where the config asks for it.

        Quantizers are never run this way, so nothing is quantized twice.
        """
        recompute = self.config.checkpoint and part.training and torch.is_grad_enabled()
        return checkpoint(part, x, use_reentrant=False) if recompute else part(x)
