"""The energy score: a loss for decoders that draw, smallest when draws are distributed as the images are.

For an image x and two draws a and b from the same codes, the score is (|a - x| + |b - x|) / 2 - |a - b| / 2. Its expectation
is smallest if draws and images with these codes have one distribution (Gneiting and Raftery 2007, Strictly proper scoring
rules; the two-sample estimate is that of Gritsenko et al. 2020, arXiv:2008.01160). A loss without the last term, such as MSE,
is smallest for the mean of these images, which is blurred.

The norms are those of small patches of pixels, of the features of a network at each place, and of the means and standard
deviations of these features over an image (the statistics of Huang and Belongie 2017, arXiv:1703.06868). The first two teach
local texture. The last teaches what differs between whole images: a photograph is grainy or smooth all over.

In training, draws and image are shifted together by a few pixels, for each image another way. Patches and the network see every
second pixel, or fewer, so a decoder that was always compared at the same places learns a lattice of dots.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lesiongen.tokenizers.perceptual import Perceptual
from lesiongen.tokenizers.texture import hashed

PATCH, STRIDE = 4, 2  # pixels
SHIFT = 4  # the largest shift, in pixels, in each of the four directions
# A sound decoder scores less in each term: patches of -1 and of 1 have the distance 2, and so have opposite unit vectors.
LARGEST = 4.0


@dataclass(frozen=True)
class EnergyConfig:
    """Weights of the score's terms. A term of weight 0 is not computed."""

    pixels: float = 12.0  # patches of 4 × 4 pixels: they see wrong colours, which features hardly see
    features: float = 1.0  # features of EfficientNet-Lite1, at each place of each compared layer
    style: float = 2.0  # means and standard deviations of these features over an image

    def __post_init__(self):
        weights = (self.pixels, self.features, self.style)
        if min(weights) < 0 or not any(weights):
            raise ValueError("pixels, features and style must be at least 0, and one of them above 0")


class EnergyScore(nn.Module):
    """The weighted sum of the scores of patches, of features and of style.

    Make it before the engine builds the model: under ZeRO 3, weights that are made meanwhile are divided among the ranks.
    """

    def __init__(self, config: EnergyConfig):
        """Loads the network of the features. Raises UserError if its weights are not installed."""
        super().__init__()
        self.config = config
        # In a tuple, so that the network is not a submodule: an engine would shard its weights and checkpoints would hold them.
        needed = config.features or config.style
        self.networks = (Perceptual("each of polish.loss.features and polish.loss.style"),) if needed else ()

    @property
    def worst(self) -> float:
        """A value that the score of no sound decoder exceeds."""
        return LARGEST * (self.config.pixels + self.config.features + self.config.style)

    def forward(
        self, a_BCHW: torch.Tensor, b_BCHW: torch.Tensor, x_BCHW: torch.Tensor, shift_B: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict]:
        """Returns the mean score of a batch, and its terms {name: detached scalar}.

        Args:
            a_BCHW: A draw for each image, in about [-1, 1].
            b_BCHW: Another draw for each image, from the same codes.
            x_BCHW: The images in [-1, 1].
            shift_B: An integer for each image, whose hash decides how far it and its draws are shifted; None shifts nothing.
        """
        terms = {}
        draws = torch.cat([a_BCHW, b_BCHW])
        if shift_B is not None:
            draws, x_BCHW = _shifted(draws, shift_B.repeat(2)), _shifted(x_BCHW, shift_B)
        if self.config.pixels:
            terms["pixels"] = _score(_patches(draws), _patches(x_BCHW))
        for network in self.networks:
            network.to(x_BCHW.device)
            with torch.no_grad():
                of_images = network.features(x_BCHW)
            pairs = list(map(_scaled, network.features(draws), of_images))
            if self.config.features:
                terms["features"] = torch.stack([_score(*pair) for pair in pairs]).mean()
            if self.config.style:
                terms["style"] = torch.stack([_score(*map(_style, pair)) for pair in pairs]).mean()
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
    """Scales the features of one layer, so that those of each image have the mean length 1; draws are scaled as their image is.

    A length of 1 at each place, as in a perceptual distance, would hide how far from any image a draw is.
    """
    length_B = of_images.square().sum(1).sqrt().mean((1, 2)) + 1e-8
    return of_draws / length_B.repeat(2)[:, None, None, None], of_images / length_B[:, None, None, None]


def _score(draws_MDN: torch.Tensor, x_BDN: torch.Tensor) -> torch.Tensor:
    """Returns the mean score of vectors along dimension 1; the first half of M = 2B are the draws a, the second the draws b."""
    a, b = draws_MDN.chunk(2)
    return (_distance(a, x_BDN) + _distance(b, x_BDN) - _distance(a, b)) / 2


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns the mean Euclidean distance along dimension 1. Its gradient is finite where the vectors are equal."""
    return ((a - b).square().sum(1) + 1e-8).sqrt().mean()


def _style(h_BCHW: torch.Tensor) -> torch.Tensor:
    """Returns the mean and the standard deviation of each channel over an image, [B, 2 C, 1]."""
    h_BCN = h_BCHW.flatten(2)
    mean_BC1 = h_BCN.mean(2, keepdim=True)
    variance_BC1 = (h_BCN - mean_BC1).square().mean(2, keepdim=True)
    return torch.cat([mean_BC1, (variance_BC1 + 1e-6).sqrt()], 1)


def _patches(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Returns the patches of the images, scaled to root mean squares, [B, C · PATCH², patches]."""
    return F.unfold(x_BCHW.float(), PATCH, stride=STRIDE) / (x_BCHW.shape[1] * PATCH**2) ** 0.5
