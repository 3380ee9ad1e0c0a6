"""Interface of the vector quantizers. Shapes: B batch, D code dimension, H W grid, N = B·H·W vectors, K entries.

forward() writes no buffer and returns fp32 statistics. The training loop sums the statistics over micro-batches and ranks, and
passes the sum to update() after each accepted step (a step whose loss and gradients are finite). So gradient accumulation,
activation checkpointing, skipped steps and compilation do not change how codebooks are trained. quantize.py holds the kinds of
quantizers.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx

from lesiongen.tokenizers.kmeans import kmeans, nearest


@dataclass(frozen=True)
class QuantizerConfig:
    """Config of a tokenizer's quantizers. The tokenizers' configs inherit these fields."""

    dim: int = 64  # dimension of a code's vector
    entries: int = 512  # codes per level
    quantizer: Literal["ema", "cosine", "gradient", "fsq"] = "ema"
    # How gradients pass from quantized vectors to the encoder; fsq always uses straight-through.
    estimator: Literal["straight-through", "rotation"] = "straight-through"
    commitment: float = 0.25  # weight of the loss that pulls the encoder's vectors to their codes; fsq has no such loss
    decay: float = 0.99  # decay per step of the moving averages: of codes in ema and cosine, of counts in gradient
    revive_below: float = 0.1  # revive a code that is used less often than this fraction of the mean use; not for fsq
    fsq_levels: tuple[int, ...] = (8, 8, 8)  # number of values in each of fsq's dimensions; their product is `entries`
    kmeans: bool = False  # initialise the codebook with k-means centres of the untrained encoder's vectors

    def __post_init__(self):
        if self.dim < 1 or self.entries < 2:
            raise ValueError("dim must be positive and entries at least 2")
        if not 0 < self.decay < 1 or not 0 <= self.revive_below < 1 or self.commitment < 0:
            raise ValueError("decay must be between 0 and 1, revive_below at least 0 and below 1, commitment at least 0")
        if self.quantizer == "fsq":
            product = math.prod(self.fsq_levels)
            if not self.fsq_levels or min(self.fsq_levels) < 3:
                raise ValueError(f"fsq_levels must be whole numbers of at least 3, such as [8, 8, 8], not {self.fsq_levels}")
            if product != self.entries:
                levels = "×".join(map(str, self.fsq_levels))
                raise ValueError(f"fsq_levels {levels} make {product} codes: set entries to {product}, not {self.entries}")
            if self.kmeans or self.estimator == "rotation":
                raise ValueError("fsq has no codebook: set kmeans to false and estimator to straight-through")


@dataclass
class Quantized:
    """Result of a quantizer's forward pass.

    Attributes:
        x: Quantized vectors [B, D, H, W], equal to lookup(codes), with a gradient for the encoder.
        codes: Index of each vector's entry, [B, H, W].
        loss: What the quantizer adds to the training loss, a scalar that includes its weights.
        statistics: Input of update(), flat fp32 [statistics_size]; None outside training.
    """

    x: torch.Tensor
    codes: torch.Tensor
    loss: torch.Tensor
    statistics: torch.Tensor | None


class Quantizer(nn.Module):
    """Base class: the interface, and the code that all kinds with a `codebook` [K, D] share.

    The statistics of this class are the counts of each code, [K]. Subclasses append further values.
    """

    def __init__(self, config: QuantizerConfig, batch: int):
        """Sets the sizes and options.

        Args:
            config: The quantizer's config.
            batch: Global batch size.
        """
        super().__init__()
        self.entries, self.dim = config.entries, config.dim
        self.commitment, self.rotate = config.commitment, config.estimator == "rotation"
        # Revival candidates per sample: K / batch, rounded up, so that the global batch gives at least K of them.
        self.candidates_per_sample = -(-self.entries // batch)
        self.candidate_count = self.candidates_per_sample * batch

    @property
    def statistics_size(self) -> int:
        """Length of the statistics vector."""
        return self.entries

    def forward(
        self, z_BDHW: torch.Tensor, slot_B: torch.Tensor | None = None, position_B: torch.Tensor | None = None
    ) -> Quantized:
        """Quantizes the encoder's vectors, in fp32 also under autocast.

        Args:
            z_BDHW: The encoder's vectors.
            slot_B: Index of each sample in the global batch; in training only.
            position_B: Index of each sample in the training sequence; in training only.

        Returns:
            The quantized vectors, codes and loss; with slot_B also the statistics.
        """
        with torch.autocast(z_BDHW.device.type, enabled=False):
            z_BHWD = z_BDHW.float().movedim(1, -1)
            z_ND = self.to_code_space(z_BHWD.reshape(-1, self.dim))
            x_ND, codes_N, loss = self.quantize(z_ND)
            statistics = None
            if slot_B is not None:
                statistics = self.statistics(z_ND.detach(), codes_N, slot_B, position_B)
            return Quantized(x_ND.view_as(z_BHWD).movedim(-1, 1), codes_N.view(z_BHWD.shape[:-1]), loss, statistics)

    def to_code_space(self, z_ND: torch.Tensor) -> torch.Tensor:
        """Maps the encoder's vectors to the space in which they are compared with codes. Here: returns them unchanged."""
        return z_ND

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantizes vectors of the code space, [N, D].

        Returns:
            Quantized vectors [N, D] with a gradient for z_ND, codes [N], and the loss.
        """
        codes_N = self.nearest(z_ND.detach())
        x_ND, loss = self.apply_estimator(z_ND, F.embedding(codes_N, self.codebook))
        return x_ND, codes_N, loss

    def apply_estimator(self, z_ND: torch.Tensor, q_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lets gradients of the quantized vectors reach the encoder's vectors, by the estimator that the config names.

        Args:
            z_ND: The encoder's vectors, in code space.
            q_ND: The entries that were chosen for them.

        Returns:
            The values of q_ND with a gradient for z_ND, and the weighted commitment loss.
        """
        carrier_ND = rotate_onto(z_ND, q_ND) if self.rotate else z_ND
        return StraightThrough.apply(carrier_ND, q_ND), self.commitment * F.mse_loss(z_ND, q_ND)

    def nearest(self, z_ND: torch.Tensor) -> torch.Tensor:
        """Returns the index of the nearest entry for each vector, [N]."""
        return nearest(z_ND, self.codebook.detach())

    def lookup(self, codes_BHW: torch.Tensor) -> torch.Tensor:
        """Returns the vectors that codes stand for, [B, D, H, W]."""
        return F.embedding(codes_BHW, self.codebook).movedim(-1, 1)

    def statistics(
        self, z_ND: torch.Tensor, codes_N: torch.Tensor, slot_B: torch.Tensor, position_B: torch.Tensor
    ) -> torch.Tensor:
        """Computes the statistics of a part of the global batch.

        The sum over the parts of a batch equals the statistics of the whole batch.

        Args:
            z_ND: Vectors of the code space, without gradient.
            codes_N: Their codes.
            slot_B: Index of each sample in the global batch.
            position_B: Index of each sample in the training sequence.

        Returns:
            [statistics_size].
        """
        # Not torch.bincount: on a GPU its result has a length that the host must wait for.
        counts_K = torch.zeros(self.entries, device=codes_N.device)
        return counts_K.scatter_add_(0, codes_N, torch.ones_like(codes_N, dtype=torch.float32))

    def revival_candidates(self, z_ND: torch.Tensor, slot_B: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
        """Selects vectors of the batch from which unused codes can be revived, some from each sample.

        Each sample fills its own rows and leaves the others 0. So the sum over micro-batches and ranks gathers the candidates
        of the whole batch, and is the same for any division of the batch. A hash of the sample's position in the training
        sequence selects the grid cells, so that no random state is needed.

        Args:
            z_ND: Vectors of the code space.
            slot_B: Index of each sample in the global batch; decides its rows.
            position_B: Index of each sample in the training sequence; decides the grid cells.

        Returns:
            [candidate_count · D].
        """
        samples = slot_B.numel()
        cells = z_ND.shape[0] // samples  # grid cells of each sample
        number_M = torch.arange(self.candidates_per_sample, device=z_ND.device)  # M candidates of each sample
        cell_BM = (position_B[:, None] * 2654435761 + number_M * 40503 + position_B[:, None] // 7) % cells
        source_BM = cell_BM + torch.arange(samples, device=z_ND.device)[:, None] * cells
        candidates = z_ND.new_zeros(self.candidate_count, self.dim)
        candidates[(slot_B[:, None] * self.candidates_per_sample + number_M).flatten()] = z_ND[source_BM.flatten()]
        return candidates.flatten()

    def pick_revival_vectors(self, unused_K: torch.Tensor, counts_K: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Picks the vectors that unused codes are set to. Every rank picks the same vectors.

        All of it stays on the device: to read how many codes are unused would wait for the GPU at each step.

        Args:
            unused_K: Which codes need a vector, bool.
            counts_K: Counts of each code in the global batch. The index of the most used code selects the first candidate.
            candidates: Sum of revival_candidates() over the global batch.

        Returns:
            A vector for each code, [K, D]; those of used codes mean nothing.
        """
        row_K = unused_K.long().cumsum(0).sub(1).clamp(min=0)
        # Neighbouring rows are from the same sample. A stride of 97, coprime to most sizes, spreads the picks over samples.
        spread_K = (row_K * 97 + counts_K.argmax()) % self.candidate_count
        return candidates.view(-1, self.dim)[torch.where(unused_K.all(), row_K, spread_K)]

    @torch.no_grad()
    def update(self, statistics: torch.Tensor) -> dict[str, torch.Tensor]:
        """Updates the buffers after an accepted step, in the same way on every rank.

        Args:
            statistics: Sum of the statistics over the global batch.

        Returns:
            The metrics "usage", "perplexity" and "revived", see usage_metrics().
        """
        return usage_metrics(statistics[: self.entries])

    @torch.no_grad()
    def initialise(self, z_BDHW: torch.Tensor) -> None:
        """Sets the codebook to k-means centres of the encoder's vectors. Call this before the engine is built."""
        z_ND = self.to_code_space(z_BDHW.float().movedim(1, -1).reshape(-1, self.dim))
        self.initialise_codebook(self.to_code_space(kmeans(z_ND, self.entries)), len(z_ND) / self.entries)

    def initialise_codebook(self, centres_KD: torch.Tensor, vectors_per_centre: float) -> None:
        """Sets the codebook to k-means centres. Subclasses that count the use of codes also mark every code as used.

        Args:
            centres_KD: The centres, in code space.
            vectors_per_centre: Mean number of vectors per centre.
        """
        self.codebook.copy_(centres_KD)


class StraightThrough(torch.autograd.Function):
    """Straight-through estimator: returns q, and passes q's gradient to z unchanged.

    The usual formula z + (q - z).detach() has rounding errors. This class does no arithmetic, so the result is exactly q, and
    the decoder gets the same vectors in training as from lookup().
    """

    @staticmethod
    def forward(ctx: FunctionCtx, z_ND: torch.Tensor, q_ND: torch.Tensor) -> torch.Tensor:
        """Returns q, [N, D]."""
        return q_ND.view_as(q_ND)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient_ND: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Returns the gradient for z, [N, D], and None for q."""
        return gradient_ND, None


def random_codebook(config: QuantizerConfig) -> torch.Tensor:
    """Returns a codebook [K, D] of Gaussian vectors of about length 1. The seed is K, so equal configs give equal codebooks."""
    generator = torch.Generator().manual_seed(config.entries)
    return torch.randn(config.entries, config.dim, generator=generator) * config.dim**-0.5


def rotate_onto(z_ND: torch.Tensor, q_ND: torch.Tensor) -> torch.Tensor:
    """Rotates and rescales z onto q (Fifty et al. 2024, arXiv:2410.06424, section 4.2).

    The result is q, up to rounding. Rotation and scale count as constants, so the backward pass rotates the gradient back and
    rescales it: the gradient for z has the same angle to z as the gradient for q has to q.

    Args:
        z_ND: The encoder's vectors.
        q_ND: The entries that were chosen for them.

    Returns:
        [N, D], with a gradient for z_ND alone.
    """
    with torch.no_grad():
        scale = q_ND.norm(dim=1, keepdim=True) / z_ND.norm(dim=1, keepdim=True).clamp(min=1e-6)
        from_ND, to_ND = F.normalize(z_ND, dim=1), F.normalize(q_ND, dim=1)
        middle_ND = F.normalize(from_ND + to_ND, dim=1)
    along = (z_ND * middle_ND).sum(1, keepdim=True)
    return scale * (z_ND - 2 * along * middle_ND + 2 * (z_ND * from_ND).sum(1, keepdim=True) * to_ND)


def usage_metrics(counts_K: torch.Tensor, revived: torch.Tensor | float = 0.0) -> dict[str, torch.Tensor]:
    """Summarises how codes were used in one global batch.

    Args:
        counts_K: Counts of each code.
        revived: Number of codes that were revived.

    Returns:
        Scalars on the device: "usage", the fraction of codes used at all; "perplexity", exp(entropy) of the distribution of
        codes; "revived".
    """
    p = counts_K / counts_K.sum()
    perplexity = torch.exp(-(p * torch.log(p + 1e-10)).sum())
    return {"usage": (counts_K > 0).float().mean(), "perplexity": perplexity, "revived": counts_K.new_zeros(()) + revived}
