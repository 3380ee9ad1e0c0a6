"""The loss of polishing: the energy score, which is smallest when a decoder's draws are distributed as the images are.

For an image x and two draws a and b from the same codes, the score is (|a - x| + |b - x|) / 2 - |a - b| / 2. Its expectation
is smallest if draws and images with these codes have one distribution (Gneiting and Raftery 2007, Strictly proper scoring
rules; the two-sample estimate is that of Gritsenko et al. 2020, arXiv:2008.01160). A loss without the last term, such as MSE,
is smallest for the mean of these images, which is blurred.

The score is that of the colour of each pixel, of each feature of a network at each place, and of the mean and the standard
deviation of each feature over an image (the statistics of Huang and Belongie 2017, arXiv:1703.06868). The first two teach
local texture. The last teaches what differs between whole images: a photograph is grainy or smooth all over. Features are
compared one by one: for long vectors the score hardly sees more than mean and total variance (Pinson and Tastu 2013,
Discrimination ability of the energy score), and a few bold strokes have the variance of fine grain all over. Which features
go together, such as darkness and brown, is seen in mixtures of them, compared one by one too: two distributions are equal if
they are equal along all directions (Cramér and Wold 1936; sliced distances, Bonneel et al. 2015).

The score does not say which part of a draw is the decoder's image and which is texture. A decoder that is free in this becomes
violet or dark, and texture repairs it in part. So the squared error of the decoder's image without texture counts too: it is
smallest for the mean of the images with these codes.

The score hardly sees what is rare: a fault that a draw has with the probability p costs p², because the other draw lacks it. So
texture that is larger than any in photographs is penalised by itself. Bounds of texture in its place, such as tanh, have
no gradient far beyond them, and patches that got there never came back.

The network sees every second pixel, or fewer. A decoder that is always compared at the same places learns a lattice of dots, or
a checkerboard, which is invisible there. So the features are those of a part of draws and image, for each image another
one, which is enlarged to the image's size by up to two.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from lesiongen.tokenizers.perceptual import Perceptual
from lesiongen.tokenizers.texture import hashed

ZOOM = 2.0  # the largest enlargement of the part whose features are compared
# A sound decoder scores less in each term: pixels of -1 and of 1 have the distance 2, and features have root mean squares of 1.
LARGEST = 4.0
LARGE_TEXTURE = 0.4  # texture that is larger, in pixels of [-1, 1], is hardly found in photographs


@dataclass(frozen=True)
class PolishLossConfig:
    """Weights of the loss's terms. A term of weight 0 is not computed."""

    pixels: float = 12.0  # the colour of each pixel: features hardly see a wrong one
    features: float = 1.0  # each feature of EfficientNet-Lite1 and as many mixtures, at each place of each compared layer
    style: float = 2.8  # mean and standard deviation of each of these features over an image
    mean: float = 60.0  # squared error of the image without texture; like the next, not a term of the score
    excess: float = 100.0  # square of what texture exceeds 0.4 by

    def __post_init__(self):
        score = (self.pixels, self.features, self.style)
        if min(*score, self.mean, self.excess) < 0 or not any(score):
            raise ValueError("pixels, features, style, mean and excess must be at least 0, and one of the first three above 0")


class PolishLoss(nn.Module):
    """The weighted sum of the scores of pixels, features and style, and of two penalties.

    Make it before the engine builds the model: under ZeRO 3, weights that are made meanwhile are divided among the ranks.
    """

    def __init__(self, config: PolishLossConfig):
        """Loads the network of the features. Raises UserError if its weights are not installed."""
        super().__init__()
        self.config = config
        # In a tuple, so that the network is not a submodule: an engine would shard its weights and checkpoints would hold them.
        needed = config.features or config.style
        self.networks = (Perceptual("each of polish.loss.features and polish.loss.style"),) if needed else ()

    @property
    def worst(self) -> float:
        """A value that the loss of no sound decoder exceeds."""
        return LARGEST * sum(vars(self.config).values())

    def forward(
        self, mean_BCHW: torch.Tensor, draws_MCHW: torch.Tensor, x_BCHW: torch.Tensor, number_B: torch.Tensor
    ) -> tuple[torch.Tensor, dict]:
        """Returns the mean loss of a batch, and its terms {name: detached scalar}.

        Args:
            mean_BCHW: The decoder's images without texture.
            draws_MCHW: Two draws for each image, M = 2 B, in about [-1, 1]: the first of all images, then the second.
            x_BCHW: The images in [-1, 1].
            number_B: An integer for each image, whose hash decides the part of it and of its draws whose features are compared.
        """
        terms = {}
        if self.config.mean:
            terms["mean"] = (mean_BCHW.float() - x_BCHW).square().mean()
        if self.config.excess:
            texture_MCHW = draws_MCHW.float() - mean_BCHW.float().repeat(2, 1, 1, 1)
            terms["excess"] = (texture_MCHW.abs() - LARGE_TEXTURE).relu().square().mean()
        if self.config.pixels:
            terms["pixels"] = _score(draws_MCHW.float(), x_BCHW) / x_BCHW.shape[1] ** 0.5
        for network in self.networks:
            draws_MCHW, x_BCHW = enlarged_part(draws_MCHW, number_B.repeat(2)), enlarged_part(x_BCHW, number_B)
            network.to(x_BCHW.device)
            with torch.no_grad():
                of_images = network.features(x_BCHW)
            pairs = list(map(_scaled, network.features(draws_MCHW), of_images))
            if self.config.features:
                terms["features"] = torch.stack([_score_with_mixtures(*pair) for pair in pairs]).mean()
            if self.config.style:
                terms["style"] = torch.stack([_score_of_each(*map(_style, pair)) for pair in pairs]).mean()
        loss = torch.stack([getattr(self.config, name) * score for name, score in terms.items()]).sum()
        return loss, {name: score.detach() for name, score in terms.items()}


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


def _scaled(of_draws: torch.Tensor, of_images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales the features of one layer, so that those of each image have about the root mean square 1; draws as their image.

    A length of 1 at each place, as in a perceptual distance, would hide how far from any image a draw is.
    """
    size_B = of_images.square().mean(1).sqrt().mean((1, 2)) + 1e-8
    return of_draws / size_B.repeat(2)[:, None, None, None], of_images / size_B[:, None, None, None]


def _score_with_mixtures(draws_MCHW: torch.Tensor, x_BCHW: torch.Tensor) -> torch.Tensor:
    """Returns the mean score of the features of one layer and of as many mixtures of them, at each place."""
    rotation_CC = _rotation(x_BCHW.shape[1]).to(x_BCHW.device)
    mixtures = [torch.einsum("bchw,dc->bdhw", h, rotation_CC).float() for h in (draws_MCHW, x_BCHW)]
    return (_score_of_each(draws_MCHW, x_BCHW) + _score_of_each(*mixtures)) / 2


@cache
def _rotation(size: int) -> torch.Tensor:
    """Returns a random rotation, always the same one, fp32 [size, size]."""
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(size)))[0]


def _score_of_each(draws: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns the mean score of single numbers. Shapes of the images' numbers: [B, …]; of the draws': [2 B, …]."""
    return _score(draws[:, None], x[:, None])


def _score(draws: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns the mean score of vectors along dimension 1. draws: the draws a of all images, then the draws b."""
    a, b = draws.chunk(2)
    return (_distance(a, x) + _distance(b, x) - _distance(a, b)) / 2


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns the mean Euclidean distance along dimension 1. Its gradient is finite where the vectors are equal."""
    return ((a - b).square().sum(1) + 1e-8).sqrt().mean()


def _style(h_BCHW: torch.Tensor) -> torch.Tensor:
    """Returns the mean and the standard deviation of each channel over an image, [B, 2 C]."""
    mean_BC11 = h_BCHW.mean((2, 3), keepdim=True)
    variance_BC = (h_BCHW - mean_BC11).square().mean((2, 3))
    return torch.cat([mean_BC11[:, :, 0, 0], (variance_BC + 1e-6).sqrt()], 1)
