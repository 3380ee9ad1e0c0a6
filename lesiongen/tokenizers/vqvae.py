"""VQ-VAE (van den Oord, Vinyals, Kavukcuoglu 2017, arXiv:1711.00937): one grid of codes; reports 000, 001, 003 and 004.

Images are [-1, 1], [B, C, H, W]; codes [B, H/stride, W/stride].
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lesiongen.tokenizers.blocks import Shape, decoder, encoder
from lesiongen.tokenizers.quantize import build
from lesiongen.tokenizers.quantizer import Quantized, QuantizerConfig
from lesiongen.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class VQVAEConfig(QuantizerConfig, Shape):
    kind: Literal["vqvae"] = "vqvae"
    stride: int = 4  # pixels a code stands for, in each direction; a power of two
    output: Literal["linear", "tanh"] = "linear"

    def __post_init__(self):
        QuantizerConfig.__post_init__(self)
        Shape.__post_init__(self)
        if self.stride < 2 or self.stride & (self.stride - 1):
            raise ValueError(f"stride must be a power of two above 1, not {self.stride}")

    @property
    def names(self) -> tuple[str, ...]:
        return ("codes",)

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.stride,)

    def grids(self, size: int) -> dict[str, int]:
        """Side of the grid for square images. Raises ValueError where the size does not divide."""
        if size % self.stride:
            raise ValueError(f"images of {size} px do not divide by the stride {self.stride}; use a multiple of it")
        return {"codes": size // self.stride}


class VQVAE(Tokenizer):
    def __init__(self, config: VQVAEConfig, channels: int, batch: int):
        super().__init__()
        self.config, self.names = config, config.names
        self.encoder = encoder(channels, config.stride, config)
        self.project = nn.Conv2d(config.hidden, config.dim, 1)
        self.quantizers = nn.ModuleList([build(config, batch)])
        self.decoder = decoder(config.dim, channels, config.stride, config)

    def quantized(self, x_BCHW: torch.Tensor, slot=None, position=None) -> dict[str, Quantized]:
        return {"codes": self.quantizers[0](self.project(self._run(self.encoder, x_BCHW)), slot, position)}

    def decode(self, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        y = self._run(self.decoder, vectors["codes"])
        return torch.tanh(y) if self.config.output == "tanh" else y

    @torch.no_grad()
    def initialise(self, x_BCHW: torch.Tensor) -> None:
        """Places the codebook on k-means centres of these images' vectors; before the engine is built."""
        self.quantizers[0].initialise(self.project(self.encoder(x_BCHW)))
