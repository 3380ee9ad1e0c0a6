"""Reconstruction losses: a weighted sum of the terms that a config names. Images x, y: [B, C, H, W] in [-1, 1].

The stage tokenizer makes a ReconstructionLoss, and its Objective uses it. All terms are computed in fp32, except
LPIPS and the perceptual distance, whose networks run under the caller's autocast.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from hpc.config import PathText, added
from hpc.errors import UserError
from lesiongen.data.similarity import ms_ssim, ssim
from lesiongen.tokenizers.perceptual import Perceptual


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss's terms. A term of weight 0 is not computed."""

    mse: float = 1.0
    nmse: float = 0.0  # MSE over the variance of the training pixels (report 000)
    l1: float = 0.0
    ssim: float = 0.0  # 1 - SSIM: keeps fine texture that MSE smooths away (Zhao et al. 2017, arXiv:1511.08861)
    ms_ssim: float = 0.0  # 1 - MS-SSIM
    perceptual: float = added(0.0)  # distance of the features of EfficientNet-Lite1; 0.02 beside mse: 1 sharpens
    lpips: float = 0.0
    lpips_weights: PathText | None = None  # safetensors file with the weights of VGG-16 and of LPIPS's linear layers

    def __post_init__(self):
        weights = {name: weight for name, weight in vars(self).items() if name != "lpips_weights"}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"{', '.join(weights)} must be at least 0, and at least one of them above 0")
        if self.lpips and not self.lpips_weights:
            raise ValueError(
                "lpips needs lpips_weights, a safetensors file with the weights of VGG-16 and of LPIPS's linear layers"
            )


class ReconstructionLoss(nn.Module):
    """The weighted sum of the terms that a LossConfig names.

    Make it before the engine builds the model: under ZeRO 3, weights that are made meanwhile are divided among the ranks.
    """

    def __init__(self, config: LossConfig, variance: float):
        """Prepares the terms.

        Args:
            config: Weights of the terms.
            variance: Variance of the training pixels in [0, 1]; nmse divides by it.
        """
        super().__init__()
        self.config, self.variance = config, variance * 4  # pixels in [-1, 1] have four times the variance
        # In a tuple, so that the networks are not registered as submodules. Otherwise an engine would shard their frozen
        # weights, and checkpoints would hold them.
        lpips = (("lpips", LPIPS(Path(config.lpips_weights))),) if config.lpips else ()
        self.networks = (*lpips, *((("perceptual", Perceptual()),) if config.perceptual else ()))

    def forward(self, y_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compares reconstructions with images.

        Args:
            y_BCHW: Reconstructions in about [-1, 1].
            x_BCHW: Images in [-1, 1].

        Returns:
            The loss, a scalar; and {term: value without its weight}, detached. "mse" is always among the terms.
        """
        with torch.autocast(x_BCHW.device.type, enabled=False):
            y, x, config = y_BCHW.float(), x_BCHW.float(), self.config
            terms = {"mse": F.mse_loss(y, x)}
            if config.nmse:
                terms["nmse"] = terms["mse"] / self.variance
            if config.l1:
                terms["l1"] = F.l1_loss(y, x)
            if config.ssim:
                terms["ssim"] = 1 - ssim((y + 1) / 2, (x + 1) / 2).mean()
            if config.ms_ssim:
                terms["ms_ssim"] = 1 - ms_ssim((y + 1) / 2, (x + 1) / 2).mean()
        for name, network in self.networks:
            terms[name] = network.to(x_BCHW.device)(y_BCHW, x_BCHW).mean()
        loss = sum(getattr(config, name) * value for name, value in terms.items())
        return loss, {name: value.detach() for name, value in terms.items()}


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, arXiv:1801.03924) on the features of VGG-16. Its weights never train."""

    RELU_INDICES = (3, 8, 15, 22, 29)  # ReLUs 1_2, 2_2, 3_3, 4_3, 5_3 among vgg16's `features`

    def __init__(self, path: Path):
        """Reads the weights.

        Args:
            path: Safetensors file with `features.<i>.weight` and `features.<i>.bias`, named as in torchvision's vgg16, and
                `lin<k>.weight` [1, C, 1, 1] for k in 0 … 4.

        Raises:
            UserError: The file cannot be read or lacks weights.
        """
        super().__init__()
        from torchvision.models import vgg16

        features = vgg16(weights=None).features[: self.RELU_INDICES[-1] + 1]
        try:
            tensors = load_file(path)
            features.load_state_dict({k.removeprefix("features."): v for k, v in tensors.items() if k.startswith("features.")})
            channel_weights = [tensors[f"lin{i}.weight"].flatten() for i in range(len(self.RELU_INDICES))]
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"loss.lpips_weights: {path} does not hold LPIPS's weights ({error}).") from None
        self.features = features.requires_grad_(False).eval()
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        # Buffers move with the module to its device. They are not persistent, because nothing here is trained.
        for i, weights_C in enumerate(channel_weights):
            self.register_buffer(f"lin{i}", weights_C, persistent=False)
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)

    def forward(self, y_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Returns the distance between each pair of images in [-1, 1] with 1 or 3 channels, [B]."""
        h = torch.cat([y_BCHW, x_BCHW])
        h = (h.expand(-1, 3, -1, -1) - self.mean) / self.std
        distance = 0.0
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.RELU_INDICES:
                unit = F.normalize(h.float(), dim=1, eps=1e-10)
                a, b = unit.chunk(2)
                weight = getattr(self, f"lin{self.RELU_INDICES.index(i)}")[:, None, None]
                distance = distance + ((a - b).square() * weight).sum(1).mean((1, 2))
        return distance
