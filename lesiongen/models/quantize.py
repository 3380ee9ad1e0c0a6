"""Vector quantizers behind one interface. Shapes: B batch, D code dimension, H W grid, N = B·H·W vectors, K entries.

Forward writes no buffer: it returns fp32 statistics, which the training loop sums over micro-batches and ranks and hands
to update() after each accepted step. So accumulation, checkpointing, a skipped step and compilation change nothing.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 16384  # rows of the distance matrix held at once


@dataclass
class Quantized:
    """x: quantized vectors [B, D, H, W], straight-through; codes [B, H, W]; loss: commitment; statistics: flat fp32."""

    x: torch.Tensor
    codes: torch.Tensor
    loss: torch.Tensor
    statistics: torch.Tensor | None


class EMAQuantizer(nn.Module):
    """Codebook learned by exponential moving averages (van den Oord et al. 2017, appendix A.1), with dead codes revived
    from the current batch (Dhariwal et al. 2020, Jukebox).

    The codebook and its averages are fp32 buffers, never parameters: an engine with fp32 master copies would overwrite
    every update with stale values. All entries start dead, so the first accepted step places them on real vectors.
    """

    def __init__(self, entries: int, dim: int, batch: int, decay: float = 0.99, revive_below: float = 0.1):
        """batch: global batch, which fixes how many candidate vectors each sample offers for revival."""
        super().__init__()
        self.entries, self.dim, self.decay, self.revive_below = entries, dim, decay, revive_below
        self.per_sample = -(-entries // batch)
        self.candidates = self.per_sample * batch
        generator = torch.Generator().manual_seed(entries)
        self.register_buffer("codebook", torch.randn(entries, dim, generator=generator) * dim**-0.5)
        self.register_buffer("count", torch.zeros(entries))
        self.register_buffer("total", torch.zeros(entries, dim))
        self.register_buffer("updates", torch.zeros(()))

    @property
    def statistics_size(self) -> int:
        return self.entries + (self.entries + self.candidates) * self.dim

    def nearest(self, z_ND: torch.Tensor) -> torch.Tensor:
        """Index of the nearest entry for each row, without the N×K one-hot form."""
        norms_K = self.codebook.square().sum(1)
        return torch.cat([torch.addmm(norms_K, chunk, self.codebook.T, alpha=-2).argmin(1) for chunk in z_ND.split(CHUNK)])

    def lookup(self, codes_BHW: torch.Tensor) -> torch.Tensor:
        """[B, H, W] → [B, D, H, W]."""
        return F.embedding(codes_BHW, self.codebook).movedim(-1, 1)

    def forward(self, z_BDHW: torch.Tensor, slot_B=None, position_B=None) -> Quantized:
        """slot, position: of each sample in the global batch and the training sequence; given in training only."""
        with torch.autocast(z_BDHW.device.type, enabled=False):
            z_BDHW = z_BDHW.float()
            z_BHWD = z_BDHW.movedim(1, -1)
            flat_ND = z_BHWD.detach().reshape(-1, self.dim)
            codes_N = self.nearest(flat_ND)
            codes = codes_N.view(z_BHWD.shape[:-1])
            q_BDHW = self.lookup(codes)
            loss = F.mse_loss(z_BDHW, q_BDHW)
            statistics = None
            if slot_B is not None:
                statistics = self._statistics(flat_ND, codes_N, slot_B, position_B)
            return Quantized(z_BDHW + (q_BDHW - z_BDHW).detach(), codes, loss, statistics)

    def _statistics(self, flat_ND, codes_N, slot_B, position_B) -> torch.Tensor:
        counts = torch.bincount(codes_N, minlength=self.entries).float()
        sums = torch.zeros_like(self.codebook).index_add_(0, codes_N, flat_ND)
        # Each sample writes its candidates into its own rows: the sum over ranks is the same gather for any topology.
        samples = slot_B.numel()
        cells = flat_ND.shape[0] // samples
        step = torch.arange(self.per_sample, device=flat_ND.device)
        cell = (position_B[:, None] * 2654435761 + step * 40503 + position_B[:, None] // 7) % cells
        rows = cell + torch.arange(samples, device=flat_ND.device)[:, None] * cells
        offered = flat_ND.new_zeros(self.candidates, self.dim)
        offered[(slot_B[:, None] * self.per_sample + step).flatten()] = flat_ND[rows.flatten()]
        return torch.cat([counts, sums.flatten(), offered.flatten()])

    @torch.no_grad()
    def update(self, statistics: torch.Tensor) -> dict[str, float]:
        """Applies the statistics of one global batch; the same on every rank. Returns usage, perplexity, revived."""
        sizes = [self.entries, self.entries * self.dim, self.candidates * self.dim]
        counts, sums, offered = statistics.split(sizes)
        average = counts.sum() / self.entries
        # Short averages at first: vectors still move by more than their spread, and a code left behind must be seen as dead.
        decay = min(self.decay, (1 + float(self.updates)) / (10 + float(self.updates)))
        self.updates += 1
        self.count.lerp_(counts, 1 - decay)
        self.total.lerp_(sums.view_as(self.total), 1 - decay)
        self.codebook.copy_(self.total / self.count.clamp(min=1e-6)[:, None])
        dead = self.count < self.revive_below * average
        number = int(dead.sum())
        if number:
            # A stride coprime to most sizes spreads the chosen candidates over samples.
            order = (torch.arange(number, device=dead.device) * 97 + int(counts.argmax())) % self.candidates
            if number == self.entries:
                order = torch.arange(number, device=dead.device)
            fresh = offered.view(-1, self.dim)[order]
            # Just at the threshold: a revived code that wins nothing is moved again at the next step.
            self.codebook[dead] = fresh
            self.count[dead] = self.revive_below * average
            self.total[dead] = fresh * self.revive_below * average
        p = counts / counts.sum()
        perplexity = torch.exp(-(p * torch.log(p + 1e-10)).sum())
        return {
            "usage": float((counts > 0).float().mean()),
            "perplexity": float(perplexity),
            "revived": float(number),
        }


QUANTIZERS = {"ema": EMAQuantizer}
