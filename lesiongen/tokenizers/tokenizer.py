"""The interface of all tokenizers, whatever their architecture.

The stages use tokenizers through this class alone. Invariant: decode_codes(encode(x)) is the reconstruction that forward(x)
returns, up to rounding.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lesiongen.tokenizers.label_vectors import LabelVectors
from lesiongen.tokenizers.quantizer import Quantized
from lesiongen.tokenizers.texture import Texture, TextureConfig, seeds_of


class Tokenizer(nn.Module, ABC):
    """Maps images [B, C, H, W] in [-1, 1] to a grid of codes [B, h, w] for each level, and back.

    A subclass sets `config`, `names`, `channels`, `quantizers` and `decoder`, and implements quantized(), decoder_input() and
    initialise(images).

    Attributes:
        names: Names of the levels, fine to coarse.
        channels: Colour channels of the images.
        quantizers: One quantizer for each name, in the same order.
        decoder: Maps decoder_input() to images. Encoding does not use it, so its weights may change while codes stay valid.
        texture: Adds texture to the decoder's images; None if the decoder was not polished.
        label_vectors: Tell the decoder the label of each image; None if the decoder was not polished.
    """

    names: tuple[str, ...]
    channels: int
    quantizers: nn.ModuleList
    decoder: nn.Module

    def __init__(self):
        super().__init__()
        self.register_module("texture", None)
        self.register_module("label_vectors", None)

    def add_polish(self, texture: TextureConfig, classes: Sequence[str]) -> None:
        """Adds a texture network and label vectors, which change nothing before they are trained."""
        inputs = next(layer for layer in self.decoder.modules() if isinstance(layer, nn.Conv2d)).in_channels
        side = 1024
        self.label_vectors = LabelVectors(classes, inputs)
        self.texture = Texture(texture, inputs, self.channels, side // max(self.config.grids(side).values()))

    @abstractmethod
    def quantized(
        self, x_BCHW: torch.Tensor, slot_B: torch.Tensor | None = None, position_B: torch.Tensor | None = None
    ) -> dict[str, Quantized]:
        """Encodes and quantizes images.

        Args:
            x_BCHW: Images in [-1, 1].
            slot_B: Index of each sample in the global batch; in training only.
            position_B: Index of each sample in the training sequence; in training only.

        Returns:
            {level: Quantized}, coarse to fine. `statistics` are None without slot_B.
        """

    @abstractmethod
    def decoder_input(self, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Joins {level: quantized vectors [B, D, h, w]} on the finest grid, for the decoder."""

    def decode(
        self, vectors: dict[str, torch.Tensor], seed_B: torch.Tensor | None = None, label_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Decodes {level: quantized vectors [B, D, h, w]} to images [B, C, H, W] in about [-1, 1].

        Args:
            vectors: The quantized vectors.
            seed_B: Seed of the texture of each image; None leaves the texture out. With n · B seeds, n draws of each image
                follow one another: the first draw of all images, then the second.
            label_B: Label number of each image, of those that label_numbers() gives; None if no label is known.
        """
        return self.decode_both(vectors, seed_B, label_B)[1]

    def decode_both(
        self, vectors: dict[str, torch.Tensor], seed_B: torch.Tensor | None, label_B: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes as decode() does. Returns the decoder's images without texture, [B, C, H, W], and what decode() returns."""
        h = self.decoder_input(vectors)
        if self.label_vectors is not None:
            label_B = torch.full((len(h),), -1) if label_B is None else label_B
            h = h + self.label_vectors(label_B.to(h.device))
        y = self._run_part(self.decoder, h)
        if self.texture is None or seed_B is None:
            return y, y
        draws = len(seed_B) // len(y)
        return y, self.texture(y.repeat(draws, 1, 1, 1), h.repeat(draws, 1, 1, 1), seed_B)

    def forward(
        self,
        x_BCHW: torch.Tensor,
        slot_B: torch.Tensor | None = None,
        position_B: torch.Tensor | None = None,
        label_B: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, Quantized]]:
        """Reconstructs images.

        Args:
            x_BCHW: Images in [-1, 1].
            slot_B: As in quantized().
            position_B: As in quantized().
            label_B: As in decode().

        Returns:
            Reconstructions [B, C, H, W] in about [-1, 1], and {level: Quantized}.
        """
        levels = self.quantized(x_BCHW, slot_B, position_B)
        seed_B = self._seeds({name: q.codes for name, q in levels.items()})
        return self.decode({name: q.x for name, q in levels.items()}, seed_B, label_B), levels

    @property
    def entries(self) -> int:
        """Number of codes in each level's codebook, K."""
        return self.quantizers[0].entries

    def encode(self, x_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encodes images in [-1, 1] to {level: codes [B, h, w]}."""
        return {name: q.codes for name, q in self.quantized(x_BCHW).items()}

    def decode_codes(self, codes: dict[str, torch.Tensor], label_B: torch.Tensor | None = None) -> torch.Tensor:
        """Decodes {level: codes [B, h, w]} to images [B, C, H, W] in about [-1, 1]. label_B: as in decode()."""
        return self.decode(self.lookup(codes), self._seeds(codes), label_B)

    def lookup(self, codes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the vectors that {level: codes [B, h, w]} stand for, {level: [B, D, h, w]}."""
        quantizers = dict(zip(self.names, self.quantizers, strict=True))
        return {name: quantizers[name].lookup(codes[name].long()) for name in self.names}

    def label_numbers(self, labels: Sequence[str]) -> torch.Tensor:
        """Returns the number of each label for the decoder, int64 [N]; -1 for a label that it does not know."""
        return torch.full((len(labels),), -1) if self.label_vectors is None else self.label_vectors.numbers(labels)

    def _seeds(self, codes: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Returns the seed of each image's texture: a hash of its codes. None without a texture network."""
        return None if self.texture is None else seeds_of([codes[name].long() for name in self.names])

    def codebook(self, name: str) -> torch.Tensor:
        """Returns the vectors of a level's codes as the decoder receives them, [K, D]."""
        quantizer = self.quantizers[self.names.index(name)]
        device = next(self.parameters()).device
        return quantizer.lookup(torch.arange(quantizer.entries, device=device)[None, None])[0, :, 0].T

    def update(self, statistics: torch.Tensor) -> dict[str, torch.Tensor]:
        """Updates the quantizers after an accepted step.

        Args:
            statistics: Those of all levels, fine to coarse, as one vector; summed over the global batch.

        Returns:
            {"<metric>/<level>": value}, the usage metrics of each level.
        """
        parts = statistics.split([q.statistics_size for q in self.quantizers])
        by_level = {n: q.update(s) for n, q, s in zip(self.names, self.quantizers, parts, strict=True)}
        return {f"{metric}/{name}": value for name, metrics in by_level.items() for metric, value in metrics.items()}

    def _run_part(self, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Runs an encoder or decoder, with activation checkpointing where the config asks for it.

        Quantizers are never run this way, so nothing is quantized twice.
        """
        recompute = self.config.checkpoint and part.training and torch.is_grad_enabled()
        return checkpoint(part, x, use_reentrant=False) if recompute else part(x)
