"""The loss of polishing: the energy score, which is smallest when a decoder's draws are distributed as the images are.

For an image x and two draws a and b from the same codes, the score is (|a - x| + |b - x|) / 2 - |a - b| / 2. Its expectation
is smallest if draws and images with these codes have one distribution (Gneiting and Raftery 2007, Strictly proper scoring
rules; the two-sample estimate is that of Gritsenko et al. 2020, arXiv:2008.01160). A loss without the last term, such as MSE,
is smallest for the mean of these images, which is blurred.

The score is that of the colour of each pixel, of each feature of a network at each place, and of the mean and the standard
deviation of each feature over an image (the statistics of Huang and Belongie 2017, arXiv:1703.06868). The first two teach
local texture. The last teaches what differs between whole images: a photograph is grainy or smooth all over. Features are
compared one by one: for long vectors the score hardly sees more than mean and total variance (Pinson and Tastu 2013,
Discrimination ability of the energy score), and a few bold strokes have the variance of fine grain all over.

The score does not say which part of a draw is the decoder's image and which is texture. A decoder that is free in this becomes
violet or dark, and texture, which is lightness alone, repairs it in part. So the squared error of the decoder's image without
texture counts too: it is smallest for the mean of the images with these codes.

The score hardly sees what is rare: a fault that a draw has with the probability p costs p², because the other draw lacks it. So
texture that is larger than any in photographs is penalised by itself. Bounds of texture in its place, such as tanh, have
no gradient far beyond them, and patches that got there never came back.

In training, draws and image are shifted together by a few pixels, for each image another way. The network sees every second
pixel, or fewer, so a decoder that was always compared at the same places learns a lattice of dots.
"""

from dataclasses import dataclass

import torch
from torch import nn

from lesiongen.tokenizers.perceptual import Perceptual
from lesiongen.tokenizers.texture import hashed

SHIFT = 4  # the largest shift, in pixels, in each of the four directions
# A sound decoder scores less in each term: pixels of -1 and of 1 have the distance 2, and features have root mean squares of 1.
LARGEST = 4.0
LARGE_TEXTURE = 0.4  # texture that is larger, in pixels of [-1, 1], is hardly found in photographs


@dataclass(frozen=True)
class PolishLossConfig:
    """Weights of the loss's terms. A term of weight 0 is not computed."""

    pixels: float = 12.0  # the colour of each pixel: features hardly see a wrong one
    features: float = 1.0  # each feature of EfficientNet-Lite1, at each place of each compared layer
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
        self, mean_BCHW: torch.Tensor, draws_MCHW: torch.Tensor, x_BCHW: torch.Tensor, shift_B: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict]:
        """Returns the mean loss of a batch, and its terms {name: detached scalar}.

        Args:
            mean_BCHW: The decoder's images without texture.
            draws_MCHW: Two draws for each image, M = 2 B, in about [-1, 1]: the first of all images, then the second.
            x_BCHW: The images in [-1, 1].
            shift_B: An integer for each image, whose hash decides how far it and its draws are shifted; None shifts nothing.
        """
        terms = {}
        if self.config.mean:
            terms["mean"] = (mean_BCHW.float() - x_BCHW).square().mean()
        if self.config.excess:
            texture_MCHW = draws_MCHW.float() - mean_BCHW.float().repeat(2, 1, 1, 1)
            terms["excess"] = (texture_MCHW.abs() - LARGE_TEXTURE).relu().square().mean()
        if shift_B is not None:
            draws_MCHW, x_BCHW = _shifted(draws_MCHW, shift_B.repeat(2)), _shifted(x_BCHW, shift_B)
        if self.config.pixels:
            terms["pixels"] = _score(draws_MCHW.float(), x_BCHW) / x_BCHW.shape[1] ** 0.5
        for network in self.networks:
            network.to(x_BCHW.device)
            with torch.no_grad():
                of_images = network.features(x_BCHW)
            pairs = list(map(_scaled, network.features(draws_MCHW), of_images))
            if self.config.features:
                terms["features"] = torch.stack([_score_of_each(*pair) for pair in pairs]).mean()
            if self.config.style:
                terms["style"] = torch.stack([_score_of_each(*map(_style, pair)) for pair in pairs]).mean()
        loss = torch.stack([getattr(self.config, name) * score for name, score in terms.items()]).sum()
        return loss, {name: score.detach() for name, score in terms.items()}


def _shifted(x_BCHW: torch.Tensor, shift_B: torch.Tensor) -> torch.Tensor:
    """Shifts images by up to SHIFT pixels down or up, and right or left; what an edge leaves free is filled by reflection."""
    channels, *sizes = x_BCHW.shape[1:]
    for axis, size in enumerate(sizes):
        offset_B = hashed(2 * shift_B + axis) % (2 * SHIFT + 1) - SHIFT
        place_BN = torch.arange(size, device=x_BCHW.device) + offset_B[:, None]
        place_BN = size - 1 - (size - 1 - place_BN.abs()).abs()  # reflected at the first and at the last pixel
        where = place_BN[:, None, :, None] if axis == 0 else place_BN[:, None, None, :]
        x_BCHW = x_BCHW.gather(2 + axis, where.expand(-1, channels, *sizes))
    return x_BCHW


def _scaled(of_draws: torch.Tensor, of_images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales the features of one layer, so that those of each image have about the root mean square 1; draws as their image.

    A length of 1 at each place, as in a perceptual distance, would hide how far from any image a draw is.
    """
    size_B = of_images.square().mean(1).sqrt().mean((1, 2)) + 1e-8
    return of_draws / size_B.repeat(2)[:, None, None, None], of_images / size_B[:, None, None, None]


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
