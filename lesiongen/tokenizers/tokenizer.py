"""What every tokenizer offers, whatever its architecture."""

from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lesiongen.tokenizers.quantizer import Quantized


class Tokenizer(nn.Module, ABC):
    """Images [B, C, H, W] in [-1, 1] ⇄ a grid of codes [B, h, w] for each level. Levels are named from fine to coarse.

    A subclass sets `names` and `quantizers` (one for each name) and gives quantized() and decode()."""

    names: tuple[str, ...]
    quantizers: nn.ModuleList

    @abstractmethod
    def quantized(self, x_BCHW: torch.Tensor, slot=None, position=None) -> dict[str, Quantized]:
        """{level: Quantized}. slot, position: of each sample in the batch and the sequence, in training."""

    @abstractmethod
    def decode(self, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        """{level: quantized vectors [B, D, h, w]} → images in about [-1, 1]."""

    def forward(self, x_BCHW: torch.Tensor, slot=None, position=None) -> tuple[torch.Tensor, dict[str, Quantized]]:
        """(reconstruction, {level: Quantized})."""
        levels = self.quantized(x_BCHW, slot, position)
        return self.decode({name: q.x for name, q in levels.items()}), levels

    @property
    def entries(self) -> int:
        """Codes of each level."""
        return self.quantizers[0].entries

    def encode(self, x_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """{level: codes [B, h, w]}."""
        return {name: q.codes for name, q in self.quantized(x_BCHW).items()}

    def decode_codes(self, codes: dict[str, torch.Tensor]) -> torch.Tensor:
        """{level: codes [B, h, w]} → images [B, C, H, W] in about [-1, 1]."""
        books = dict(zip(self.names, self.quantizers, strict=True))
        return self.decode({name: books[name].lookup(codes[name].long()) for name in self.names})

    def codebook(self, name: str) -> torch.Tensor:
        """The vectors of a level's codes as the decoder sees them, [K, D]."""
        quantizer = self.quantizers[self.names.index(name)]
        device = next(self.parameters()).device
        return quantizer.lookup(torch.arange(quantizer.entries, device=device)[None, None])[0, :, 0].T

    def _run(self, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Quantization stays outside what is computed again in the backward pass."""
        again = self.config.checkpoint and self.training and torch.is_grad_enabled()
        return checkpoint(part, x, use_reentrant=False) if again else part(x)

    def update(self, statistics: torch.Tensor) -> dict[str, float]:
        """Hands each level its part of the summed statistics of a step. Returns {"<metric>/<level>": value}."""
        parts = statistics.split([q.statistics_size for q in self.quantizers])
        results = {n: q.update(s) for n, q, s in zip(self.names, self.quantizers, parts, strict=True)}
        return {f"{metric}/{name}": v for name, found in results.items() for metric, v in found.items()}
