"""The kinds of vector quantizers. quantizer.py defines the interface and the shapes.

The codebook is learned by moving averages (ema), by moving averages on the unit sphere (cosine) or by the optimizer
(gradient). Finite scalar quantization (fsq) has no codebook.

The library vector-quantize-pytorch has all four kinds, but is not used: its forward() updates the codebook once per
micro-batch, before the step is known to be accepted, and each process revives codes with its own random numbers. Its FSQ
would fit the interface, but the library brings six packages and would save 30 lines. Where it is installed, a test checks
that both give the same results.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lesiongen.tokenizers.kmeans import nearest
from lesiongen.tokenizers.quantizer import Quantizer, QuantizerConfig, StraightThrough, random_codebook, usage_metrics


class EMAQuantizer(Quantizer):
    """Codebook learned by exponential moving averages (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1).

    Dead codes, which hardly any vector is nearest to, are set to vectors of the current batch (Dhariwal et al. 2020, Jukebox,
    arXiv:2005.00341). All codes start dead, so the first accepted step sets all of them to vectors of the encoder.

    Statistics: counts of each code [K], sum of each code's vectors [K, D], revival candidates.

    The codebook and its averages are fp32 buffers, not parameters: a training engine that keeps fp32 master copies of
    parameters would overwrite every update with the old values.

    Attributes:
        codebook: [K, D].
        count: Moving average of the number of vectors of each code, [K].
        total: Moving average of the sum of each code's vectors, [K, D].
        updates: Number of updates so far, a scalar.
    """

    def __init__(self, config: QuantizerConfig, batch: int):
        super().__init__(config, batch)
        self.decay, self.revive_below = config.decay, config.revive_below
        self.register_buffer("codebook", self.to_code_space(random_codebook(config)))
        self.register_buffer("count", torch.zeros(self.entries))
        self.register_buffer("total", torch.zeros(self.entries, self.dim))
        self.register_buffer("updates", torch.zeros(()))

    @property
    def statistics_size(self) -> int:
        """Length of the statistics vector."""
        return self.entries + (self.entries + self.candidate_count) * self.dim

    def statistics(
        self, z_ND: torch.Tensor, codes_N: torch.Tensor, slot_B: torch.Tensor, position_B: torch.Tensor
    ) -> torch.Tensor:
        counts = super().statistics(z_ND, codes_N, slot_B, position_B)
        sums = torch.zeros_like(self.codebook).index_add_(0, codes_N, z_ND)
        return torch.cat([counts, sums.flatten(), self.revival_candidates(z_ND, slot_B, position_B)])

    @torch.no_grad()
    def update(self, statistics: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes = [self.entries, self.entries * self.dim, self.candidate_count * self.dim]
        counts, sums, candidates = statistics.split(sizes)
        mean_count = counts.sum() / self.entries
        # Move the averages. The decay is small at first, which makes the averages short. Early in training the encoder's
        # vectors move by more than their spread within a few steps, and long averages would still count the codes that the
        # vectors have left as used.
        updates = self.updates.double()
        weight = (1 - ((1 + updates) / (10 + updates)).clamp(max=self.decay)).float()
        self.updates += 1
        self.count.lerp_(counts, weight)
        self.total.lerp_(sums.view_as(self.total), weight)
        mean = self.to_code_space(self.total / self.count.clamp(min=1e-30)[:, None])
        self.codebook.copy_(torch.where(self.count[:, None] > 1e-30, mean, self.codebook))
        # Revive dead codes.
        dead = self.count < self.revive_below * mean_count
        vectors = self.pick_revival_vectors(dead, counts, candidates)
        # Set the count of a revived code exactly to the threshold. If no vector is nearest to the code at the next step, the
        # code is dead again and is set to another vector.
        self.codebook.copy_(torch.where(dead[:, None], vectors, self.codebook))
        self.count.copy_(torch.where(dead, self.revive_below * mean_count, self.count))
        self.total.copy_(torch.where(dead[:, None], vectors * self.revive_below * mean_count, self.total))
        return usage_metrics(counts, dead.sum())

    def initialise_codebook(self, centres_KD: torch.Tensor, vectors_per_centre: float) -> None:
        super().initialise_codebook(centres_KD, vectors_per_centre)
        self.count.fill_(vectors_per_centre)  # so that no code counts as dead at the first update
        self.total.copy_(self.codebook * vectors_per_centre)


class CosineQuantizer(EMAQuantizer):
    """Moving averages on the unit sphere (Yu et al. 2021, ViT-VQGAN, arXiv:2110.04627).

    Vectors and codes have length 1, so only their directions matter. On the sphere, the entry with the largest cosine
    similarity is also the nearest by Euclidean distance.
    """

    def to_code_space(self, z_ND: torch.Tensor) -> torch.Tensor:
        return F.normalize(z_ND, dim=-1)


class GradientQuantizer(Quantizer):
    """Codebook trained by the optimizer (van den Oord et al. 2017, arXiv:1711.00937, equation 3).

    The codebook loss has weight 1, the commitment loss has the weight `commitment`.

    With the published method few codes stay in use: Adam moves a code by at most about the learning rate per step, and the
    encoder's vectors move away from nearly all codes faster than that. This class therefore raises the codebook's learning
    rate, see ScaledCodebook, and adds a loss that pulls idle codes to targets, which are vectors of the batch (after Zheng and
    Vedaldi 2023, arXiv:2307.15139, who overwrite the codes; here only the optimizer changes a parameter).

    Statistics: counts of each code [K], revival candidates. The metric "revived" counts the codes that get a new target.

    Attributes:
        book: The codebook's parameter.
        count: Moving average of the counts of each code, [K].
        updates: Number of updates so far, a scalar.
        idle: Which codes are used too rarely (below `revive_below` of the mean) and are pulled to their targets, bool [K].
        target: Vectors to which idle codes are pulled, [K, D].
    """

    TARGET_STEPS = 20  # steps for which an idle code keeps its target

    def __init__(self, config: QuantizerConfig, batch: int):
        super().__init__(config, batch)
        self.decay, self.revive_below = config.decay, config.revive_below
        self.book = ScaledCodebook(self.entries, self.dim, _weight=random_codebook(config) / ScaledCodebook.SCALE)
        self.register_buffer("count", torch.zeros(self.entries))
        self.register_buffer("updates", torch.zeros(()))
        self.register_buffer("idle", torch.zeros(self.entries, dtype=torch.bool))
        self.register_buffer("target", torch.zeros(self.entries, self.dim))

    @property
    def codebook(self) -> torch.Tensor:
        """The vectors of the codes, [K, D]."""
        return self.book.weight * ScaledCodebook.SCALE

    @property
    def statistics_size(self) -> int:
        """Length of the statistics vector."""
        return self.entries + self.candidate_count * self.dim

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes_N, q_ND, idle_loss = self.book(z_ND.detach(), self.target, self.idle)
        x_ND, loss = self.apply_estimator(z_ND, q_ND.detach())
        return x_ND, codes_N, loss + F.mse_loss(q_ND, z_ND.detach()) + idle_loss

    def statistics(
        self, z_ND: torch.Tensor, codes_N: torch.Tensor, slot_B: torch.Tensor, position_B: torch.Tensor
    ) -> torch.Tensor:
        counts = super().statistics(z_ND, codes_N, slot_B, position_B)
        return torch.cat([counts, self.revival_candidates(z_ND, slot_B, position_B)])

    @torch.no_grad()
    def update(self, statistics: torch.Tensor) -> dict[str, torch.Tensor]:
        counts, candidates = statistics.split([self.entries, self.candidate_count * self.dim])
        self.count.lerp_(counts, 1 - self.decay)
        idle = self.count < self.revive_below * self.count.mean()
        # A code that has just become idle gets a target, and while it stays idle a new target every TARGET_STEPS steps. This
        # is long enough to come near the target, and short enough that the encoder still produces vectors like it. The steps
        # differ between codes, so that not all targets change at once.
        renewed = (torch.arange(self.entries, device=idle.device) + self.updates.long()) % self.TARGET_STEPS == 0
        retargeted = idle & (renewed | ~self.idle)
        self.updates += 1
        vectors = self.pick_revival_vectors(retargeted, counts, candidates)
        self.target.copy_(torch.where(retargeted[:, None], vectors, self.target))
        self.idle.copy_(idle)
        return usage_metrics(counts, retargeted.sum())

    def initialise_codebook(self, centres_KD: torch.Tensor, vectors_per_centre: float) -> None:
        self.book.weight.copy_(centres_KD / ScaledCodebook.SCALE)
        self.count.fill_(1.0)  # equal for all codes, so that none is idle; the first updates replace it


class ScaledCodebook(nn.Embedding):
    """The codebook of GradientQuantizer, stored as weight = codebook / SCALE, so that it is trained SCALE times as fast.

    The codebook is a module of its own because ZeRO 3 gathers parameters only around modules that return plain tensors, and
    Quantizer returns a dataclass. It is an nn.Embedding because the optimizer applies no weight decay to embeddings.
    """

    SCALE = 30.0

    def forward(
        self, z_ND: torch.Tensor, target_KD: torch.Tensor, idle_K: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Looks up the nearest codes.

        Args:
            z_ND: The encoder's vectors, without gradient.
            target_KD: Vectors to which idle codes are pulled.
            idle_K: Which codes are idle.

        Returns:
            Codes [N], their vectors [N, D], and the loss that pulls idle codes to their targets.
        """
        # The codebook is weight · SCALE, but its gradient reaches the weight unscaled. So the codebook's learning rate is SCALE
        # times that of other parameters, with SGD as well as with Adam.
        book_KD = StraightThrough.apply(self.weight, self.weight.detach() * self.SCALE)
        codes_N = nearest(z_ND, book_KD.detach())
        idle_loss = ((book_KD - target_KD).square() * idle_K[:, None]).mean()
        return codes_N, F.embedding(codes_N, book_KD), idle_loss


class FSQuantizer(Quantizer):
    """Finite scalar quantization (Mentzer et al. 2023, arXiv:2309.15505).

    A vector is projected to a few bounded dimensions, each of which is rounded to one of L values (fsq_levels; not the levels
    of a tokenizer). The code is the mixed radix number of the rounded values; the first dimension is the least significant
    digit. There is no codebook, no loss and no revival.
    """

    def __init__(self, config: QuantizerConfig, batch: int):
        super().__init__(config, batch)
        levels = torch.tensor(config.fsq_levels)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("radix", levels.cumprod(0) // levels, persistent=False)
        self.down, self.up = nn.Linear(self.dim, len(levels)), nn.Linear(len(levels), self.dim)

    def to_code_space(self, z_ND: torch.Tensor) -> torch.Tensor:
        """Projects [N, D] to [N, len(levels)], bounded so that rounding gives integers from -⌊L/2⌋ to ⌈L/2⌉ - 1."""
        half = (self.levels - 1) * 1.001 / 2  # slightly larger, so that the outer values can be reached
        offset = (self.levels + 1) % 2 / 2
        return torch.tanh(self.down(z_ND) + torch.atanh(offset / half)) * half - offset

    def quantize(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q_ND = z_ND.detach().round()
        codes_N = ((q_ND.long() + self.levels // 2) * self.radix).sum(1)
        # A NaN gives an arbitrary code. Clamp it to a valid code, so that counting codes does not fail. The NaN itself reaches
        # the loss through the quantized vectors, and the training engine then skips the step.
        codes_N = codes_N.clamp(0, self.entries - 1)
        return self.from_code_space(StraightThrough.apply(z_ND, q_ND)), codes_N, z_ND.new_zeros(())

    def from_code_space(self, q_ND: torch.Tensor) -> torch.Tensor:
        """Projects rounded values [..., len(levels)] to vectors [..., D]."""
        return self.up(q_ND / (self.levels // 2))

    def lookup(self, codes_BHW: torch.Tensor) -> torch.Tensor:
        digits = codes_BHW[..., None] // self.radix % self.levels
        return self.from_code_space((digits - self.levels // 2).float()).movedim(-1, 1)

    def initialise(self, z_BDHW: torch.Tensor) -> None:
        """Does nothing: there is no codebook."""


QUANTIZERS = {"ema": EMAQuantizer, "cosine": CosineQuantizer, "gradient": GradientQuantizer, "fsq": FSQuantizer}


def build(config: QuantizerConfig, batch: int) -> Quantizer:
    """Builds the quantizer that a config names.

    Args:
        config: Config; `config.quantizer` names the kind.
        batch: Global batch size.
    """
    return QUANTIZERS[config.quantizer](config, batch)
