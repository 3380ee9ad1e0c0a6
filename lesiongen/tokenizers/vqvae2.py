"""VQ-VAE-2 (Razavi, van den Oord, Vinyals 2019, arXiv:1906.00446) with any number of levels; the tokenizer of report 002.

Images are [B, C, H, W] in [-1, 1]. Levels are ordered from fine to coarse: ("codes",), ("bottom", "top"), ("bottom",
"middle", "top"), ("bottom", "middle1", "middle2", "top") and so on. The side of the grid of level i is the image's side divided
by the product of strides[:i+1]. The vectors of a level are computed from its features and the quantized vectors of all coarser
levels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lesiongen.tokenizers.blocks import ConvConfig, build_decoder, build_encoder
from lesiongen.tokenizers.quantize import build
from lesiongen.tokenizers.quantizer import Quantized, QuantizerConfig
from lesiongen.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class VQVAE2Config(QuantizerConfig, ConvConfig):
    """Config of a VQ-VAE-2."""

    kind: Literal["vqvae2"] = "vqvae2"
    strides: tuple[int, ...] = (4, 2)  # powers of two: downsampling to each level from the next finer one, or from the image

    def __post_init__(self):
        QuantizerConfig.__post_init__(self)
        ConvConfig.__post_init__(self)
        if not self.strides or any(s < 2 or s & (s - 1) for s in self.strides):
            raise ValueError(f"strides must be powers of two above 1, one for each level, not {self.strides}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the levels, fine to coarse."""
        middle_levels = len(self.strides) - 2
        if middle_levels < 0:
            return ("codes",)
        return ("bottom", *(f"middle{i + 1 if middle_levels > 1 else ''}" for i in range(middle_levels)), "top")

    def grids(self, size: int) -> dict[str, int]:
        """Returns {level: side of its grid} for square images of `size` pixels.

        Raises:
            ValueError: The size is no multiple of the product of the strides.
        """
        factors = [math.prod(self.strides[: i + 1]) for i in range(len(self.strides))]
        if size % factors[-1]:
            raise ValueError(
                f"images of {size} px do not divide by the strides {self.strides}; use a multiple of {factors[-1]}"
            )
        return {name: size // factor for name, factor in zip(self.names, factors, strict=True)}


class VQVAE2(Tokenizer):
    """A chain of encoders, a quantizer for each level, and one decoder for all levels.

    The modules of each list are in the order of the levels, fine to coarse.
    """

    def __init__(self, config: VQVAE2Config, channels: int, batch: int):
        """Builds the networks.

        Args:
            config: Sizes of the layers, kind of the quantizers.
            channels: Colour channels of the images.
            batch: Global batch size.
        """
        super().__init__()
        self.config, self.names, self.channels = config, config.names, channels
        levels = range(len(config.strides))
        dim, top = config.dim, levels[-1]
        # encoders[i] maps the features of level i - 1 (the image for i = 0) to those of level i.
        self.encoders = nn.ModuleList(
            build_encoder(channels if i == 0 else config.hidden, config.strides[i], config) for i in levels
        )
        # down[i] decodes all levels coarser than i to the grid of level i; project[i] joins the result with level i's features.
        self.down = nn.ModuleList(build_decoder((top - i) * dim, dim, config.strides[i + 1], config) for i in levels[:-1])
        self.project = nn.ModuleList(nn.Conv2d(config.hidden + (dim if i < top else 0), dim, 1) for i in levels)
        self.quantizers = nn.ModuleList(build(config, batch) for _ in levels)
        # up[i] upsamples quantized vectors from the grid of level i + 1 to that of level i.
        self.up = nn.ModuleList(nn.ConvTranspose2d(dim, dim, s, s) for s in config.strides[1:])
        self.decoder = build_decoder(len(config.strides) * dim, channels, config.strides[0], config)

    def quantized(
        self, x_BCHW: torch.Tensor, slot_B: torch.Tensor | None = None, position_B: torch.Tensor | None = None
    ) -> dict[str, Quantized]:
        results: dict[str, Quantized] = {}
        for i, z_BDhw in self._level_vectors(x_BCHW, results):
            results[self.names[i]] = self.quantizers[i](z_BDhw, slot_B, position_B)
        return results

    def _level_vectors(self, x_BCHW: torch.Tensor, results: dict[str, Quantized]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields (level, vectors [B, D, h, w] to quantize), coarse to fine.

        Each level needs the quantized vectors of the coarser ones. So the caller must store each level's result in `results`
        before it asks for the next level.
        """
        features, h = [], x_BCHW
        for encoder in self.encoders:
            features.append(h := self._run_part(encoder, h))
        coarser: list[torch.Tensor] = []  # quantized vectors of all coarser levels, on the grid of level i + 1
        for i in reversed(range(len(features))):
            inputs = [features[i], self._run_part(self.down[i], torch.cat(coarser, 1))] if coarser else [features[i]]
            yield i, self.project[i](torch.cat(inputs, 1))
            coarser = [*(self.up[i](q) for q in coarser), results[self.names[i]].x]

    def decoder_input(self, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs: list[torch.Tensor] = []
        for i in reversed(range(len(self.names))):
            inputs = [*(self.up[i](q) for q in inputs), vectors[self.names[i]]]
        return torch.cat(inputs, 1)

    @torch.no_grad()
    def initialise(self, x_BCHW: torch.Tensor) -> None:
        """Sets each level's codebook to k-means centres of the vectors of these images, coarse to fine.

        Call this before the engine is built.
        """
        results: dict[str, Quantized] = {}
        for i, z_BDhw in self._level_vectors(x_BCHW, results):
            self.quantizers[i].initialise(z_BDhw)
            results[self.names[i]] = self.quantizers[i](z_BDhw)
