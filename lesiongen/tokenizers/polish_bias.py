"""The bias of draws: by how much their statistics differ, on average over many images, from those of the images.

The energy score compares the draws of one image with this image. A small error that the draws of all images share costs little
there, beside the differences among images with the same codes. But sets of draws and of images stay apart by it. So shared
errors are minimised by themselves, as in generators that match the mean features of images (Santos et al. 2019, Learning
implicit generative models by matching perceptual features, arXiv:1904.02762).

The errors of one batch are mostly its own. So their mean is a moving average over batches. The term of a batch is the product
of the moving average and of the batch's errors: on average over batches it is the squared bias, though that of one batch may be
negative. The moving average is held fixed, so the gradient leads all draws against the bias. The sums are added over
micro-batches and ranks, so neither changes the training.

Shapes: B images, K statistics of all kinds.
"""

import torch
from torch import nn

HALF_LIFE = 400  # of the moving averages, in images
# Added to the variance of a statistic, because some hardly differ between images: a share of the mean variance of its kind, and
# a constant, for features whose root mean square in an image is about 1.
LEAST_SHARE, LEAST = 0.1, 1e-4

Pair = tuple[torch.Tensor, torch.Tensor]  # statistics of draws [2 B, …], and of their images [B, …]


class Bias(nn.Module):
    """Computes the squared bias of the draws, relative to the variance of each statistic among images."""

    def __init__(self, sizes: list[int]):
        """Starts with averages of no images.

        Args:
            sizes: The number of statistics of each kind. All kinds count alike.
        """
        super().__init__()
        self.sizes = sizes
        self.register_buffer("averages", torch.zeros(3, sum(sizes)))  # of errors, of images' statistics and of their squares
        self.register_buffer("share", torch.zeros(()))  # of the averages that is of images, not of the zeros at the start

    def forward(self, pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the term, a scalar, and the batch's sums, the input of update().

        The term is the mean over statistics of e² / (v + e²), about, where e is the bias and v the variance. So it is bounded.

        Args:
            pairs: Statistics of each kind: of draws, the first of all images, then the second; and of the images.
        """
        errors, of_images = [], []
        for of_draws, x in pairs:
            errors.append(torch.stack(of_draws.chunk(2)).mean(0) - x)
            of_images.append(x)
        error_BK, x_BK = torch.cat(errors, 1), torch.cat(of_images, 1).detach()
        product_K = self._direction() * error_BK.mean(0)
        term = torch.stack([part.mean() for part in product_K.split(self.sizes)]).mean()
        moments = torch.stack([error_BK.detach(), x_BK, x_BK.square()]).sum(1)
        return term, torch.cat([moments.flatten(), moments.new_full((1,), len(x_BK))])

    @torch.no_grad()
    def update(self, sums: torch.Tensor) -> None:
        """Adds the sums of a global batch to the averages."""
        number = sums[-1]
        new = 1 - 0.5 ** (number / HALF_LIFE)
        self.averages.lerp_(sums[:-1].view_as(self.averages) / number, new)
        self.share.lerp_(torch.ones_like(self.share), new)

    def _direction(self) -> torch.Tensor:
        """Returns e / (v + e²) of each statistic, [K]; 0 before the first update."""
        error_K, mean_K, square_K = self.averages / self.share.clamp(min=1e-8)
        variances = (square_K - mean_K.square()).clamp(min=0).split(self.sizes)
        variance_K = torch.cat([variance + LEAST_SHARE * variance.mean() + LEAST for variance in variances])
        return error_K / (variance_K + error_K.square())
