"""Texture: the detail of an image that its codes do not decide, drawn from noise.

A decoder alone shows the mean of all images that share their codes. That mean has no fine texture, however good the decoder is.
Texture adds a draw of the difference between such an image and the mean (noise inputs as in StyleGAN, Karras et al. 2019,
arXiv:1812.04948). The noise of an image is a hash of its codes, so decoding the same codes always gives the same image, in
whatever batch and on whatever device.

Shapes: B images, C channels, H × W pixels, h × w grid cells of the finest level.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

SCALES = (1, 2, 4, 8)  # pixels that share a noise value, for each group of noise channels
LAYERS = 3


@dataclass(frozen=True)
class TextureConfig:
    """Size of a texture network."""

    width: int = 32  # channels
    noise: int = 4  # noise channels at each of the scales of 1, 2, 4 and 8 pixels

    def __post_init__(self):
        if min(self.width, self.noise) < 1:
            raise ValueError("width and noise must be at least 1")


class Texture(nn.Module):
    """Adds texture to decoded images. It adds nothing before it is trained."""

    def __init__(self, config: TextureConfig, inputs: int, channels: int):
        """Builds the network.

        Args:
            config: Its size.
            inputs: Channels of the decoder's input.
            channels: Colour channels of the images.
        """
        super().__init__()
        self.config = config
        self.of_codes = nn.Conv2d(inputs, config.width, 1)
        self.first = nn.Conv2d(channels + config.noise * len(SCALES), config.width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(config.width, config.width, 3, padding=1) for _ in range(LAYERS))
        self.last = nn.Conv2d(config.width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, y_BCHW: torch.Tensor, h_BDhw: torch.Tensor, seed_B: torch.Tensor) -> torch.Tensor:
        """Returns the images with texture, [B, C, H, W].

        Args:
            y_BCHW: The decoder's images.
            h_BDhw: The decoder's input.
            seed_B: Seed of the noise of each image, int64.
        """
        size = y_BCHW.shape[-2:]
        noise = [_resized(self._noise(seed_B, scale, size), size) for scale in SCALES]
        # The network sees the mean image detached, so the decoder gets its gradient through the sum in the last line alone.
        h = self.first(torch.cat([y_BCHW.detach().float(), *noise], 1)) + _resized(self.of_codes(h_BDhw), size)
        for layer in self.layers:
            h = h + layer(F.silu(h))
        return y_BCHW + self.last(F.silu(h))

    def _noise(self, seed_B: torch.Tensor, scale: int, size: torch.Size) -> torch.Tensor:
        """Returns noise of a scale, [B, noise, H / scale, W / scale]."""
        shape = self.config.noise, max(1, size[0] // scale), max(1, size[1] // scale)
        return uniform(seed_B ^ scale, shape)


def _resized(x: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear")


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
