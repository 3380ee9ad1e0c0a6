"""What every vector quantizer offers. Shapes: B batch, D code dimension, H W grid, N = B·H·W vectors, K entries.

Forward writes no buffer: it returns fp32 statistics, which the training loop sums over micro-batches and ranks and hands
to update() after each accepted step. So accumulation, checkpointing, a skipped step and compilation change nothing.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from lesiongen.tokenizers.kmeans import kmeans, nearest


@dataclass(frozen=True)
class QuantizerConfig:
    """What a tokenizer's config says of its codes; model configs inherit from it."""

    dim: int = 64  # of a code vector
    entries: int = 512  # codes per level
    quantizer: Literal["ema", "cosine", "gradient", "fsq"] = "ema"
    estimator: Literal["straight-through", "rotation"] = "straight-through"  # of the encoder's gradient; fsq needs none
    commitment: float = 0.25  # weight of the pull of vectors to their codes; fsq has no such loss
    decay: float = 0.99  # of the averages of ema and cosine, and of gradient's counts
    revive_below: float = 0.1  # a code used less than this share of the average is revived; fsq has none
    fsq_levels: tuple[int, ...] = (8, 8, 8)  # values of each of fsq's dimensions; their product is `entries`
    kmeans: bool = False  # start from k-means centres of the untrained encoder's vectors

    def __post_init__(self):
        if self.dim < 1 or self.entries < 2:
            raise ValueError("dim must be positive and entries at least 2")
        if not 0 < self.decay < 1 or not 0 <= self.revive_below < 1 or self.commitment < 0:
            raise ValueError("decay lies between 0 and 1, revive_below below 1, commitment at least 0")
        if self.quantizer == "fsq":
            product = math.prod(self.fsq_levels)
            if not self.fsq_levels or min(self.fsq_levels) < 3:
                raise ValueError(f"fsq_levels must be whole numbers of at least 3, such as [8, 8, 8], not {self.fsq_levels}")
            if product != self.entries:
                levels = "×".join(map(str, self.fsq_levels))
                raise ValueError(f"fsq_levels {levels} make {product} codes: set entries to {product}, not {self.entries}")
            if self.kmeans or self.estimator == "rotation":
                raise ValueError("fsq has no codebook: leave kmeans and estimator as they are")


@dataclass
class Quantized:
    """x: quantized vectors [B, D, H, W], equal to lookup(codes), with a gradient for the encoder; codes [B, H, W]; loss:
    what the objective adds, weights included; statistics: flat fp32, in training only."""

    x: torch.Tensor
    codes: torch.Tensor
    loss: torch.Tensor
    statistics: torch.Tensor | None


class Quantizer(nn.Module):
    """The interface, and what all kinds with a `codebook` [K, D] share. Statistics are how often each code was used."""

    def __init__(self, config: QuantizerConfig, batch: int):
        """batch: global batch."""
        super().__init__()
        self.entries, self.dim = config.entries, config.dim
        self.commitment, self.rotate = config.commitment, config.estimator == "rotation"
        self.per_sample = -(-self.entries // batch)  # vectors that each sample offers to codes that are not used
        self.candidates = self.per_sample * batch

    @property
    def statistics_size(self) -> int:
        return self.entries

    def forward(self, z_BDHW: torch.Tensor, slot_B=None, position_B=None) -> Quantized:
        """slot, position: of each sample in the global batch and the training sequence; given in training only."""
        with torch.autocast(z_BDHW.device.type, enabled=False):
            z_BHWD = z_BDHW.float().movedim(1, -1)
            flat_ND = self.embed(z_BHWD.reshape(-1, self.dim))
            x_ND, codes_N, loss = self.quantize(flat_ND)
            statistics = None
            if slot_B is not None:
                statistics = self.statistics(flat_ND.detach(), codes_N, slot_B, position_B)
            return Quantized(x_ND.view_as(z_BHWD).movedim(-1, 1), codes_N.view(z_BHWD.shape[:-1]), loss, statistics)

    def embed(self, z_ND: torch.Tensor) -> torch.Tensor:
        """The encoder's vectors as they are compared with codes."""
        return z_ND

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x [N, D], codes [N], loss)."""
        codes_N = self.nearest(z_ND.detach())
        x_ND, loss = self.pass_through(z_ND, F.embedding(codes_N, self.codebook))
        return x_ND, codes_N, loss

    def pass_through(self, z_ND: torch.Tensor, q_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(the chosen entries q with a gradient for z, commitment loss)."""
        carrier_ND = rotate_onto(z_ND, q_ND) if self.rotate else z_ND
        return Replace.apply(carrier_ND, q_ND), self.commitment * F.mse_loss(z_ND, q_ND)

    def nearest(self, z_ND: torch.Tensor) -> torch.Tensor:
        """Index of the nearest entry for each row."""
        return nearest(z_ND, self.codebook.detach())

    def lookup(self, codes_BHW: torch.Tensor) -> torch.Tensor:
        """[B, H, W] → [B, D, H, W]."""
        return F.embedding(codes_BHW, self.codebook).movedim(-1, 1)

    def statistics(self, flat_ND, codes_N, slot_B, position_B) -> torch.Tensor:
        """[statistics_size]; those of parts of a batch sum to those of the whole."""
        return torch.bincount(codes_N, minlength=self.entries).float()

    def revival_candidates(self, flat_ND: torch.Tensor, slot_B: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
        """[candidates · D]: vectors of the batch, each sample's in its own rows, so that the sum over ranks is the same
        gather for any topology."""
        samples = slot_B.numel()
        cells = flat_ND.shape[0] // samples
        step = torch.arange(self.per_sample, device=flat_ND.device)
        cell = (position_B[:, None] * 2654435761 + step * 40503 + position_B[:, None] // 7) % cells
        rows = cell + torch.arange(samples, device=flat_ND.device)[:, None] * cells
        offered = flat_ND.new_zeros(self.candidates, self.dim)
        offered[(slot_B[:, None] * self.per_sample + step).flatten()] = flat_ND[rows.flatten()]
        return offered.flatten()

    def pick_revival_vectors(self, number: int, counts: torch.Tensor, offered: torch.Tensor) -> torch.Tensor:
        """[number, D] of the vectors offered; a stride coprime to most sizes spreads them over samples."""
        order = torch.arange(number, device=counts.device)
        if number < self.entries:
            order = (order * 97 + int(counts.argmax())) % self.candidates
        return offered.view(-1, self.dim)[order]

    @torch.no_grad()
    def update(self, statistics: torch.Tensor) -> dict[str, float]:
        """Applies the statistics of one global batch; the same on every rank. Returns usage, perplexity, revived."""
        return usage_metrics(statistics[: self.entries])

    @torch.no_grad()
    def initialise(self, z_BDHW: torch.Tensor) -> None:
        """Places the codebook on k-means centres of the encoder's vectors, before an engine is built."""
        z_ND = self.embed(z_BDHW.float().movedim(1, -1).reshape(-1, self.dim))
        self.initialise_codebook(self.embed(kmeans(z_ND, self.entries)), len(z_ND) / self.entries)

    def initialise_codebook(self, centres_KD: torch.Tensor, won: float) -> None:
        """Puts the codebook there, with every code alive. won: vectors of each centre, on average."""
        self.codebook.copy_(centres_KD)


class Replace(torch.autograd.Function):
    """q in the place of z, with q's gradient handed to z: straight-through. No arithmetic, so the result is exactly q and
    images decode from codes as they did in training."""

    @staticmethod
    def forward(ctx, z_ND: torch.Tensor, q_ND: torch.Tensor) -> torch.Tensor:
        return q_ND.view_as(q_ND)

    @staticmethod
    def backward(ctx, gradient_ND: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient_ND, None


def random_codebook(config: QuantizerConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(config.entries)
    return torch.randn(config.entries, config.dim, generator=generator) * config.dim**-0.5


def rotate_onto(z_ND: torch.Tensor, q_ND: torch.Tensor) -> torch.Tensor:
    """z rotated and rescaled onto q, with the rotation held constant (Fifty et al. 2024, arXiv:2410.06424, section 4.2):
    the gradient keeps its angle to the vector on its way from q back to z."""
    with torch.no_grad():
        scale = q_ND.norm(dim=1, keepdim=True) / z_ND.norm(dim=1, keepdim=True).clamp(min=1e-6)
        from_ND, to_ND = F.normalize(z_ND, dim=1), F.normalize(q_ND, dim=1)
        middle_ND = F.normalize(from_ND + to_ND, dim=1)
    along = (z_ND * middle_ND).sum(1, keepdim=True)
    return scale * (z_ND - 2 * along * middle_ND + 2 * (z_ND * from_ND).sum(1, keepdim=True) * to_ND)


def usage_metrics(counts_K: torch.Tensor, revived: float = 0.0) -> dict[str, float]:
    """Share of codes used, exp(entropy) of their use, and codes revived, of one global batch."""
    p = counts_K / counts_K.sum()
    perplexity = torch.exp(-(p * torch.log(p + 1e-10)).sum())
    return {"usage": float((counts_K > 0).float().mean()), "perplexity": float(perplexity), "revived": float(revived)}
