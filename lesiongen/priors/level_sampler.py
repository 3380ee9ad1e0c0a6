"""Samples the codes of one level from its prior.

The codes depend on the seed, the samples' indices and the attempt, not on batches.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from hpc.data.order import sample_seed
from lesiongen.priors.cuda_graphs import GraphedFunction
from lesiongen.priors.prior import Prior
from lesiongen.priors.sampling import TokenChooser, guidance, uniform_numbers


class Settings(Protocol):
    """The settings of one level that `of` reads; SampleConfig.at(level) has them."""

    temperature: float
    top_k: int
    top_p: float
    guidance: float
    guidance_schedule: str
    seed: int
    cuda_graphs: bool


class LevelSampler:
    """Samples grids of codes of one level. The sample stage owns one for each level and calls them coarse to fine."""

    def __init__(
        self,
        prior: Prior,
        choice: TokenChooser,
        guidance: Callable[[int], float],
        seed: int,
        device: torch.device,
        cuda_graphs: bool = False,
    ):
        """Prepares the sampler.

        Args:
            prior: The level's prior, in evaluation mode.
            choice: How a token is chosen from its logits.
            guidance: Strength of guidance at each token.
            seed: Seed of the level's random numbers. Each level needs a seed of its own: with the same numbers, samples
                that are unlikely on one level would be unlikely on all.
            device: The device that computes.
            cuda_graphs: On a GPU, record a batch's kernels once and replay them for later batches.
        """
        self.prior, self.choice, self.guidance, self.seed = prior, choice, guidance, seed
        self.device = device
        self._sample = GraphedFunction(self._draw) if cuda_graphs and self.device.type == "cuda" else self._draw

    @classmethod
    def of(cls, settings: Settings, index: int, prior: Prior, device: torch.device) -> "LevelSampler":
        """Prepares the sampler of a level from the settings of `sample`.

        Args:
            settings: The settings of the level.
            index: Number of the level, from 0 for the coarsest.
            prior: The level's prior, in evaluation mode.
            device: The device that computes.
        """
        choice = TokenChooser(settings.temperature, settings.top_k, settings.top_p)
        strength = guidance(settings.guidance, settings.guidance_schedule, prior.length)
        return cls(prior, choice, strength, settings.seed * 1009 + index, device, settings.cuda_graphs)

    def __call__(
        self, facts: Sequence[Sequence[int]], upper: list[torch.Tensor], indices: Sequence[int], attempt: int = 0
    ) -> torch.Tensor:
        """Samples one batch.

        Args:
            facts: Facts that each sample is to show, as indices of the prior's values, [B, F]; -1 for unknown.
            upper: Codes [B, h, w] of the coarser levels, coarse to fine.
            indices: Global indices of the samples; they decide the random numbers.
            attempt: Replacements of a sample have the attempts 1, 2, …, which give other random numbers.

        Returns:
            Codes [B, h, w].
        """
        seed = sample_seed(self.seed, -attempt - 1) if attempt else self.seed
        numbers = uniform_numbers(seed, indices, self.prior.grid).to(self.device)
        facts_BF = torch.tensor(facts, dtype=torch.long, device=self.device).view(len(indices), -1)
        return self._sample(facts_BF, numbers, *upper)

    def _draw(self, facts_BF: torch.Tensor, uniform_BT: torch.Tensor, *upper: torch.Tensor) -> torch.Tensor:
        """Samples with tensor arguments only, as a CUDA graph needs."""
        return self.prior.sample(facts_BF, list(upper), uniform_BT, self.choice, self.guidance)
