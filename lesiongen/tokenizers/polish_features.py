"""Features of draws and images, which the loss of polishing compares.

They are cosine coefficients of 3 × 3 pixels, as in JPEG, and the features of EfficientNet-Lite1. The first layer of that
network has stride 2, so it hardly responds to patterns of single pixels. Decoders that were trained on features of whole images
alone drew such patterns: lattices of violet and green, and checkerboards. So the network gets a part of each image, enlarged by
up to two, and the coefficients see each pixel. In training, the part changes with the position in the stream; in evaluation a
hash of the codes decides it.

Shapes: B images, M = 2 B draws of them, C channels, H × W pixels, D features at h × w places.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lesiongen.tokenizers.perceptual import Perceptual
from lesiongen.tokenizers.texture import hashed

ZOOM = 2.0  # the largest enlargement
# Added to the size of each coefficient, in pixels of [-1, 1], so that rounding to 8 bits (0.0023) is not scaled up to 1.
FAINT = 0.01
# Lightness, red - green and yellow - blue, as orthonormal combinations of red, green and blue.
COLOUR_AXES = ((3**-0.5, 3**-0.5, 3**-0.5), (2**-0.5, -(2**-0.5), 0.0), (6**-0.5, 6**-0.5, -2 * 6**-0.5))


class Compared(NamedTuple):
    """One kind of features: the coefficients, or the features of one layer of the network.

    Attributes:
        draws: Those of the draws, [M, D, h, w].
        images: Those of the images, [B, D, h, w].
        means: Those of the images without texture, [B, D, h, w]; None if they are not asked for.
    """

    draws: torch.Tensor
    images: torch.Tensor
    means: torch.Tensor | None


class PolishFeatures(nn.Module):
    """Computes the features of draws and images, and mixtures of features.

    Attributes:
        sizes: The number of features of each kind that forward() returns.
    """

    def __init__(self, setting: str, channels: int = 3):
        """Loads the network, and makes the filters of the coefficients and the mixtures, which are always the same.

        Args:
            setting: The keys of the config that ask for the network, for the error message.
            channels: Colour channels of the images, 1 or 3.

        Raises:
            UserError: The network's weights are not installed.
        """
        super().__init__()
        self.network = Perceptual(setting)
        self.register_buffer("filters", _cosine_filters(channels), persistent=False)
        image = torch.zeros(1, channels, 32, 32)
        with torch.no_grad():
            found = self(image.repeat(2, 1, 1, 1), image, torch.zeros(1, dtype=torch.int64))
        self.sizes = [kind.images.shape[1] for kind in found]
        for size in set(self.sizes):
            self.register_buffer(f"mixtures_{size}", _random_orthogonal(size), persistent=False)

    def forward(
        self, draws_MCHW: torch.Tensor, x_BCHW: torch.Tensor, number_B: torch.Tensor, mean_BCHW: torch.Tensor | None = None
    ) -> list[Compared]:
        """Computes the coefficients of draws and images, and the network's features of the same enlarged part of both.

        Args:
            draws_MCHW: Two draws for each image, in about [-1, 1]: the first of all images, then the second.
            x_BCHW: The images in [-1, 1].
            number_B: An integer for each image, whose hash decides the part.
            mean_BCHW: The images without texture, if their features are asked for too. They get no gradient.

        Returns:
            The coefficients, and the features of each layer of the network, fp32. Features of an image have about the root mean
            square 1: each coefficient by itself, all features of a layer together.
        """
        with torch.no_grad():
            fixed = x_BCHW if mean_BCHW is None else torch.cat([x_BCHW, mean_BCHW.float()])
            of_fixed = self.network.features(enlarged_part(fixed, number_B.repeat(len(fixed) // len(x_BCHW))))
        of_draws = self.network.features(enlarged_part(draws_MCHW, number_B.repeat(2)))
        with torch.autocast(x_BCHW.device.type, enabled=False):
            coefficients = [F.conv2d(images, self.filters) for images in (draws_MCHW.float(), fixed)]
        layers = [_scaled(*layer, _size_of_all, len(x_BCHW)) for layer in zip(of_draws, of_fixed, strict=True)]
        return [_scaled(*coefficients, _size_of_each, len(x_BCHW)), *layers]

    def mixed(self, h_BDhw: torch.Tensor) -> torch.Tensor:
        """Returns D mixtures of the features of each place: their products with a fixed random orthogonal matrix."""
        return torch.einsum("bchw,dc->bdhw", h_BDhw, self.get_buffer(f"mixtures_{h_BDhw.shape[1]}")).float()


def style(h_BDhw: torch.Tensor) -> torch.Tensor:
    """Returns the mean and the standard deviation of each feature over an image, [B, 2 D]."""
    mean_BD11 = h_BDhw.mean((2, 3), keepdim=True)
    variance_BD = (h_BDhw - mean_BD11).square().mean((2, 3))
    return torch.cat([mean_BD11[:, :, 0, 0], (variance_BD + 1e-6).sqrt()], 1)


def enlarged_part(x_BCHW: torch.Tensor, number_B: torch.Tensor) -> torch.Tensor:
    """Cuts a part out of each image and enlarges it to the image's size, bilinearly, by up to ZOOM.

    It is computed as products of matrices, because on a GPU the gradient of grid_sample differs from run to run.

    Args:
        x_BCHW: The images.
        number_B: An integer for each image, whose hash decides the part.

    Returns:
        fp32, of the shape of the images.
    """
    share_B, *from_edge = (hashed(3 * number_B + k) / 2**32 for k in range(3))
    zoom_B = ZOOM**share_B
    weights = []
    for size, where_B in zip(x_BCHW.shape[-2:], from_edge, strict=True):
        pixel_N = torch.arange(size, device=x_BCHW.device)
        place_BN = (where_B * (size - size / zoom_B))[:, None] + (pixel_N + 0.5) / zoom_B[:, None] - 0.5
        weights.append((1 - (place_BN.clamp(0, size - 1)[:, :, None] - pixel_N).abs()).relu()[:, None])
    with torch.autocast(x_BCHW.device.type, enabled=False):
        return weights[0] @ x_BCHW.float() @ weights[1].transpose(2, 3)


def _cosine_filters(channels: int) -> torch.Tensor:
    """Returns the filters of the cosine coefficients of 3 × 3 pixels for each axis of colour, [9 channels, channels, 3, 3]."""
    place = torch.arange(3)
    wave_FN = torch.cos(torch.pi * place[:, None] * (place + 0.5) / 3)
    wave_FN = wave_FN / wave_FN.norm(dim=1, keepdim=True)
    axes_DC = torch.tensor(COLOUR_AXES if channels == 3 else ((1.0,),))
    return torch.einsum("dc,fy,gx->dfgcyx", axes_DC, wave_FN, wave_FN).flatten(0, 2)


def _random_orthogonal(size: int) -> torch.Tensor:
    """Returns a random orthogonal matrix, always the same one, fp32 [size, size]."""
    gaussian = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    return torch.linalg.qr(gaussian)[0]


def _size_of_each(h_BDhw: torch.Tensor) -> torch.Tensor:
    """Returns the root mean square of each coefficient over an image, [B, D, 1, 1].

    Scaled by it, the finest details of colour, which are faint in photographs, count nearly as much as others.
    """
    return h_BDhw.square().mean((2, 3), keepdim=True).sqrt() + FAINT


def _size_of_all(h_BDhw: torch.Tensor) -> torch.Tensor:
    """Returns the root mean square of the features of a place, averaged over the places of an image, [B, 1, 1, 1].

    Features that were scaled to the length 1 at each place, as in a perceptual distance, would lose their size, so that a draw
    with far too large features would not be penalised.
    """
    return h_BDhw.square().mean(1, keepdim=True).sqrt().mean((2, 3), keepdim=True) + 1e-8


def _scaled(
    of_draws: torch.Tensor, of_fixed: torch.Tensor, size_of: Callable[[torch.Tensor], torch.Tensor], images: int
) -> Compared:
    """Divides one kind of features by their size in the image; those of draws and of the mean image by that of their image.

    Args:
        of_draws: Features of the draws.
        of_fixed: Features of the images, and of the images without texture if they are asked for.
        size_of: Computes the size.
        images: The number of images.
    """
    of_images, of_means = of_fixed[:images], of_fixed[images:]
    size = size_of(of_images)
    return Compared(of_draws / size.repeat(2, 1, 1, 1), of_images / size, of_means / size if len(of_means) else None)
