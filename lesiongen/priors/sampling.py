"""Choosing tokens: temperature, top-k, top-p, guidance over time, and one stream of random numbers per sample."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hpc.data.order import sample_seed


@dataclass(frozen=True)
class Choice:
    temperature: float = 1.0
    top_k: int = 0  # 0 = all
    top_p: float = 1.0

    def __call__(self, logits_BK: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
        """Tokens [B] by inverting the cumulative distribution at a given random number: no state, no batch effects."""
        logits_BK = logits_BK / self.temperature
        if 0 < self.top_k < logits_BK.shape[-1]:
            least = logits_BK.topk(self.top_k).values[:, -1:]
            logits_BK = logits_BK.masked_fill(logits_BK < least, -torch.inf)
        p_BK = logits_BK.softmax(-1)
        if self.top_p < 1:
            ordered, index = p_BK.sort(descending=True)
            # Keeps the token that crosses the threshold: at least one always stays.
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0)
            p_BK = torch.zeros_like(p_BK).scatter(-1, index, ordered)
        cumulative = p_BK.cumsum(-1)
        target = uniform_B[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target.to(cumulative.dtype), right=True)[:, 0].clamp(max=p_BK.shape[-1] - 1)


def guidance(strength: float, schedule: str, length: int) -> Callable[[int], float]:
    """Strength of guidance at each token, 1 for none. linear: from none at the first token to all at the last, as in Muse
    (arXiv:2301.00704, section 2.7), whose reason is variety: early tokens fix what a sample will be and are drawn freely,
    late ones follow the facts. cosine: the same, slow at both ends (both: arXiv:2404.13040)."""

    def at(t: int) -> float:
        done = t / max(1, length - 1)
        share = {"constant": 1.0, "linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2}[schedule]
        return 1 + (strength - 1) * share

    return at


def uniforms(seed: int, samples: Sequence[int], grid: tuple[int, int]) -> torch.Tensor:
    """Random numbers [B, T] in [0, 1), one stream per global sample index."""
    rows = [torch.rand(grid[0] * grid[1], generator=torch.Generator().manual_seed(sample_seed(seed, s))) for s in samples]
    return torch.stack(rows) if rows else torch.empty(0, grid[0] * grid[1])
