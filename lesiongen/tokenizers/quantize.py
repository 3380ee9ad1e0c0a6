"""Vector quantizers: codebooks by averages, on the sphere, by gradient, and none at all. Interface and shapes: quantizer.py.

vector-quantize-pytorch has all four kinds and is not wrapped: its forward moves the codebook itself, once per micro-batch
and before the step is known to be good, and revives codes from the process's own random numbers. Its FSQ keeps the
contract, but six packages for 30 lines are a bad trade; tests compare the numbers where it is installed.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lesiongen.tokenizers.kmeans import nearest
from lesiongen.tokenizers.quantizer import Quantizer, QuantizerConfig, Replace, random_codebook, usage_metrics


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
        return torch.cat([counts, sums.flatten(), self.revival_candidates(flat_ND, slot_B, position_B)])

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
            fresh = self.pick_revival_vectors(number, counts, offered)
            # Just at the threshold: a revived code that wins nothing is moved again at the next step.
            self.codebook[dead] = fresh
            self.count[dead] = self.revive_below * average
            self.total[dead] = fresh * self.revive_below * average
        return usage_metrics(counts, number)

    def initialise_codebook(self, centres_KD: torch.Tensor, won: float) -> None:
        super().initialise_codebook(centres_KD, won)
        self.count.fill_(won)  # none is dead at the first update
        self.total.copy_(self.codebook * won)


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
        return torch.cat([counts, self.revival_candidates(flat_ND, slot_B, position_B)])

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
            self.target[fresh] = self.pick_revival_vectors(number, counts, offered)
        self.idle.copy_(idle)
        return usage_metrics(counts, number)

    def initialise_codebook(self, centres_KD: torch.Tensor, won: float) -> None:
        self.book.weight.copy_(centres_KD / Book.GAIN)
        self.count.fill_(1.0)  # soon outweighed


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


QUANTIZERS = {"ema": EMAQuantizer, "cosine": CosineQuantizer, "gradient": GradientQuantizer, "fsq": FSQuantizer}


def build(config: QuantizerConfig, batch: int) -> Quantizer:
    """batch: global batch."""
    return QUANTIZERS[config.quantizer](config, batch)
