"""VQ-VAE-2 (Razavi, van den Oord, Vinyals 2019, arXiv:1906.00446) with any number of levels; report 002's tokenizer.

Images are [-1, 1], [B, C, H, W]. Levels are named from fine to coarse, ("codes",), ("bottom", "top"), ("bottom",
"middle", "top"), ("bottom", "middle1", "middle2", "top") …: level i sees the image at 1/∏strides[:i+1], and is encoded
given all coarser ones.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lesiongen.tokenizers.blocks import Shape, decoder, encoder
from lesiongen.tokenizers.quantize import build
from lesiongen.tokenizers.quantizer import Quantized, QuantizerConfig
from lesiongen.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class VQVAE2Config(QuantizerConfig, Shape):
    kind: Literal["vqvae2"] = "vqvae2"
    strides: tuple[int, ...] = (4, 2)  # of each level over the one below; powers of two

    def __post_init__(self):
        QuantizerConfig.__post_init__(self)
        Shape.__post_init__(self)
        if not self.strides or any(s < 2 or s & (s - 1) for s in self.strides):
            raise ValueError(f"strides must be powers of two above 1, one for each level, not {self.strides}")

    @property
    def names(self) -> tuple[str, ...]:
        """Levels, fine to coarse."""
        between = len(self.strides) - 2
        if between < 0:
            return ("codes",)
        return ("bottom", *(f"middle{i + 1 if between > 1 else ''}" for i in range(between)), "top")

    def grids(self, size: int) -> dict[str, int]:
        """Side of each level's grid for square images. Raises ValueError where the size does not divide."""
        factors = [math.prod(self.strides[: i + 1]) for i in range(len(self.strides))]
        if size % factors[-1]:
            raise ValueError(
                f"images of {size} px do not divide by the strides {self.strides}; use a multiple of {factors[-1]}"
            )
        return {name: size // factor for name, factor in zip(self.names, factors, strict=True)}


class VQVAE2(Tokenizer):
    def __init__(self, config: VQVAE2Config, channels: int, batch: int):
        super().__init__()
        self.config, self.names = config, config.names
        levels = range(len(config.strides))
        dim, top = config.dim, levels[-1]
        self.encoders = nn.ModuleList(encoder(channels if i == 0 else config.hidden, config.strides[i], config) for i in levels)
        # Level i is encoded from its own features and what the coarser levels decode to on its grid.
        self.down = nn.ModuleList(decoder((top - i) * dim, dim, config.strides[i + 1], config) for i in levels[:-1])
        self.project = nn.ModuleList(nn.Conv2d(config.hidden + (dim if i < top else 0), dim, 1) for i in levels)
        self.quantizers = nn.ModuleList(build(config, batch) for _ in levels)
        self.up = nn.ModuleList(nn.ConvTranspose2d(dim, dim, s, s) for s in config.strides[1:])
        self.decoder = decoder(len(config.strides) * dim, channels, config.strides[0], config)

    def quantized(self, x_BCHW: torch.Tensor, slot=None, position=None) -> dict[str, Quantized]:
        out: dict[str, Quantized] = {}
        for i, z in self._vectors(x_BCHW, out):
            out[self.names[i]] = self.quantizers[i](z, slot, position)
        return out

    def _vectors(self, x_BCHW: torch.Tensor, done: dict[str, Quantized]) -> Iterator[tuple[int, torch.Tensor]]:
        """(level, vectors to quantize), coarse to fine; the caller puts each result into `done` before the next."""
        features, h = [], x_BCHW
        for encode in self.encoders:
            features.append(h := self._run(encode, h))
        coarser: list[torch.Tensor] = []  # quantized vectors of coarser levels, on the grid of the last one
        for i in reversed(range(len(features))):
            stack = [features[i], self._run(self.down[i], torch.cat(coarser, 1))] if coarser else [features[i]]
            yield i, self.project[i](torch.cat(stack, 1))
            coarser = [*(self.up[i](q) for q in coarser), done[self.names[i]].x]

    def decode(self, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        stack: list[torch.Tensor] = []
        for i in reversed(range(len(self.names))):
            stack = [*(self.up[i](q) for q in stack), vectors[self.names[i]]]
        return self._run(self.decoder, torch.cat(stack, 1))

    @torch.no_grad()
    def initialise(self, x_BCHW: torch.Tensor) -> None:
        """Places each level's codebook on k-means centres of these images' vectors, coarse to fine; before the engine is
        built."""
        out: dict[str, Quantized] = {}
        for i, z in self._vectors(x_BCHW, out):
            self.quantizers[i].initialise(z)
            out[self.names[i]] = self.quantizers[i](z)
