"""VQ-VAE (van den Oord, Vinyals, Kavukcuoglu 2017, arXiv:1711.00937), the tokenizer of reports 000, 001, 003 and 004.

Images are [B, C, H, W] in [-1, 1]. There is one level, "codes", with a grid of codes [B, H/stride, W/stride].
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lesiongen.tokenizers.blocks import ConvConfig, build_decoder, build_encoder
from lesiongen.tokenizers.quantize import build
from lesiongen.tokenizers.quantizer import Quantized, QuantizerConfig
from lesiongen.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class VQVAEConfig(QuantizerConfig, ConvConfig):
    """Config of a VQ-VAE."""

    kind: Literal["vqvae"] = "vqvae"
    stride: int = 4  # pixels per code, in each direction; a power of two
    output: Literal["linear", "tanh"] = "linear"  # tanh limits reconstructions to [-1, 1]

    def __post_init__(self):
        QuantizerConfig.__post_init__(self)
        ConvConfig.__post_init__(self)
        if self.stride < 2 or self.stride & (self.stride - 1):
            raise ValueError(f"stride must be a power of two above 1, not {self.stride}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the levels: one."""
        return ("codes",)

    @property
    def strides(self) -> tuple[int, ...]:
        """The stride of the only level, in the form of VQVAE2Config.strides."""
        return (self.stride,)

    def grids(self, size: int) -> dict[str, int]:
        """Returns {level: side of its grid} for square images of `size` pixels.

        Raises:
            ValueError: The size is no multiple of the stride.
        """
        if size % self.stride:
            raise ValueError(f"images of {size} px do not divide by the stride {self.stride}; use a multiple of it")
        return {"codes": size // self.stride}


class VQVAE(Tokenizer):
    """Encoder, one quantizer, decoder."""

    def __init__(self, config: VQVAEConfig, channels: int, batch: int):
        """Builds the networks.

        Args:
            config: Sizes and kinds of the parts.
            channels: Colour channels of the images.
            batch: Global batch size.
        """
        super().__init__()
        self.config, self.names, self.channels = config, config.names, channels
        self.encoder = build_encoder(channels, config.stride, config)
        self.project = nn.Conv2d(config.hidden, config.dim, 1)
        self.quantizers = nn.ModuleList([build(config, batch)])
        self.decoder = build_decoder(config.dim, channels, config.stride, config)

    def quantized(
        self, x_BCHW: torch.Tensor, slot_B: torch.Tensor | None = None, position_B: torch.Tensor | None = None
    ) -> dict[str, Quantized]:
        z_BDhw = self.project(self._run_part(self.encoder, x_BCHW))
        return {"codes": self.quantizers[0](z_BDhw, slot_B, position_B)}

    def decoder_input(self, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        return vectors["codes"]

    def decode_both(
        self, vectors: dict[str, torch.Tensor], seed_B: torch.Tensor | None, label_B: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        both = super().decode_both(vectors, seed_B, label_B)
        return tuple(map(torch.tanh, both)) if self.config.output == "tanh" else both

    @torch.no_grad()
    def initialise(self, x_BCHW: torch.Tensor) -> None:
        """Sets the codebook to k-means centres of the vectors of these images. Call this before the engine is built."""
        self.quantizers[0].initialise(self.project(self.encoder(x_BCHW)))
