"""How tokens are chosen in sampling: temperature, top-k, top-p, guidance, and random numbers of each sample's own.

Samples depend on their seed and index alone, not on the batch or the number of ranks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hpc import watchdog
from hpc.data.order import sample_seed


@dataclass(frozen=True)
class TokenChooser:
    """How a token is chosen from its logits. Prior.sample() calls it for each token.

    Attributes:
        temperature: Divides the logits; below 1, likely tokens become more likely.
        top_k: Choose among the k most likely tokens; 0 for all.
        top_p: Choose among the fewest most likely tokens whose probabilities sum to at least top_p; 1 for all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __call__(self, logits_BK: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
        """Chooses tokens by inverting the cumulative distribution at a uniform random number.

        Args:
            logits_BK: Logits of the tokens.
            uniform_B: Random numbers in [0, 1), one per sample. They make the choice independent of the rest of the batch.

        Returns:
            Tokens, [B].
        """
        watchdog.beat()
        logits_BK = logits_BK / self.temperature
        if 0 < self.top_k < logits_BK.shape[-1]:
            smallest = logits_BK.topk(self.top_k).values[:, -1:]
            logits_BK = logits_BK.masked_fill(logits_BK < smallest, -torch.inf)
        p_BK = logits_BK.softmax(-1)
        if self.top_p < 1:
            ordered, index = p_BK.sort(descending=True)
            # Keep the token at which the sum reaches top_p, so that at least one token stays.
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0)
            p_BK = torch.zeros_like(p_BK).scatter(-1, index, ordered)
        cumulative = p_BK.cumsum(-1)
        target = uniform_B[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target.to(cumulative.dtype), right=True)[:, 0].clamp(max=p_BK.shape[-1] - 1)


def guidance(strength: float, schedule: str, length: int) -> Callable[[int], float]:
    """Returns the strength of classifier-free guidance at each token.

    Linear guidance grows over the tokens, as in Muse (arXiv:2301.00704, section 2.7), for more varied samples: early tokens
    decide what a sample shows and are sampled freely, late tokens follow the facts. arXiv:2404.13040 studies the linear and
    the cosine schedule.

    Args:
        strength: Strength of the guidance; 1 is no guidance.
        schedule: "constant"; "linear", from 1 at the first token to `strength` at the last; or "cosine", the same but slower
            at both ends.
        length: Number of tokens.

    Returns:
        A function from the index of a token to the strength.
    """

    def strength_at(t: int) -> float:
        progress = t / max(1, length - 1)
        weight = {"constant": 1.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[schedule]
        return 1 + (strength - 1) * weight

    return strength_at


def uniform_numbers(seed: int, samples: Sequence[int], grid: tuple[int, int]) -> torch.Tensor:
    """Draws uniform random numbers from a random stream of its own for each sample.

    Args:
        seed: Seed of the streams.
        samples: Global indices of the samples; each selects a stream.
        grid: Height and width of the grid; T is their product.

    Returns:
        [B, T] in [0, 1).
    """
    rows = [torch.rand(grid[0] * grid[1], generator=torch.Generator().manual_seed(sample_seed(seed, s))) for s in samples]
    return torch.stack(rows) if rows else torch.empty(0, grid[0] * grid[1])
