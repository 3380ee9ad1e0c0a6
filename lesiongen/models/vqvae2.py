"""VQ-VAE-2 (Razavi, van den Oord, Vinyals 2019, arXiv:1906.00446) with any number of levels; report 002's tokenizer.

Images are [-1, 1], [B, C, H, W]. Levels are named from fine to coarse, ("codes",), ("bottom", "top") or ("bottom",
"middle", "top"): level i sees the image at 1/∏strides[:i+1], and is encoded given all coarser ones.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lesiongen.models.quantize import QUANTIZERS, Quantized

NAMES = {1: ("codes",), 2: ("bottom", "top"), 3: ("bottom", "middle", "top")}


@dataclass(frozen=True)
class VQVAE2Config:
    strides: tuple[int, ...] = (4, 2)  # of each level over the one below; powers of two
    hidden: int = 128
    residual_layers: int = 2
    residual_hidden: int = 32
    dim: int = 64  # of a code vector
    entries: int = 512  # codes per level
    quantizer: Literal["ema"] = "ema"
    decay: float = 0.99
    revive_below: float = 0.1  # a code used less than this fraction of the average is revived
    commitment: float = 0.25

    def __post_init__(self):
        if len(self.strides) not in NAMES or any(s < 2 or s & (s - 1) for s in self.strides):
            raise ValueError(f"strides must be 1 to 3 powers of two above 1, not {self.strides}")
        if min(self.hidden, self.residual_hidden, self.dim) < 1 or self.hidden % 2 or self.entries < 2:
            raise ValueError("hidden (even), residual_hidden, dim must be positive and entries at least 2")
        if not 0 < self.decay < 1 or self.residual_layers < 0 or self.commitment < 0 or not 0 <= self.revive_below < 1:
            raise ValueError("decay lies between 0 and 1, revive_below below 1, residual_layers and commitment at least 0")

    @property
    def names(self) -> tuple[str, ...]:
        """Levels, fine to coarse."""
        return NAMES[len(self.strides)]

    def grids(self, size: int) -> dict[str, int]:
        """Side of each level's grid for square images. Raises ValueError where the size does not divide."""
        factors = [math.prod(self.strides[: i + 1]) for i in range(len(self.strides))]
        if size % factors[-1]:
            raise ValueError(
                f"images of {size} px do not divide by the strides {self.strides}; use a multiple of {factors[-1]}"
            )
        return {name: size // factor for name, factor in zip(self.names, factors, strict=True)}


class Residual(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1)
        )

    def forward(self, x):
        return x + self.net(x)


def encoder(inputs: int, stride: int, config: VQVAE2Config) -> nn.Sequential:
    """[B, inputs, H, W] → [B, hidden, H/stride, W/stride]."""
    layers: list[nn.Module] = []
    for i in range(stride.bit_length() - 1):
        width = config.hidden // 2 if i == 0 else config.hidden
        layers += [nn.Conv2d(inputs, width, 4, 2, 1), nn.ReLU(inplace=True)]
        inputs = width
    layers += [nn.Conv2d(inputs, config.hidden, 3, padding=1)]
    layers += [Residual(config.hidden, config.residual_hidden) for _ in range(config.residual_layers)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True))


def decoder(inputs: int, outputs: int, stride: int, config: VQVAE2Config) -> nn.Sequential:
    """[B, inputs, h, w] → [B, outputs, h·stride, w·stride]."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, config.hidden, 3, padding=1)]
    layers += [Residual(config.hidden, config.residual_hidden) for _ in range(config.residual_layers)]
    layers += [nn.ReLU(inplace=True)]
    doublings, width = stride.bit_length() - 1, config.hidden
    for i in range(doublings):
        last = i + 1 == doublings
        following = outputs if last else config.hidden // 2
        layers += [nn.ConvTranspose2d(width, following, 4, 2, 1)]
        layers += [] if last else [nn.ReLU(inplace=True)]
        width = following
    return nn.Sequential(*layers)


class VQVAE2(nn.Module):
    """encode, decode, decode_codes, and forward → (reconstruction, {level: Quantized})."""

    def __init__(self, config: VQVAE2Config, channels: int, batch: int):
        super().__init__()
        self.config, self.names = config, config.names
        levels = range(len(config.strides))
        dim, top = config.dim, levels[-1]
        self.encoders = nn.ModuleList(encoder(channels if i == 0 else config.hidden, config.strides[i], config) for i in levels)
        # Level i is encoded from its own features and what the coarser levels decode to on its grid.
        self.down = nn.ModuleList(decoder((top - i) * dim, dim, config.strides[i + 1], config) for i in levels[:-1])
        self.project = nn.ModuleList(nn.Conv2d(config.hidden + (dim if i < top else 0), dim, 1) for i in levels)
        self.quantizers = nn.ModuleList(
            QUANTIZERS[config.quantizer](config.entries, dim, batch, config.decay, config.revive_below) for _ in levels
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(dim, dim, s, s) for s in config.strides[1:])
        self.decoder = decoder(len(config.strides) * dim, channels, config.strides[0], config)

    def forward(self, x_BCHW: torch.Tensor, slot=None, position=None) -> tuple[torch.Tensor, dict[str, Quantized]]:
        features, h = [], x_BCHW
        for encode in self.encoders:
            features.append(h := encode(h))
        out: dict[str, Quantized] = {}
        coarser: list[torch.Tensor] = []  # quantized vectors of coarser levels, on the grid of the one being encoded
        for i in reversed(range(len(features))):
            if coarser:
                stack = [features[i], self.down[i](torch.cat(coarser, 1))]
                coarser = [self.up[i](q) for q in coarser]
            else:
                stack = [features[i]]
            quantized = self.quantizers[i](self.project[i](torch.cat(stack, 1)), slot, position)
            out[self.names[i]] = quantized
            coarser.append(quantized.x)
        return self.decoder(torch.cat(coarser, 1)), out

    def encode(self, x_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """{level: codes [B, h, w]}."""
        return {name: q.codes for name, q in self.forward(x_BCHW)[1].items()}

    def decode_codes(self, codes: dict[str, torch.Tensor]) -> torch.Tensor:
        """{level: codes [B, h, w]} → images [B, C, H, W] in about [-1, 1]."""
        coarser: list[torch.Tensor] = []
        for i in reversed(range(len(self.names))):
            coarser = [self.up[i](q) for q in coarser]
            coarser.append(self.quantizers[i].lookup(codes[self.names[i]].long()))
        return self.decoder(torch.cat(coarser, 1))

    def update(self, statistics: torch.Tensor) -> dict[str, float]:
        """Hands each level its part of the summed statistics."""
        parts = statistics.split([q.statistics_size for q in self.quantizers])
        results = {n: q.update(s) for n, q, s in zip(self.names, self.quantizers, parts, strict=True)}
        return {f"{metric}/{name}": v for name, found in results.items() for metric, v in found.items()}
