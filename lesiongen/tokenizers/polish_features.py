"""Features of draws and images, which the loss of polishing compares.

Two kinds: cosine coefficients of 3 × 3 pixels, as in JPEG, and the features of EfficientNet-Lite1. That network sees every
second pixel, or fewer. A decoder that was compared by it alone, on whole images, learned what is invisible there: a lattice of
violet and green, or a checkerboard. So the network sees a part of each image, another one each time, which is enlarged by up to
two, and the coefficients see each pixel.

Shapes: B images, M = 2 B draws of them, C channels, H × W pixels.
"""

from functools import cache

import torch
import torch.nn.functional as F

from lesiongen.tokenizers.perceptual import Perceptual
from lesiongen.tokenizers.texture import hashed

ZOOM = 2.0  # the largest enlargement
FAINT = 0.01  # coefficients of this size and smaller are rounding, in pixels of [-1, 1]
# Lightness, red - green and yellow - blue, as orthonormal combinations of red, green and blue.
COLOUR_AXES = ((3**-0.5, 3**-0.5, 3**-0.5), (2**-0.5, -(2**-0.5), 0.0), (6**-0.5, 6**-0.5, -2 * 6**-0.5))

Pair = tuple[torch.Tensor, torch.Tensor]  # features of draws [M, D, h, w], and of their images [B, D, h, w]


def features_of_both(network: Perceptual, draws_MCHW: torch.Tensor, x_BCHW: torch.Tensor, number_B: torch.Tensor) -> list[Pair]:
    """Computes features of the same places of draws and images.

    Args:
        network: The network.
        draws_MCHW: Two draws for each image, in about [-1, 1]: the first of all images, then the second.
        x_BCHW: The images in [-1, 1].
        number_B: An integer for each image, whose hash decides the part of it and of its draws that the network sees.

    Returns:
        A pair for the coefficients, and one for each layer of the network, fp32. Features have about the root mean square 1 in
        each image: each coefficient by itself, all features of a layer together.
    """
    details = _details(draws_MCHW.float(), x_BCHW)
    network.to(x_BCHW.device)
    with torch.no_grad():
        of_images = network.features(enlarged_part(x_BCHW, number_B))
    of_draws = network.features(enlarged_part(draws_MCHW, number_B.repeat(2)))
    return [details, *map(_scaled, of_draws, of_images)]


def mixed(h_BDhw: torch.Tensor) -> torch.Tensor:
    """Returns as many mixtures of features as there are features: always the same random rotation of those of each place."""
    return torch.einsum("bchw,dc->bdhw", h_BDhw, _rotation(h_BDhw.shape[1]).to(h_BDhw.device)).float()


def style(h_BDhw: torch.Tensor) -> torch.Tensor:
    """Returns the mean and the standard deviation of each feature over an image, [B, 2 D]."""
    mean_BD11 = h_BDhw.mean((2, 3), keepdim=True)
    variance_BD = (h_BDhw - mean_BD11).square().mean((2, 3))
    return torch.cat([mean_BD11[:, :, 0, 0], (variance_BD + 1e-6).sqrt()], 1)


def enlarged_part(x_BCHW: torch.Tensor, number_B: torch.Tensor) -> torch.Tensor:
    """Cuts a part out of each image and enlarges it to the image's size, bilinearly, by up to ZOOM.

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


def _details(draws_MCHW: torch.Tensor, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosine coefficients of the 3 × 3 pixels around each, along each axis of colour, as features of draws and images.

    Each coefficient is scaled so that it has about the root mean square 1 in each image; draws as their image. So the finest
    details of colour, which are faint in photographs, count as much as others.
    """
    channels = x_BCHW.shape[1]
    place = torch.arange(3, device=x_BCHW.device)
    wave_FN = torch.cos(torch.pi * place[:, None] * (place + 0.5) / 3)
    wave_FN = wave_FN / wave_FN.norm(dim=1, keepdim=True)
    axes_DC = torch.tensor(COLOUR_AXES, device=x_BCHW.device) if channels == 3 else torch.eye(channels, device=x_BCHW.device)
    with torch.autocast(x_BCHW.device.type, enabled=False):
        filters = torch.einsum("dc,fy,gx->dfgcyx", axes_DC, wave_FN, wave_FN).flatten(0, 2)
        of_draws, of_images = (F.conv2d(x, filters) for x in (draws_MCHW, x_BCHW))
    size_BD11 = of_images.square().mean((2, 3), keepdim=True).sqrt() + FAINT
    return of_draws / size_BD11.repeat(2, 1, 1, 1), of_images / size_BD11


def _scaled(of_draws: torch.Tensor, of_images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales the features of one layer, so that those of each image have about the root mean square 1; draws as their image.

    A length of 1 at each place, as in a perceptual distance, would hide how far from any image a draw is.
    """
    size_B = of_images.square().mean(1).sqrt().mean((1, 2)) + 1e-8
    return of_draws / size_B.repeat(2)[:, None, None, None], of_images / size_B[:, None, None, None]


@cache
def _rotation(size: int) -> torch.Tensor:
    """Returns a random rotation, always the same one, fp32 [size, size]."""
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(size)))[0]
