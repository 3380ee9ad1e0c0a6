"""Texture: the detail of an image that its codes do not decide, drawn from noise.

A decoder alone shows the mean of all images that share their codes. That mean has no fine texture, however good the decoder is.
Texture adds a draw of the difference between such an image and the mean (noise inputs as in StyleGAN, Karras et al. 2019,
arXiv:1812.04948). The noise of an image is a hash of its codes, so decoding the same codes with the same label always gives
the same image, in whatever batch and on whatever device.

Shapes: B images, C channels, H × W pixels, h × w grid cells of the finest level.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

# Stages of the network, coarse to fine: pixels that share one value, and channels as a multiple of the config's width.
STAGES = ((8, 4), (4, 4), (2, 2), (1, 1))
LAYERS = 2


@dataclass(frozen=True)
class TextureConfig:
    """Size of a texture network."""

    width: int = 32  # channels at the full resolution; twice as many at a half of it, four times at a quarter and an eighth
    noise: int = 4  # noise channels at each resolution

    def __post_init__(self):
        if min(self.width, self.noise) < 1:
            raise ValueError("width and noise must be at least 1")


class Texture(nn.Module):
    """Adds texture to decoded images. It adds nothing before it is trained.

    Stages at an eighth, a quarter, a half and all of the resolution each see the stage before, the decoder's image and noise
    of their own, so that a draw may have coarse structure as well as grain. There is no stage coarser than the grid: there, and
    for the image as a whole, codes decide.
    """

    def __init__(self, config: TextureConfig, inputs: int, channels: int, cell: int):
        """Builds the network.

        Args:
            config: Its size.
            inputs: Channels of the decoder's input.
            channels: Colour channels of the images.
            cell: Side of a cell of the finest grid, in pixels.
        """
        super().__init__()
        self.config = config
        self.pixels = [pixels for pixels, _ in STAGES if pixels <= cell]
        widths = [config.width * multiple for pixels, multiple in STAGES if pixels <= cell]
        self.stages = nn.ModuleList(
            _Stage(before, channels + config.noise, width) for before, width in pairwise([inputs, *widths])
        )
        self.last = nn.Conv2d(widths[-1], channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, y_BCHW: torch.Tensor, h_BDhw: torch.Tensor, seed_B: torch.Tensor) -> torch.Tensor:
        """Returns the images with texture, [B, C, H, W].

        Args:
            y_BCHW: The decoder's images.
            h_BDhw: The decoder's input.
            seed_B: Seed of the noise of each image, int64.
        """
        height, width = y_BCHW.shape[-2:]
        # The network sees the mean image detached, so the decoder gets its gradient through the sum in the last line alone.
        mean, h = y_BCHW.detach().float(), h_BDhw
        for stage, pixels in zip(self.stages, self.pixels, strict=True):
            size = max(1, height // pixels), max(1, width // pixels)
            noise = uniform(seed_B ^ pixels, (self.config.noise, *size))
            h = stage(h, torch.cat([_resized(mean, size), noise], 1))
        return y_BCHW + self.last(F.silu(h))


class _Stage(nn.Module):
    """Convolutions at one resolution."""

    def __init__(self, before: int, inputs: int, width: int):
        super().__init__()
        self.of_before = nn.Conv2d(before, width, 1)
        self.of_inputs = nn.Conv2d(inputs, width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(LAYERS))

    def forward(self, before_BDhw: torch.Tensor, inputs_BCHW: torch.Tensor) -> torch.Tensor:
        """Returns features at the resolution of the inputs. before: features of the stage before, or the decoder's input."""
        h = self.of_inputs(inputs_BCHW)
        h = h + _resized(self.of_before(before_BDhw), h.shape[-2:])
        for layer in self.layers:
            h = h + layer(F.silu(h))
        return h


def _resized(x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Enlarges bilinearly, or reduces to the means of areas."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear" if x.shape[-1] < size[-1] else "area")


def seeds_of(codes: list[torch.Tensor]) -> torch.Tensor:
    """Returns a seed for each image, a hash of its codes, int64 [B] below 2^32.

    Args:
        codes: Codes of each level, int64 [B, h, w].
    """
    flat = torch.cat([level.flatten(1) for level in codes], 1)
    numbers = torch.arange(flat.shape[1], device=flat.device)
    return hashed(hashed(flat + (numbers << 16)).sum(1))


def uniform(seed_B: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns uniform noise of mean 0 and variance 1 for each seed, float32 [B, *shape], the same on every device."""
    count = torch.Size(shape).numel()
    counters = hashed(torch.arange(count, device=seed_B.device))
    values = hashed(counters[None] ^ hashed(seed_B)[:, None]).to(torch.float32)
    return ((values / 2**32 - 0.5) * 12**0.5).view(-1, *shape)


def hashed(x: torch.Tensor) -> torch.Tensor:
    """Mixes the low 32 bits of integers (the 32-bit hash "lowbias32" of C. Wellons' hash-prospector). Returns int64."""
    x = x & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x735A2D97 & 0xFFFFFFFF
    return x ^ (x >> 15)
