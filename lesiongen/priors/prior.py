"""The interface of all priors, whatever their architecture: p(codes | facts, coarser codes), token by token in raster order.

The facts (label, site, …) and the codes of coarser levels are the context. The context is known before the first token is
sampled, so every position may use all of it. Coarser codes are aligned in space with the positions of this level.

Shapes: B batch, h × w grid, T = h·w tokens, K entries of the codebook, D width, F facts of an image (-1 for an unknown one).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpc.config import volatile

MAX_LOGITS = 2**24  # logits that the loss holds at once; more are computed in chunks, and again in the backward pass


@dataclass(frozen=True)
class BasePriorConfig:
    """Fields that the configs of all kinds of priors share."""

    layers: int = 6
    width: int = 384  # channels, D
    dropout: float = 0.1
    label_dropout: float = 0.1  # fraction of training images shown without any fact, for classifier-free guidance
    token_dropout: float = 0.0  # fraction of input tokens replaced by "unknown" in training
    checkpoint: bool = volatile(False)  # recompute activations in the backward pass: less memory, a third more time

    def __post_init__(self):
        if min(self.layers, self.width) < 1:
            raise ValueError("layers and width must be at least 1")
        if not all(0 <= p < 1 for p in (self.dropout, self.label_dropout, self.token_dropout)):
            raise ValueError("dropout, label_dropout and token_dropout must be at least 0 and below 1")


class Prior(nn.Module, ABC):
    """Base class: the context, the training loss and sampling.

    A subclass implements features() for training, and new_cache() and step() for sampling. features() and step() must compute
    the same features.
    """

    def __init__(
        self,
        config: BasePriorConfig,
        grid: tuple[int, int],
        entries: int,
        facts: dict[str, int],
        upper: tuple[tuple[int, tuple[int, int]], ...] = (),
    ):
        """Creates the layers that all kinds of priors share: the embeddings of the context and the tokens, and the head.

        Args:
            config: Sizes and dropouts.
            grid: Height and width of this level's grid.
            entries: Codes of this level, K.
            facts: {name of a fact: number of its values}.
            upper: (entries, grid) of each coarser level, coarse to fine.
        """
        super().__init__()
        self.config, self.grid, self.entries = config, grid, entries
        width = config.width
        self.tokens = nn.Embedding(entries + 1, width)  # embeds codes; the last row is "unknown", for token dropout
        # The last row of each fact's embedding is for an unknown fact.
        self.facts = nn.ModuleDict({name: nn.Embedding(size + 1, width) for name, size in facts.items()})
        self.upper = nn.ModuleList(nn.Embedding(k, width) for k, _ in upper)
        # For each coarser level, two convolutions over its embedded codes.
        self.mix = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in upper
        )
        self.head = nn.Linear(width, entries, bias=False)

    @property
    def length(self) -> int:
        """Tokens of a sample, T."""
        return self.grid[0] * self.grid[1]

    def context(self, facts_BF: torch.Tensor, upper: list[torch.Tensor]) -> torch.Tensor:
        """Computes the context: the sum of the embedded facts and of the coarser codes around each position.

        Args:
            facts_BF: Index of each fact's value; -1 for unknown.
            upper: Codes [B, h, w] of the coarser levels, coarse to fine.

        Returns:
            [B, T, D].
        """
        facts_BD = torch.zeros(len(facts_BF), self.config.width, device=facts_BF.device, dtype=self.tokens.weight.dtype)
        for embedding, fact_B in zip(self.facts.values(), facts_BF.T, strict=True):
            facts_BD = facts_BD + embedding(torch.where(fact_B < 0, embedding.num_embeddings - 1, fact_B))
        context_BTD = facts_BD[:, None].expand(-1, self.length, -1)
        for embedding, mix, codes_Bhw in zip(self.upper, self.mix, upper, strict=True):
            x_BDhw = embedding(codes_Bhw.long()).movedim(-1, 1)
            x_BDhw = F.interpolate(x_BDhw + mix(x_BDhw), size=self.grid, mode="nearest")
            context_BTD = context_BTD + x_BDhw.flatten(2).transpose(1, 2)
        return context_BTD

    @abstractmethod
    def features(self, codes_BT: torch.Tensor, context_BTD: torch.Tensor) -> torch.Tensor:
        """Computes the input of the head for all positions at once.

        The features of position t may depend only on the tokens before t and on the context.

        Args:
            codes_BT: Tokens of this level; `entries` stands for an unknown token.
            context_BTD: What context() returns.

        Returns:
            [B, T, D].
        """

    @abstractmethod
    def new_cache(self, context_BTD: torch.Tensor) -> Any:
        """Allocates what step() keeps from one token to the next, such as keys and values.

        Args:
            context_BTD: What context() returns; gives batch size, dtype and device.

        Returns:
            The cache, in a form that only step() of the same class understands.
        """

    @abstractmethod
    def step(self, previous_B: torch.Tensor | None, context_BTD: torch.Tensor, cache: Any, t: int) -> torch.Tensor:
        """Computes the features of one token while sampling. Must be called for the tokens in raster order.

        Args:
            previous_B: Token t - 1; None if t is 0.
            context_BTD: What context() returns.
            cache: What new_cache() returned; step() updates it.
            t: Index of the token to sample.

        Returns:
            [B, D].
        """

    def run_block(self, block: nn.Module, *inputs: torch.Tensor) -> Any:
        """Runs a block of features(), with activation checkpointing where the config asks for it."""
        recompute = self.config.checkpoint and self.training
        return checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)

    def forward(self, codes_BT: torch.Tensor, context_BTD: torch.Tensor) -> torch.Tensor:
        """Computes the logits of all tokens, [B, T, K]. Arguments as for features()."""
        return self.head(self.features(codes_BT, context_BTD))

    def token_losses(self, codes_Bhw: torch.Tensor, facts_BF: torch.Tensor, upper: list[torch.Tensor]) -> torch.Tensor:
        """Computes the cross-entropy of each token in nats. In training mode, drops facts and input tokens at random.

        Args:
            codes_Bhw: Codes of this level.
            facts_BF: Index of each fact's value; -1 for unknown.
            upper: Codes [B, h, w] of the coarser levels, coarse to fine.

        Returns:
            [B, T], fp32.
        """
        codes_BT = codes_Bhw.flatten(1).long()
        input_BT = codes_BT
        if self.training:
            dropped_B = torch.rand(len(facts_BF), device=facts_BF.device) < self.config.label_dropout
            facts_BF = facts_BF.masked_fill(dropped_B[:, None], -1)
            if self.config.token_dropout:
                dropped_BT = torch.rand(codes_BT.shape, device=codes_BT.device) < self.config.token_dropout
                input_BT = codes_BT.masked_fill(dropped_BT, self.entries)
        return self._negative_log_likelihood(self.features(input_BT, self.context(facts_BF, upper)), codes_BT)

    def _negative_log_likelihood(self, features_BTD: torch.Tensor, codes_BT: torch.Tensor) -> torch.Tensor:
        """Computes the cross-entropy of each token, [B, T], fp32. Holds the logits of one chunk of tokens at a time."""
        features_ND, codes_N = features_BTD.flatten(0, 1), codes_BT.flatten()
        size = max(1, MAX_LOGITS // self.entries)
        if len(features_ND) <= size:
            return self._cross_entropy(features_ND, codes_N).view_as(codes_BT)
        chunks = zip(features_ND.split(size), codes_N.split(size), strict=True)
        losses = [checkpoint(self._cross_entropy, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(losses).view_as(codes_BT)

    def _cross_entropy(self, features_ND: torch.Tensor, codes_N: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(features_ND).float(), codes_N, reduction="none")

    @torch.no_grad()
    def sample(
        self,
        facts_BF: torch.Tensor,
        upper: list[torch.Tensor],
        uniform_BT: torch.Tensor,
        choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        guidance: Callable[[int], float] = lambda t: 1.0,
        prompt_BP: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Samples codes one token at a time. A cache avoids computing earlier tokens again.

        Args:
            facts_BF: Index of each fact's value; -1 for unknown.
            upper: Codes [B, h, w] of the coarser levels, coarse to fine.
            uniform_BT: Random numbers in [0, 1), one per token, so that a sample does not depend on its batch.
            choose: Maps logits [B, K] and random numbers [B] to tokens [B].
            guidance: Maps t to the strength of classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) at token t.
                Guidance computes each position with and without the facts, so it doubles the work. If the strength is 1 at
                all tokens, there is no guidance and no extra work.
            prompt_BP: The first P tokens, which are given and not sampled. None samples all tokens.

        Returns:
            Codes [B, h, w], which begin with the prompt.
        """
        batch, length = uniform_BT.shape
        strengths = [guidance(t) for t in range(length)]
        guided = len(self.facts) > 0 and any(s != 1.0 for s in strengths)
        context_BTD = self.context(facts_BF, upper)
        if guided:  # the second half of the batch repeats the samples without facts
            context_BTD = torch.cat([context_BTD, self.context(torch.full_like(facts_BF, -1), upper)])
        cache = self.new_cache(context_BTD)
        codes_BT = torch.zeros(batch, length, dtype=torch.long, device=facts_BF.device)
        given = 0 if prompt_BP is None else prompt_BP.shape[1]
        if given:
            codes_BT[:, :given] = prompt_BP
        for t, strength in enumerate(strengths):
            previous_B = codes_BT[:, t - 1].repeat(1 + guided) if t else None
            features_BD = self.step(previous_B, context_BTD, cache, t)  # also for a given token: it fills the cache
            if t < given:
                continue
            logits_BK = self.head(features_BD).float()
            if guided:
                with_facts_BK, without_BK = logits_BK.chunk(2)
                logits_BK = without_BK + strength * (with_facts_BK - without_BK)
            codes_BT[:, t] = choose(logits_BK, uniform_BT[:, t])
        return codes_BT.view(batch, *self.grid)
