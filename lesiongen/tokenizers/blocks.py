"""Convolutional blocks that the tokenizers share. Shapes: [B, C, H, W]."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hpc.config import volatile


@dataclass(frozen=True)
class Shape:
    """What encoders and decoders are made of."""

    hidden: int = 128
    residual_layers: int = 2
    residual_hidden: int = 32
    taper: bool = True  # the outermost layer is half as wide
    norm: Literal["none", "group"] = "none"
    checkpoint: bool = volatile(False)  # compute activations again in the backward pass: less memory, a third more time

    def __post_init__(self):
        if min(self.hidden, self.residual_hidden) < 1 or self.hidden % 2 or self.residual_layers < 0:
            raise ValueError("hidden (even) and residual_hidden must be positive and residual_layers at least 0")

    @property
    def outer(self) -> int:
        return self.hidden // 2 if self.taper else self.hidden


class Residual(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net(x)


def activation(width: int, shape: Shape) -> list[nn.Module]:
    """Group norm stands where report 004 has batch norm: that would make a result depend on how a batch is divided among
    ranks and micro-batches, and write buffers in forward."""
    return [*([nn.GroupNorm(min(32, width), width)] if shape.norm == "group" else []), nn.ReLU(inplace=True)]


def encoder(inputs: int, stride: int, shape: Shape) -> nn.Sequential:
    """[B, inputs, H, W] → [B, hidden, H/stride, W/stride]; stride is a power of two."""
    layers: list[nn.Module] = []
    for i in range(stride.bit_length() - 1):
        width = shape.outer if i == 0 else shape.hidden
        layers += [nn.Conv2d(inputs, width, 4, 2, 1), *activation(width, shape)]
        inputs = width
    layers += [nn.Conv2d(inputs, shape.hidden, 3, padding=1)]
    layers += [Residual(shape.hidden, shape.residual_hidden) for _ in range(shape.residual_layers)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True))


def decoder(inputs: int, outputs: int, stride: int, shape: Shape) -> nn.Sequential:
    """[B, inputs, h, w] → [B, outputs, h·stride, w·stride]."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, shape.hidden, 3, padding=1)]
    layers += [Residual(shape.hidden, shape.residual_hidden) for _ in range(shape.residual_layers)]
    layers += [nn.ReLU(inplace=True)]
    doublings, width = stride.bit_length() - 1, shape.hidden
    for i in range(doublings):
        last = i + 1 == doublings
        following = outputs if last else shape.outer
        layers += [nn.ConvTranspose2d(width, following, 4, 2, 1)]
        layers += [] if last else activation(following, shape)
        width = following
    return nn.Sequential(*layers)
