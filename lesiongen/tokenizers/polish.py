"""What the polish stage minimises: the reconstruction loss of a decoder, behind a frozen encoder and frozen codebooks.

Codes that are easy to predict and images that are sharp ask different things of a tokenizer, so the decoder is trained a second
time by itself (SeQ-GAN, Gu et al. 2022, arXiv:2212.03185). Codes, and priors of them, stay valid.
"""

import torch
from torch import nn

from lesiongen.data.images import to_float, to_unit
from lesiongen.data.similarity import psnr, ssim
from lesiongen.tokenizers.losses import ReconstructionLoss
from lesiongen.tokenizers.tokenizer import Tokenizer


class Objective(nn.Module):
    """A decoder and its loss. The training engine wraps it and calls forward().

    Attributes:
        net: Holds the decoder, the only part that trains, under its name in the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, reconstruction: ReconstructionLoss):
        """Joins them.

        Args:
            tokenizer: The trained tokenizer, on the device that trains. Its decoder's weights are changed.
            reconstruction: The reconstruction loss.
        """
        super().__init__()
        # In a tuple, so that the engine sees the decoder's parameters alone: it would shard frozen ones and save them.
        self.frozen = (tokenizer.eval().requires_grad_(False),)
        self.net = nn.ModuleDict({"decoder": tokenizer.decoder.train().requires_grad_(True)})
        self.reconstruction = reconstruction

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer with the decoder as it is now."""
        return self.frozen[0]

    def forward(self, batch: dict) -> dict:
        """Computes the loss of one micro-batch.

        Args:
            batch: "image" uint8 [B, C, H, W].

        Returns:
            "loss", a scalar; "metrics" {name: detached scalar}; "statistics" None.
        """
        x = to_float(batch["image"])
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # the codes are those of the encode stage
            vectors = {name: q.x for name, q in self.tokenizer.quantized(x).items()}
        y = self.tokenizer.decode(vectors)
        loss, terms = self.reconstruction(y, x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # bf16 is too coarse for SSIM's variances
            metrics = {"reconstruction": loss.detach(), **terms}
            metrics |= {"psnr": psnr(to_unit(y), to_unit(x)).mean(), "ssim": ssim(to_unit(y[:4]), to_unit(x[:4])).mean()}
        return {"loss": loss, "metrics": metrics, "statistics": None}
