"""The loss of polishing, above all the energy score, which is smallest when draws are distributed as the images are.

For an image x and two draws a and b from the same codes, the score is (|a - x| + |b - x|) / 2 - |a - b| / 2. Its expectation
is smallest if draws and images with these codes have one distribution (Gneiting and Raftery 2007, Strictly proper scoring
rules; the two-sample estimate is that of Gritsenko et al. 2020, arXiv:2008.01160). A loss without the last term, such as MSE,
is smallest for the mean of these images, which is blurred.

The score is that of the colour of each pixel, of each feature (polish_features.py) at each place, and of the mean and the
standard deviation of each feature over an image (the statistics of Huang and Belongie 2017, arXiv:1703.06868). The first two
teach local texture. The last teaches what differs between whole images: a photograph is grainy or smooth all over. Features
are compared one by one: for long vectors the score hardly sees more than mean and total variance (Pinson and Tastu 2013,
Discrimination ability of the energy score), and a few bold strokes have the variance of fine grain all over. Which features go
together, such as dark and brown, is seen in mixtures of them, compared one by one too. All mixtures would decide the
distribution (Cramér and Wold 1936; sliced distances, Bonneel et al. 2015); the loss has as many as there are features.

The score does not say which part of a draw is the decoder's image and which is texture. A decoder that is free in this becomes
violet or dark, and texture repairs it in part. So the squared error of the decoder's image without texture counts too: it is
smallest for the mean of the images with these codes.

The score hardly sees what is rare: a fault that a draw has with the probability p costs p², because the other draw lacks it. So
texture that is larger than any in photographs is penalised by itself. Bounds of texture in its place, such as tanh, have
no gradient far beyond them, and patches that got there never came back.

The score sees only what it compares. A critic learns what else tells draws from images (polish_critic.py).
"""

from dataclasses import dataclass

import torch
from torch import nn

from lesiongen.tokenizers.polish_critic import Critic
from lesiongen.tokenizers.polish_features import PolishFeatures, style

# A sound decoder scores less in each term: pixels of -1 and of 1 have the distance 2, and features of images have about the
# root mean square 1. Those of draws may have more where the image is black.
LARGEST = 4.0
CRITIC = 1.0  # weight of the critic's own loss; with Adam the size of a gradient that reaches nothing else hardly matters
LARGE_TEXTURE = 0.4  # texture that is larger, in pixels of [-1, 1], is hardly found in photographs


@dataclass(frozen=True)
class PolishLossConfig:
    """Weights of the loss's terms. A term of weight 0 is not computed."""

    pixels: float = 12.0  # the colour of each pixel: features hardly see a wrong one
    features: float = 1.0  # each cosine coefficient, each feature of EfficientNet-Lite1, and as many mixtures, at each place
    style: float = 2.8  # mean and standard deviation over an image, of each coefficient and each feature
    mean: float = 60.0  # squared error of the image without texture; like the next, not a term of the score
    adversarial: float = 0.1  # minus the critic's mean judgement of draws (polish_critic.py), in training alone; 0 = no critic
    excess: float = 100.0  # square of what texture exceeds 0.4 by

    def __post_init__(self):
        score = (self.pixels, self.features, self.style)
        if min(*score, self.mean, self.adversarial, self.excess) < 0 or not any(score):
            raise ValueError("each weight must be at least 0, and one of pixels, features and style above 0")


class PolishLoss(nn.Module):
    """The weighted sum of the scores of pixels, features and style, and of two penalties.

    In training, the critic's judgement of draws and the critic's own loss are added. The held-out loss has neither.

    Make it before the engine builds the model: under ZeRO 3, weights that are made meanwhile are divided among the ranks.

    Attributes:
        critic: The critic, which trains with the decoder; None if its weight is 0.
    """

    def __init__(self, config: PolishLossConfig, classes: int, channels: int = 3):
        """Loads the network of the features.

        Args:
            config: The weights.
            classes: The number of labels.
            channels: Colour channels of the images, 1 or 3.

        Raises:
            UserError: The network's weights are not installed.
        """
        super().__init__()
        self.config = config
        # In a tuple, so that the network is not a submodule: an engine would shard its weights and checkpoints would hold them.
        settings = "each of polish.loss.features, polish.loss.style and polish.loss.adversarial"
        needed = config.features or config.style or config.adversarial
        self.features = (PolishFeatures(settings, channels),) if needed else ()
        self.critic = Critic(self.features[0].sizes, classes) if config.adversarial else None

    @property
    def worst(self) -> float:
        """A value that the held-out loss of no sound decoder exceeds."""
        return LARGEST * (sum(vars(self.config).values()) - self.config.adversarial)

    def forward(
        self,
        mean_BCHW: torch.Tensor,
        draws_MCHW: torch.Tensor,
        x_BCHW: torch.Tensor,
        number_B: torch.Tensor,
        label_B: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict]:
        """Returns the mean loss of a batch, and its terms {name: detached scalar}; "compared" is the loss without the critic.

        Args:
            mean_BCHW: The decoder's images without texture.
            draws_MCHW: Two draws for each image, M = 2 B, in about [-1, 1]: the first of all images, then the second.
            x_BCHW: The images in [-1, 1].
            number_B: An integer for each image, whose hash decides the part of it and of its draws whose features are compared.
            label_B: The label that the decoder was told of each image, -1 for none; for the critic, in training. With None the
                critic takes no part, as in the held-out loss, because it changes meanwhile.
        """
        terms = {}
        judged = label_B is not None and self.critic is not None
        if self.config.mean:
            terms["mean"] = (mean_BCHW.float() - x_BCHW).square().mean()
        if self.config.excess:
            texture_MCHW = draws_MCHW.float() - mean_BCHW.float().repeat(2, 1, 1, 1)
            terms["excess"] = (texture_MCHW.abs() - LARGE_TEXTURE).relu().square().mean()
        if self.config.pixels:
            terms["pixels"] = _score(draws_MCHW.float(), x_BCHW) / x_BCHW.shape[1] ** 0.5
        for features in self.features:
            compared = features.to(x_BCHW.device)(draws_MCHW, x_BCHW, number_B, mean_BCHW if judged else None)
            pairs = [(kind.draws, kind.images) for kind in compared]
            if self.config.features:
                mixtures = [(features.mixed(of_draws), features.mixed(of_images)) for of_draws, of_images in pairs]
                terms["features"] = torch.stack([_score_of_each(*pair) for pair in pairs + mixtures]).mean()
            if self.config.style:
                terms["style"] = torch.stack([_score_of_each(*map(style, pair)) for pair in pairs]).mean()
        weights = vars(self.config)
        loss = terms["compared"] = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        if judged:
            terms["critic"], terms["adversarial"] = self.critic(compared, label_B)
            loss = loss + CRITIC * terms["critic"] + weights["adversarial"] * terms["adversarial"]
        return loss, {name: term.detach() for name, term in terms.items()}


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
