"""Generates codes from the priors of all levels, coarse to fine, and measures how likely they are.

The sample stage owns one CodeSampler. The codes of a sample depend on the seed, the sample's index and the attempt, not on the
batch or the number of ranks.

Shapes: B batch, h × w codes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hpc.data.codestore import code_dtype
from lesiongen.data.facts import PriorFacts
from lesiongen.priors.level_sampler import LevelSampler, Settings
from lesiongen.priors.prior import Prior


@dataclass(frozen=True)
class Codes:
    """Samples as codes.

    Attributes:
        indices: Index of each sample, int64 [B].
        codes: Codes of each level, [B, h, w], of the type in which the code store holds them.
        bits: For each level the mean bits per token of each sample, float32 [B].
    """

    indices: np.ndarray
    codes: dict[str, np.ndarray]
    bits: dict[str, np.ndarray]


class CodeSampler:
    """Samples all levels.

    Attributes:
        samplers: The sampler of each level, coarse to fine.
        facts: The facts that each level's prior is conditioned on.
    """

    def __init__(self, samplers: dict[str, LevelSampler], facts: dict[str, PriorFacts]):
        """Joins the parts. Both have the levels coarse to fine."""
        self.samplers, self.facts = samplers, facts

    @classmethod
    def of(cls, priors: dict[str, tuple[Prior, dict]], settings: dict[str, Settings], device: torch.device) -> "CodeSampler":
        """Prepares the samplers of all levels.

        Args:
            priors: The prior of each level, coarse to fine, as load_prior() returns it.
            settings: The settings of `sample` for each level.
            device: The device that computes.
        """
        samplers = {
            level: LevelSampler.of(settings[level], i, prior, device) for i, (level, (prior, _)) in enumerate(priors.items())
        }
        facts = {level: PriorFacts(about["facts"], about["training_facts"]) for level, (_, about) in priors.items()}
        return cls(samplers, facts)

    @torch.no_grad()
    def sample(
        self,
        facts: Sequence[dict[str, str]],
        indices: Sequence[int],
        attempt: int = 0,
        given: dict[str, np.ndarray] | None = None,
    ) -> Codes:
        """Samples one batch.

        Args:
            facts: The facts that each sample is to show.
            indices: Indices of the samples. With the attempt they decide the random numbers.
            attempt: 0 for a sample, 1 for its first replacement, and so on.
            given: Codes of the levels that are coarser than those of this sampler, [B, h, w]; None if there are none.
        """
        codes: dict[str, torch.Tensor] = {}
        bits: dict[str, np.ndarray] = {}
        for level, sampler in self.samplers.items():
            numbers = [self.facts[level].numbers(f) for f in facts]
            coarser = [torch.from_numpy(grid.astype(np.int64)).to(sampler.device) for grid in (given or {}).values()]
            upper = coarser + list(codes.values())
            codes[level] = sampler(numbers, upper, indices, attempt)
            bits[level] = self._bits(level, codes[level], numbers, upper)
        grids = {
            level: grid.cpu().numpy().astype(code_dtype(self.samplers[level].prior.entries)) for level, grid in codes.items()
        }
        return Codes(np.asarray(indices, np.int64), grids, bits)

    @torch.no_grad()
    def bits(self, codes: dict[str, np.ndarray], facts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Measures the mean bits per token of given codes at each level.

        Args:
            codes: Codes of each level, [B, h, w].
            facts: The index of each image's value of each fact, int [B]; -1 for unknown.

        Returns:
            {level: float32 [B]}.
        """
        found, upper = {}, []
        for level, sampler in self.samplers.items():
            grid = torch.from_numpy(codes[level].astype(np.int64)).to(sampler.device)
            names = self.facts[level].values
            numbers = np.stack([facts[name] for name in names], 1).tolist() if names else [[] for _ in range(len(grid))]
            found[level] = self._bits(level, grid, numbers, upper)
            upper.append(grid)
        return found

    def _bits(
        self, level: str, codes_Bhw: torch.Tensor, facts: Sequence[Sequence[int]], upper: list[torch.Tensor]
    ) -> np.ndarray:
        """Returns the bits per token under the facts, without guidance and with all codes allowed, float32 [B]."""
        sampler = self.samplers[level]
        facts_BF = torch.tensor(facts, dtype=torch.long, device=sampler.device).view(len(codes_Bhw), -1)
        losses_BT = sampler.prior.token_losses(codes_Bhw, facts_BF, upper)
        return (losses_BT.double().mean(1) / math.log(2)).float().cpu().numpy()
