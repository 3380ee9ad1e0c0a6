"""What every prior offers, whatever its architecture: p(codes | facts, coarser codes), token by token in raster order.

Shapes: B batch, T = h·w tokens, K vocabulary, D width, F facts of an image (label, site, …; -1 where one is not known).
The coarser grids are known beforehand, so that every position sees them all, aligned in space.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpc.config import volatile

CHUNK = 2**24  # logits held at once in the loss; the rest is computed again in the backward pass


@dataclass(frozen=True)
class PriorShape:
    """What all priors' configs share."""

    layers: int = 6
    width: int = 384
    dropout: float = 0.1
    label_dropout: float = 0.1  # share of training images shown without their facts, for classifier-free guidance
    token_dropout: float = 0.0  # share of input tokens replaced by "unknown" in training
    checkpoint: bool = volatile(False)  # compute activations again in the backward pass: less memory, a third more time

    def __post_init__(self):
        if min(self.layers, self.width) < 1:
            raise ValueError("layers and width must be at least 1")
        if not all(0 <= p < 1 for p in (self.dropout, self.label_dropout, self.token_dropout)):
            raise ValueError("dropouts are at least 0 and below 1")


class Prior(nn.Module, ABC):
    """grid: (h, w) of this level; entries: K; facts: {name: number of values}; upper: (entries, grid) of coarser levels.

    A subclass gives features() and, for sampling, new_cache() and step(), which must find what features() finds."""

    def __init__(
        self,
        config: PriorShape,
        grid: tuple[int, int],
        entries: int,
        facts: dict[str, int],
        upper: tuple[tuple[int, tuple[int, int]], ...] = (),
    ):
        super().__init__()
        self.config, self.grid, self.entries = config, grid, entries
        width = config.width
        self.tokens = nn.Embedding(entries + 1, width)  # the last one is "unknown", for token dropout
        self.facts = nn.ModuleDict({name: nn.Embedding(size + 1, width) for name, size in facts.items()})  # last: "none"
        self.upper = nn.ModuleList(nn.Embedding(k, width) for k, _ in upper)
        self.mix = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in upper
        )
        self.head = nn.Linear(width, entries, bias=False)

    @property
    def length(self) -> int:
        return self.grid[0] * self.grid[1]

    def context(self, facts_BF: torch.Tensor, upper: list[torch.Tensor]) -> torch.Tensor:
        """What every position knows beforehand, [B, T, D]: the facts and the coarser codes around it."""
        context_BD = torch.zeros(len(facts_BF), self.config.width, device=facts_BF.device, dtype=self.tokens.weight.dtype)
        for embedding, fact_B in zip(self.facts.values(), facts_BF.T, strict=True):
            context_BD = context_BD + embedding(torch.where(fact_B < 0, embedding.num_embeddings - 1, fact_B))
        known = context_BD[:, None].expand(-1, self.length, -1)
        for embedding, mix, codes_Bhw in zip(self.upper, self.mix, upper, strict=True):
            x_BDhw = embedding(codes_Bhw.long()).movedim(-1, 1)
            x_BDhw = F.interpolate(x_BDhw + mix(x_BDhw), size=self.grid, mode="nearest")
            known = known + x_BDhw.flatten(2).transpose(1, 2)
        return known

    @abstractmethod
    def features(self, codes_BT: torch.Tensor, context_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D], ready for the head; those at t depend on tokens before t only, and on all that is known."""

    @abstractmethod
    def new_cache(self, context_BTD: torch.Tensor):
        """What step() keeps between tokens; all memory is taken here."""

    @abstractmethod
    def step(self, previous_B: torch.Tensor | None, context_BTD: torch.Tensor, cache, t: int) -> torch.Tensor:
        """Features [B, D] of token t, given token t-1 (none for the first) and the cache of those before."""

    def run_block(self, block: nn.Module, *x: torch.Tensor):
        """A block of features(), computed again in the backward pass where that was asked for."""
        again = self.config.checkpoint and self.training
        return checkpoint(block, *x, use_reentrant=False) if again else block(*x)

    def forward(self, codes_BT: torch.Tensor, context_BTD: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, K]."""
        return self.head(self.features(codes_BT, context_BTD))

    def log_likelihood(self, codes_Bhw: torch.Tensor, facts_BF: torch.Tensor, upper: list[torch.Tensor]) -> torch.Tensor:
        """Natural log-probability of each token, [B, T]."""
        codes_BT = codes_Bhw.flatten(1).long()
        return -self._negative_log_likelihood(self.features(codes_BT, self.context(facts_BF, upper)), codes_BT)

    def loss(self, codes_Bhw: torch.Tensor, facts_BF: torch.Tensor, upper: list[torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy in nats per token, with dropout of facts and tokens while training."""
        codes_BT = codes_Bhw.flatten(1).long()
        seen_BT = codes_BT
        if self.training:
            gone = torch.rand(len(facts_BF), device=facts_BF.device) < self.config.label_dropout
            facts_BF = facts_BF.masked_fill(gone[:, None], -1)
            if self.config.token_dropout:
                lost = torch.rand(codes_BT.shape, device=codes_BT.device) < self.config.token_dropout
                seen_BT = codes_BT.masked_fill(lost, self.entries)
        return self._negative_log_likelihood(self.features(seen_BT, self.context(facts_BF, upper)), codes_BT).mean()

    def _negative_log_likelihood(self, h_BTD: torch.Tensor, codes_BT: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each token, [B, T], fp32; logits exist for a chunk of tokens at a time."""
        h_ND, codes_N = h_BTD.flatten(0, 1), codes_BT.flatten()
        size = max(1, CHUNK // self.entries)
        if len(h_ND) <= size:
            return self._cross_entropy(h_ND, codes_N).view_as(codes_BT)
        parts = zip(h_ND.split(size), codes_N.split(size), strict=True)
        return torch.cat([checkpoint(self._cross_entropy, *part, use_reentrant=False) for part in parts]).view_as(codes_BT)

    def _cross_entropy(self, h_ND: torch.Tensor, codes_N: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(h_ND).float(), codes_N, reduction="none")

    @torch.no_grad()
    def sample(self, facts_BF, upper, uniform_BT, choose, guidance=lambda t: 1.0) -> torch.Tensor:
        """Codes [B, h, w], one token at a time, never computing a prefix again. uniform_BT: the random numbers, one a
        token, so that a sample does not depend on its batch. choose(logits_BK, uniform_B) → tokens. guidance(t): strength
        at token t of classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598), which runs each position with and
        without the facts; no strength but 1 anywhere costs nothing."""
        batch, length = uniform_BT.shape
        strengths = [guidance(t) for t in range(length)]
        guided = len(self.facts) > 0 and any(s != 1.0 for s in strengths)
        known = self.context(facts_BF, upper)
        if guided:
            known = torch.cat([known, self.context(torch.full_like(facts_BF, -1), upper)])
        cache = self.new_cache(known)
        codes_BT = torch.zeros(batch, length, dtype=torch.long, device=facts_BF.device)
        for t, strength in enumerate(strengths):
            previous = codes_BT[:, t - 1].repeat(1 + guided) if t else None
            logits = self.head(self.step(previous, known, cache, t)).float()
            if guided:
                with_facts, without = logits.chunk(2)
                logits = without + strength * (with_facts - without)
            codes_BT[:, t] = choose(logits, uniform_BT[:, t])
        return codes_BT.view(batch, *self.grid)
