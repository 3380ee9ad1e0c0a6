"""What tokenizer training minimises: the reconstruction loss plus the quantizers' losses."""

import torch
from torch import nn

from lesiongen.data.images import to_float, to_unit
from lesiongen.data.similarity import psnr, ssim
from lesiongen.tokenizers.losses import ReconstructionLoss
from lesiongen.tokenizers.tokenizer import Tokenizer


class Objective(nn.Module):
    """A tokenizer and its training loss (arXiv:1711.00937, equation 3). The training engine wraps it and calls forward()."""

    def __init__(self, net: Tokenizer, reconstruction: ReconstructionLoss):
        """Joins them.

        Args:
            net: The tokenizer to train.
            reconstruction: The reconstruction loss.
        """
        super().__init__()
        self.net, self.reconstruction = net, reconstruction

    def forward(self, batch: dict) -> dict:
        """Computes the loss of one micro-batch.

        Args:
            batch: "image" uint8 [B, C, H, W]; "slot" and "position" [B]: index of each sample in the global batch and in the
                training sequence.

        Returns:
            "loss", a scalar; "metrics" {name: detached scalar}; "statistics" of all levels, fine to coarse, as one vector for
            Tokenizer.update().
        """
        x = to_float(batch["image"])
        y, levels = self.net(x, batch["slot"], batch["position"])
        loss, terms = self.reconstruction(y, x)
        quantization = sum(q.loss for q in levels.values())
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # bf16 is too coarse for SSIM's variances
            metrics = {"reconstruction": loss.detach(), **terms, "quantization": quantization.detach()}
            metrics |= {f"quantization/{name}": q.loss.detach() for name, q in levels.items()}
            metrics |= training_metrics(y, x)
        ordered = [levels[name].statistics for name in self.net.names]
        return {"loss": loss + quantization, "metrics": metrics, "statistics": torch.cat(ordered)}


def training_metrics(y_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
    """Measures reconstructions of images in [-1, 1]: the mean PSNR in dB, and the mean SSIM of four, which takes longer."""
    y, x = to_unit(y_BCHW), to_unit(x_BCHW)
    return {"psnr": psnr(y, x).mean(), "ssim": ssim(y[:4], x[:4]).mean()}
