"""What tokenizer training minimises: reconstruction plus the quantizers' losses."""

import torch
from torch import nn

from lesiongen.data.images import to_float, to_unit
from lesiongen.data.similarity import psnr, ssim
from lesiongen.tokenizers.losses import LossConfig, Reconstruction
from lesiongen.tokenizers.tokenizer import Tokenizer


class Objective(nn.Module):
    """Reconstruction loss, and what the quantizers ask for (arXiv:1711.00937, equation 3)."""

    def __init__(self, net: Tokenizer, loss: LossConfig, variance: float):
        super().__init__()
        self.net, self.reconstruction = net, Reconstruction(loss, variance)

    def forward(self, batch: dict) -> dict:
        x = to_float(batch["image"])
        y, levels = self.net(x, batch["slot"], batch["position"])
        loss, terms = self.reconstruction(y, x)
        quantization = sum(q.loss for q in levels.values())
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # variances vanish in bf16
            metrics = {"reconstruction": loss.detach(), **terms, "quantization": quantization.detach()}
            metrics |= {f"quantization/{name}": q.loss.detach() for name, q in levels.items()}
            metrics |= {"psnr": psnr(to_unit(y), to_unit(x)).mean(), "ssim": ssim(to_unit(y[:4]), to_unit(x[:4])).mean()}
        ordered = [levels[name].statistics for name in self.net.names]
        return {"loss": loss + quantization, "metrics": metrics, "statistics": torch.cat(ordered)}
