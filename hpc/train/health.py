"""When a training counts as hung, and which losses count as a spike."""

import math
import statistics
from dataclasses import dataclass

from hpc.config import volatile

REMEMBERED = 128  # losses of the latest accepted steps that a new loss is compared with
ENOUGH = 32  # from so many losses on, their spread is known
EARLY_FACTOR = 10  # before that, a loss is a spike if it is this many times the largest loss so far
SMALLEST_SPREAD = 0.02  # spread that is assumed at least, as a share of the median loss


@dataclass(frozen=True)
class HealthConfig:
    """When a training counts as hung or diverged."""

    hang_minutes: float = volatile(5.0)  # a step is hung after this time or ten times the median step, whichever is longer
    evaluation_minutes: float = volatile(30.0)  # the same for a batch or a picture of an evaluation
    save_minutes: float = volatile(30.0)  # the same for saving a checkpoint
    spike: float = volatile(10.0)  # a loss is a spike if it is so many spreads above the median of the latest losses; 0 = never
    max_skipped: int = volatile(20)  # after this many spikes or non-finite steps in a row, training rolls back
    max_rollbacks: int = volatile(2)  # training stops as diverged instead of rolling back more often

    def __post_init__(self):
        if min(self.hang_minutes, self.evaluation_minutes, self.save_minutes) <= 0 or self.max_skipped < 1:
            raise ValueError("hang_minutes, evaluation_minutes and save_minutes must be above 0 and max_skipped at least 1")
        if min(self.spike, self.max_rollbacks) < 0:
            raise ValueError("spike and max_rollbacks must be at least 0")


def loss_limit(recent: list[float], spike: float) -> float:
    """Returns the loss above which a step counts as a spike, so that its update is left out.

    The spread of the latest losses is their median absolute deviation, scaled to the standard deviation of normal noise: unlike
    the standard deviation, a few outliers do not widen it.

    Args:
        recent: Losses of the latest accepted steps.
        spike: `HealthConfig.spike`.
    """
    if not spike or not recent:
        return math.inf
    if len(recent) < ENOUGH:
        return EARLY_FACTOR * max(1e-3, *map(abs, recent))
    median = statistics.median(recent)
    spread = 1.4826 * statistics.median(abs(loss - median) for loss in recent)
    return median + spike * max(spread, SMALLEST_SPREAD * abs(median), 1e-3)
