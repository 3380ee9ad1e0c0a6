"""What the polish stage minimises: the loss of a decoder that draws, behind a frozen encoder and frozen codebooks.

Codes that are easy to predict and images that are sharp ask different things of a tokenizer, so the decoder is trained a second
time by itself (SeQ-GAN, Gu et al. 2022, arXiv:2212.03185), together with a network that draws what the codes do not decide
(texture.py) and a critic of what it draws (polish_critic.py). Codes, and priors of them, stay valid.
"""

import torch
from torch import nn

from lesiongen.data.images import to_float
from lesiongen.tokenizers.code_noise import CodeNoise
from lesiongen.tokenizers.objective import training_metrics
from lesiongen.tokenizers.polish_loss import PolishLoss
from lesiongen.tokenizers.quantizer import Quantized
from lesiongen.tokenizers.texture import hashed, seeds_of
from lesiongen.tokenizers.tokenizer import Tokenizer

LABEL_DROPOUT = 0.1  # share of the images whose label the decoder is not told
LABEL_DROPOUT_SEED = 0x1ABE1


class Objective(nn.Module):
    """A decoder, its texture network, its label vectors and their loss. The training engine wraps it and calls forward().

    Attributes:
        net: Holds decoder, texture and label vectors, the trained parts that are exported, under their names in the tokenizer.
        loss: The loss. Its critic trains too.
    """

    def __init__(self, tokenizer: Tokenizer, loss: PolishLoss, code_noise: CodeNoise):
        """Joins them.

        Args:
            tokenizer: The trained tokenizer with a texture network and label vectors, on the device that trains. The weights
                of these and of its decoder are changed.
            loss: The loss.
            code_noise: Replaces codes of the training images.
        """
        super().__init__()
        # In a tuple, so that the engine sees the trained parameters alone: it would shard frozen ones and save them.
        self.frozen = (tokenizer.eval().requires_grad_(False),)
        parts = {name: getattr(tokenizer, name) for name in ("decoder", "texture", "label_vectors")}
        self.net = nn.ModuleDict({name: part.train().requires_grad_(True) for name, part in parts.items()})
        self.loss = loss
        self.code_noise = code_noise

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer with the trained parts as they are now."""
        return self.frozen[0]

    def forward(self, batch: dict) -> dict:
        """Computes the loss of one micro-batch.

        Args:
            batch: "image" uint8 [B, C, H, W]; "label" [B], numbered as the label vectors are, -1 for unlabelled images; and
                "position" [B], which decides the noise of codes and texture, the part that is compared, and whether the
                decoder is told the label.

        Returns:
            "loss", a scalar; "metrics" {name: detached scalar}; "statistics": None.
        """
        x = to_float(batch["image"])
        position_B = batch["position"].to(x.device)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # the codes are those of the encode stage
            codes = self.tokenizer.encode(x)
            vectors = self.tokenizer.lookup(self.code_noise(codes, position_B))
        dropped_B = hashed(position_B ^ LABEL_DROPOUT_SEED) < LABEL_DROPOUT * 2**32
        label_B = torch.where(dropped_B, -1, batch["label"].to(x.device))
        mean, draws = self._mean_and_draws(vectors, position_B, label_B)
        loss, terms = self.loss(mean, draws, x, position_B, label_B)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # bf16 is too coarse for SSIM's variances
            terms |= training_metrics(draws[: len(x)], x)
        return {"loss": loss, "metrics": terms, "statistics": None}

    def held_out_loss(self, x_BCHW: torch.Tensor, levels: dict[str, Quantized], label_B: torch.Tensor) -> torch.Tensor:
        """Returns the loss of encoded images in [-1, 1] with labels [B], -1 for unlabelled ones.

        A hash of an image's codes decides the noise and the part that is compared, so that neither ever changes.
        """
        number_B = seeds_of([q.codes for q in levels.values()])
        mean, draws = self._mean_and_draws({name: q.x for name, q in levels.items()}, number_B, label_B)
        return self.loss(mean, draws, x_BCHW, number_B)[0]

    def _mean_and_draws(
        self, vectors: dict[str, torch.Tensor], number_B: torch.Tensor, label_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes images. Returns them without texture, [B, C, H, W], and two draws of each, [2 B, C, H, W].

        The seeds of the draws are hashes of a number that the caller gives each image.
        """
        seeds = [hashed(2 * number_B + draw) for draw in (0, 1)]
        return self.tokenizer.decode_both(vectors, torch.cat(seeds), label_B)
