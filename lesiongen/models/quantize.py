"""Vector quantizers behind one interface. Shapes: B batch, D code dimension, H W grid, N = B·H·W vectors, K entries.

Forward writes no buffer: it returns fp32 statistics, which the training loop sums over micro-batches and ranks and hands
to update() after each accepted step. So accumulation, checkpointing, a skipped step and compilation change nothing.

vector-quantize-pytorch has all four kinds and is not wrapped: its forward moves the codebook itself, once per micro-batch
and before the step is known to be good, and revives codes from the process's own random numbers. Its FSQ keeps the
contract, but six packages for 30 lines are a bad trade; tests compare the numbers where it is installed.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from lesiongen.models.kmeans import kmeans, nearest


@dataclass(frozen=True)
class QuantizerConfig:
    """What a tokenizer's config says of its codes; model configs inherit from it."""

    dim: int = 64  # of a code vector
    entries: int = 512  # codes per level
    quantizer: Literal["ema", "cosine", "gradient", "fsq"] = "ema"
    estimator: Literal["straight-through", "rotation"] = "straight-through"  # of the encoder's gradient; fsq needs none
    commitment: float = 0.25  # weight of the pull of vectors to their codes; fsq has no such loss
    decay: float = 0.99  # of the averages of ema and cosine, and of gradient's counts
    revive_below: float = (
        0.1  # all but fsq: a code used less than this fraction of the average is revived, or pulled to the batch
    )
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
        carrier_ND = rotated(z_ND, q_ND) if self.rotate else z_ND
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

    def offer(self, flat_ND: torch.Tensor, slot_B: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
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

    def chosen(self, number: int, counts: torch.Tensor, offered: torch.Tensor) -> torch.Tensor:
        """[number, D] of the vectors offered; a stride coprime to most sizes spreads them over samples."""
        order = torch.arange(number, device=counts.device)
        if number < self.entries:
            order = (order * 97 + int(counts.argmax())) % self.candidates
        return offered.view(-1, self.dim)[order]

    @torch.no_grad()
    def update(self, statistics: torch.Tensor) -> dict[str, float]:
        """Applies the statistics of one global batch; the same on every rank. Returns usage, perplexity, revived."""
        return usage(statistics[: self.entries])

    @torch.no_grad()
    def initialise(self, z_BDHW: torch.Tensor) -> None:
        """Places the codebook on k-means centres of the encoder's vectors, before an engine is built."""
        z_ND = self.embed(z_BDHW.float().movedim(1, -1).reshape(-1, self.dim))
        self.codebook.copy_(self.embed(kmeans(z_ND, self.entries)))


class EMAQuantizer(Quantizer):
    """Codebook learned by exponential moving averages (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1), with
    dead codes revived from the current batch (Dhariwal et al. 2020, Jukebox, arXiv:2005.00341).

    The codebook and its averages are fp32 buffers, never parameters: an engine with fp32 master copies would overwrite
    every update with stale values. All entries start dead, so the first accepted step places them on real vectors.
    """

    def __init__(self, config: QuantizerConfig, batch: int):
        super().__init__(config, batch)
        self.decay, self.revive_below = config.decay, config.revive_below
        self.register_buffer("codebook", self.embed(random_codebook(config)))
        self.register_buffer("count", torch.zeros(self.entries))
        self.register_buffer("total", torch.zeros(self.entries, self.dim))
        self.register_buffer("updates", torch.zeros(()))

    @property
    def statistics_size(self) -> int:
        return self.entries + (self.entries + self.candidates) * self.dim

    def statistics(self, flat_ND, codes_N, slot_B, position_B) -> torch.Tensor:
        counts = super().statistics(flat_ND, codes_N, slot_B, position_B)
        sums = torch.zeros_like(self.codebook).index_add_(0, codes_N, flat_ND)
        return torch.cat([counts, sums.flatten(), self.offer(flat_ND, slot_B, position_B)])

    @torch.no_grad()
    def update(self, statistics: torch.Tensor) -> dict[str, float]:
        sizes = [self.entries, self.entries * self.dim, self.candidates * self.dim]
        counts, sums, offered = statistics.split(sizes)
        average = counts.sum() / self.entries
        # Short averages at first: vectors still move by more than their spread, and a code left behind must be seen as dead.
        decay = min(self.decay, (1 + float(self.updates)) / (10 + float(self.updates)))
        self.updates += 1
        self.count.lerp_(counts, 1 - decay)
        self.total.lerp_(sums.view_as(self.total), 1 - decay)
        mean = self.embed(self.total / self.count.clamp(min=1e-30)[:, None])
        self.codebook.copy_(torch.where(self.count[:, None] > 1e-30, mean, self.codebook))
        dead = self.count < self.revive_below * average
        number = int(dead.sum())
        if number:
            fresh = self.chosen(number, counts, offered)
            # Just at the threshold: a revived code that wins nothing is moved again at the next step.
            self.codebook[dead] = fresh
            self.count[dead] = self.revive_below * average
            self.total[dead] = fresh * self.revive_below * average
        return usage(counts, number)

    @torch.no_grad()
    def initialise(self, z_BDHW: torch.Tensor) -> None:
        super().initialise(z_BDHW)
        self.count.fill_(z_BDHW.numel() / self.dim / self.entries)  # none is dead at the first update
        self.total.copy_(self.codebook * self.count[:, None])


class CosineQuantizer(EMAQuantizer):
    """EMA on the unit sphere: vectors and codes have length 1, so codes differ in direction alone (Yu et al. 2021,
    ViT-VQGAN, arXiv:2110.04627). The nearest on the sphere is the nearest in space."""

    def embed(self, z_ND: torch.Tensor) -> torch.Tensor:
        return F.normalize(z_ND, dim=-1)


class GradientQuantizer(Quantizer):
    """Codebook trained by the optimizer (van den Oord et al. 2017, arXiv:1711.00937, equation 3): the codebook loss has
    weight 1, the commitment loss its own.

    As published few codes survive: Adam moves a code by its learning rate a step at most, and the encoder runs away from
    nearly all of them. So codes are kept as multiples of GAIN, which makes their rate as much higher, and those that are
    not used are pulled to vectors of the batch that update() set for them (after Zheng and Vedaldi 2023, arXiv:2307.15139,
    who write them there; here only the optimizer writes a parameter)."""

    PURSUIT = 20  # steps

    def __init__(self, config: QuantizerConfig, batch: int):
        super().__init__(config, batch)
        self.decay, self.revive_below = config.decay, config.revive_below
        self.book = Book(self.entries, self.dim, _weight=random_codebook(config) / Book.GAIN)
        self.register_buffer("count", torch.zeros(self.entries))
        self.register_buffer("updates", torch.zeros(()))
        self.register_buffer("idle", torch.zeros(self.entries, dtype=torch.bool))
        self.register_buffer("target", torch.zeros(self.entries, self.dim))

    @property
    def codebook(self) -> torch.Tensor:
        return self.book.weight * Book.GAIN

    @property
    def statistics_size(self) -> int:
        return self.entries + self.candidates * self.dim

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes_N, q_ND, pull = self.book(z_ND.detach(), self.target, self.idle)
        x_ND, loss = self.pass_through(z_ND, q_ND.detach())
        return x_ND, codes_N, loss + F.mse_loss(q_ND, z_ND.detach()) + pull

    def statistics(self, flat_ND, codes_N, slot_B, position_B) -> torch.Tensor:
        counts = super().statistics(flat_ND, codes_N, slot_B, position_B)
        return torch.cat([counts, self.offer(flat_ND, slot_B, position_B)])

    @torch.no_grad()
    def update(self, statistics: torch.Tensor) -> dict[str, float]:
        counts, offered = statistics.split([self.entries, self.candidates * self.dim])
        self.count.lerp_(counts, 1 - self.decay)
        idle = self.count < self.revive_below * self.count.mean()
        # Each keeps its target for a while, to come near; then the encoder will have left that place.
        turn = (torch.arange(self.entries, device=idle.device) + self.updates.long()) % self.PURSUIT == 0
        fresh = idle & (turn | ~self.idle)
        self.updates += 1
        if number := int(fresh.sum()):
            self.target[fresh] = self.chosen(number, counts, offered)
        self.idle.copy_(idle)
        return usage(counts, number)

    @torch.no_grad()
    def initialise(self, z_BDHW: torch.Tensor) -> None:
        z_ND = z_BDHW.float().movedim(1, -1).reshape(-1, self.dim)
        self.book.weight.copy_(kmeans(z_ND, self.entries) / Book.GAIN)
        self.count.fill_(1.0)  # none is idle at the first update


class Book(nn.Embedding):
    """A module of its own, because ZeRO 3 gathers parameters around modules that return plain tensors; an embedding,
    because those are not decayed."""

    GAIN = 30.0

    def forward(self, z_ND, target_KD, idle_K) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(codes [N], their vectors [N, D], the loss that pulls idle codes to their targets)."""
        # Its value is weight · GAIN, its gradient that of the codes: the rate is GAIN times as high under Adam and SGD alike.
        book_KD = Replace.apply(self.weight, self.weight.detach() * self.GAIN)
        codes_N = nearest(z_ND, book_KD.detach())
        pull = ((book_KD - target_KD).square() * idle_K[:, None]).mean()
        return codes_N, F.embedding(codes_N, book_KD), pull


class FSQuantizer(Quantizer):
    """Finite scalar quantization (Mentzer et al. 2023, arXiv:2309.15505): a few bounded dimensions, each rounded to one
    of its levels; a code is their mixed radix number, the first dimension fastest. No codebook, no loss, none to revive."""

    def __init__(self, config: QuantizerConfig, batch: int):
        super().__init__(config, batch)
        levels = torch.tensor(config.fsq_levels)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("radix", levels.cumprod(0) // levels, persistent=False)
        self.down, self.up = nn.Linear(self.dim, len(levels)), nn.Linear(len(levels), self.dim)

    def embed(self, z_ND: torch.Tensor) -> torch.Tensor:
        """[N, D] → [N, len(levels)], to be rounded: between -⌊L/2⌋ and ⌈L/2⌉ - 1."""
        half = (self.levels - 1) * 1.001 / 2  # a little over, so that the outer levels can be reached
        offset = (self.levels + 1) % 2 / 2
        return torch.tanh(self.down(z_ND) + torch.atanh(offset / half)) * half - offset

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q_ND = z_ND.detach().round()
        codes_N = ((q_ND.long() + self.levels // 2) * self.radix).sum(1)
        # A NaN has no code, but it must come as far as the loss, which leaves the step out.
        codes_N = codes_N.clamp(0, self.entries - 1)
        return self.expand(Replace.apply(z_ND, q_ND)), codes_N, z_ND.new_zeros(())

    def expand(self, q_ND: torch.Tensor) -> torch.Tensor:
        return self.up(q_ND / (self.levels // 2))

    def lookup(self, codes_BHW: torch.Tensor) -> torch.Tensor:
        digits = codes_BHW[..., None] // self.radix % self.levels
        return self.expand((digits - self.levels // 2).float()).movedim(-1, 1)

    def initialise(self, z_BDHW: torch.Tensor) -> None:
        """There is no codebook to place."""


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


def rotated(z_ND: torch.Tensor, q_ND: torch.Tensor) -> torch.Tensor:
    """z rotated and rescaled onto q, with the rotation held constant (Fifty et al. 2024, arXiv:2410.06424, section 4.2):
    the gradient keeps its angle to the vector on its way from q back to z."""
    with torch.no_grad():
        scale = q_ND.norm(dim=1, keepdim=True) / z_ND.norm(dim=1, keepdim=True).clamp(min=1e-6)
        from_ND, to_ND = F.normalize(z_ND, dim=1), F.normalize(q_ND, dim=1)
        middle_ND = F.normalize(from_ND + to_ND, dim=1)
    along = (z_ND * middle_ND).sum(1, keepdim=True)
    return scale * (z_ND - 2 * along * middle_ND + 2 * (z_ND * from_ND).sum(1, keepdim=True) * to_ND)


def usage(counts_K: torch.Tensor, revived: float = 0.0) -> dict[str, float]:
    """Share of codes used, exp(entropy) of their use, and codes revived, of one global batch."""
    p = counts_K / counts_K.sum()
    perplexity = torch.exp(-(p * torch.log(p + 1e-10)).sum())
    return {"usage": float((counts_K > 0).float().mean()), "perplexity": float(perplexity), "revived": float(revived)}


QUANTIZERS = {"ema": EMAQuantizer, "cosine": CosineQuantizer, "gradient": GradientQuantizer, "fsq": FSQuantizer}


def build(config: QuantizerConfig, batch: int) -> Quantizer:
    """batch: global batch."""
    return QUANTIZERS[config.quantizer](config, batch)
