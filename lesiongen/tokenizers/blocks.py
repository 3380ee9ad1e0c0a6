"""Convolutional encoders and decoders that the tokenizers share. Shapes: [B, C, H, W].

Each tokenizer builds its networks from these functions. The sizes come from its config, which inherits from ConvConfig.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hpc.config import volatile


@dataclass(frozen=True)
class ConvConfig:
    """Sizes of the encoders and decoders. The tokenizers' configs inherit these fields."""

    hidden: int = 128  # channels
    residual_layers: int = 2  # residual blocks in each encoder and each decoder
    residual_hidden: int = 32  # channels inside a residual block
    taper: bool = True  # half the channels in an encoder's first layer and between a decoder's upsampling layers
    norm: Literal["none", "group"] = "none"  # normalisation after strided layers: none, or group normalisation
    checkpoint: bool = volatile(False)  # recompute activations in the backward pass: less memory, a third more time

    def __post_init__(self):
        if min(self.hidden, self.residual_hidden) < 1 or self.hidden % 2 or self.residual_layers < 0:
            raise ValueError("hidden must be even and at least 2, residual_hidden at least 1, residual_layers at least 0")

    @property
    def outer(self) -> int:
        """Channels of the layers that `taper` halves."""
        return self.hidden // 2 if self.taper else self.hidden


class ResidualBlock(nn.Module):
    """Adds a 3×3 and a 1×1 convolution of its input to the input."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [B, channels, H, W] to the same shape."""
        return x + self.net(x)


def build_encoder(in_channels: int, stride: int, config: ConvConfig) -> nn.Sequential:
    """Builds an encoder: [B, in_channels, H, W] → [B, hidden, H/stride, W/stride].

    Args:
        in_channels: Channels of the input.
        stride: Downsampling factor, a power of two. Each strided convolution halves height and width.
        config: Sizes of the layers.
    """
    layers: list[nn.Module] = []
    for i in range(stride.bit_length() - 1):
        width = config.outer if i == 0 else config.hidden
        layers += [nn.Conv2d(in_channels, width, 4, 2, 1), *_norm_and_relu(width, config)]
        in_channels = width
    layers += [nn.Conv2d(in_channels, config.hidden, 3, padding=1)]
    layers += [ResidualBlock(config.hidden, config.residual_hidden) for _ in range(config.residual_layers)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True))


def build_decoder(in_channels: int, out_channels: int, stride: int, config: ConvConfig) -> nn.Sequential:
    """Builds a decoder: [B, in_channels, h, w] → [B, out_channels, h·stride, w·stride].

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Upsampling factor, a power of two. Each transposed convolution doubles height and width.
        config: Sizes of the layers.
    """
    layers: list[nn.Module] = [nn.Conv2d(in_channels, config.hidden, 3, padding=1)]
    layers += [ResidualBlock(config.hidden, config.residual_hidden) for _ in range(config.residual_layers)]
    layers += [nn.ReLU(inplace=True)]
    doublings, width = stride.bit_length() - 1, config.hidden
    for i in range(doublings):
        last = i + 1 == doublings
        next_width = out_channels if last else config.outer
        layers += [nn.ConvTranspose2d(width, next_width, 4, 2, 1)]
        layers += [] if last else _norm_and_relu(next_width, config)
        width = next_width
    return nn.Sequential(*layers)


def _norm_and_relu(width: int, config: ConvConfig) -> list[nn.Module]:
    """Builds the layers after a strided convolution.

    Report 004 uses batch norm; this project uses group norm. Batch norm would make a result depend on how a batch is divided
    among ranks and micro-batches, and it writes buffers in forward().
    """
    return [*([nn.GroupNorm(min(32, width), width)] if config.norm == "group" else []), nn.ReLU(inplace=True)]
