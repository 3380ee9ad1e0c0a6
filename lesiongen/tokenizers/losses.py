"""Reconstruction losses: a weighted sum of the terms that a config names. Images x, y: [B, C, H, W] in [-1, 1]."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from hpc.errors import UserError
from lesiongen.data.similarity import ms_ssim, ssim


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms; 0 leaves one out."""

    mse: float = 1.0
    nmse: float = 0.0  # MSE over the data's variance (report 000)
    l1: float = 0.0
    ssim: float = 0.0  # 1 - SSIM: keeps fine texture that MSE smooths away (Zhao et al. 2017, arXiv:1511.08861)
    ms_ssim: float = 0.0  # 1 - MS-SSIM
    lpips: float = 0.0
    lpips_weights: str | None = None  # safetensors file, see LPIPS

    def __post_init__(self):
        weights = (self.mse, self.nmse, self.l1, self.ssim, self.ms_ssim, self.lpips)
        if min(weights) < 0 or not any(weights):
            raise ValueError("weights of the loss are at least 0, and one of mse, nmse, l1, ssim, ms_ssim, lpips is above 0")
        if self.lpips and not self.lpips_weights:
            raise ValueError(
                "lpips needs lpips_weights, a safetensors file with the weights of VGG-16 and of its linear layers"
            )


class Reconstruction(nn.Module):
    """Forward: (y, x) → (loss, {term: value}), all fp32. variance: of the data in [0, 1]."""

    def __init__(self, config: LossConfig, variance: float):
        super().__init__()
        self.config, self.variance = config, variance * 4  # on [-1, 1]
        # In a tuple, so that it is no part of the module: an engine would shard its frozen weights, and checkpoints hold them.
        self.lpips = (LPIPS(Path(config.lpips_weights)),) if config.lpips else ()

    def forward(self, y_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
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
        for lpips in self.lpips:
            terms["lpips"] = lpips.to(x_BCHW.device)(y_BCHW, x_BCHW).mean()
        loss = sum(getattr(config, name) * value for name, value in terms.items())
        return loss, {name: value.detach() for name, value in terms.items()}


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, arXiv:1801.03924) on VGG-16: [B] for images in [-1, 1].

    The file holds `features.<i>.weight|bias` as in torchvision's vgg16, and `lin<k>.weight` [1, C, 1, 1] for k in 0 … 4.
    Weights never train. Raises UserError for a file that lacks them."""

    TAPS = (3, 8, 15, 22, 29)  # ReLUs 1_2, 2_2, 3_3, 4_3, 5_3

    def __init__(self, path: Path):
        super().__init__()
        from torchvision.models import vgg16

        features = vgg16(weights=None).features[: self.TAPS[-1] + 1]
        try:
            held = load_file(path)
            features.load_state_dict({k.removeprefix("features."): v for k, v in held.items() if k.startswith("features.")})
            lins = [held[f"lin{i}.weight"].flatten() for i in range(len(self.TAPS))]
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"loss.lpips_weights: {path} does not hold LPIPS's weights ({error}).") from None
        self.features = features.requires_grad_(False).eval()
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        # Buffers, and not saved: they are no part of what is trained.
        for i, lin in enumerate(lins):
            self.register_buffer(f"lin{i}", lin, persistent=False)
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)

    def forward(self, y_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> torch.Tensor:
        h = torch.cat([y_BCHW, x_BCHW])
        h = (h.expand(-1, 3, -1, -1) - self.mean) / self.std
        distance = 0.0
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.TAPS:
                unit = F.normalize(h.float(), dim=1, eps=1e-10)
                a, b = unit.chunk(2)
                weight = getattr(self, f"lin{self.TAPS.index(i)}")[:, None, None]
                distance = distance + ((a - b).square() * weight).sum(1).mean((1, 2))
        return distance
