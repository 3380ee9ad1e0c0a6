"""The critic of polishing: a network that learns to tell draws from images, while draws learn to be taken for images.

The energy score compares what someone has chosen: single features, and fixed mixtures of them. What it does not compare stays
wrong, such as thin cracks on skin. The critic learns what still tells draws and images apart, as the discriminator of a
generative adversarial network does (Goodfellow et al. 2014, arXiv:1406.2661; hinge losses of Lim and Ye 2017,
arXiv:1705.02894).

It judges the features that the score compares, not pixels: behind a frozen network it learns faster (Sauer et al. 2021,
Projected GANs converge faster, arXiv:2111.01007). It judges each place of each layer, and is given the same features of the
image without texture too. So it judges whether the texture fits this image, not whether there are many such images. The
critic also judges whether the texture fits the label: the judgement is the sum of two products of the same hidden features,
with a filter that all images share and with that of the image's label (Miyato and Koyama 2018, cGANs with projection
discriminator, arXiv:1802.05637).

One engine trains both sides. The critic learns from draws that are held fixed. Other draws of the same images learn from a
critic that is held fixed. So the gradient of the sum of the two terms is that of each side by itself, one optimizer step moves
both, and a step is accepted, skipped, saved and resumed for both. Clipping scales both gradients by one factor, which with
Adam changes the length of neither side's steps much.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lesiongen.tokenizers.polish_features import Compared

WIDTH = 64  # channels of the hidden layers
SLOPE = 0.2  # of the leaky ReLU below 0
# The critic's filters learn so many times as fast as other weights. Without it, draws had curls like folds of foil, which no
# photograph has and the critic did not learn in time. Two time scales: Heusel et al. 2017, arXiv:1706.08500.
SPEED = 4.0


class Critic(nn.Module):
    """A small convolutional network for each kind of features."""

    def __init__(self, sizes: list[int], classes: int):
        """Builds it.

        Args:
            sizes: The number of features of each kind.
            classes: The number of labels.
        """
        super().__init__()
        # The first kind are the coefficients, which have a place for each pixel. With stride 2 they are a quarter of the work.
        # The other judges have stride 1: on maps of one pixel, convolutions of stride 2 in bf16 have returned NaN on CPUs.
        self.judges = nn.ModuleList(_Judge(size, classes, stride=1 if number else 2) for number, size in enumerate(sizes))

    def forward(self, compared: list[Compared], label_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the critic's loss and the draws' loss, scalars. All kinds of features count alike.

        The first leads the critic to judge images above 1 and first draws below -1. The second leads second draws to be judged
        high; its gradient does not reach the critic.

        Args:
            compared: Features of two draws of each image, of the images, and of the images without texture.
            label_B: The label that the decoder was told of each image; -1 for none.
        """
        learning, fooling = [], []
        for judge, (of_draws, of_images, of_means) in zip(self.judges, compared, strict=True):
            first, second = of_draws.chunk(2)
            seen = torch.cat([of_images, first.detach()])
            image, draw = judge(seen, of_means.repeat(2, 1, 1, 1), label_B.repeat(2), learns=True).chunk(2)
            learning.append((F.relu(1 - image).mean() + F.relu(1 + draw).mean()) / 2)
            fooling.append(-judge(second, of_means, label_B, learns=False).mean())
        return torch.stack(learning).mean(), torch.stack(fooling).mean()


class _Judge(nn.Module):
    """Judges each place of one kind of features."""

    def __init__(self, size: int, classes: int, stride: int):
        super().__init__()
        self.of_features = _Filters(2 * size, WIDTH, 1)
        self.of_places = _Filters(WIDTH, WIDTH, 3, stride)
        self.last = _Filters(WIDTH, 1 + classes + 1, 1)  # for no label, for each label, for all images

    def forward(self, h_BDhw: torch.Tensor, mean_BDhw: torch.Tensor, label_B: torch.Tensor, learns: bool) -> torch.Tensor:
        """Returns the judgements, fp32 [B, 1, h / stride, w / stride]. learns: whether the weights get a gradient."""
        h = F.leaky_relu(self.of_features(torch.cat([h_BDhw, mean_BDhw], 1), learns), SLOPE)
        h = F.leaky_relu(self.of_places(h, learns), SLOPE)
        judgements = self.last(h, learns)
        own = judgements[torch.arange(len(h), device=h.device), 1 + label_B][:, None]
        return (judgements[:, -1:].float() + own.float()) / 2**0.5  # about as large as one of them


class _Filters(nn.Module):
    """A convolution whose filters have the norm 1, so that judgements cannot become steep without limit.

    It reads its weights in its own forward(), because under ZeRO 3 they are whole there alone.
    """

    def __init__(self, inputs: int, outputs: int, side: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        # The optimizer's steps have one length, so they turn the shorter weights of these filters farther than those of norm 1.
        self.weight = nn.Parameter(torch.randn(outputs, inputs, side, side) / (inputs * side**2) ** 0.5 / SPEED)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor, learns: bool) -> torch.Tensor:
        """Returns the convolution, [B, D, h / stride, w / stride]. learns: whether the weights get a gradient."""
        weight, bias = (value if learns else value.detach() for value in (self.weight, self.bias))
        unit = F.normalize(weight.flatten(1), dim=1).view_as(weight)
        return F.conv2d(x, unit, bias, self.stride, padding=weight.shape[-1] // 2)
