"""Optimizers and their parameter groups; the learning rate and the decay of averaged weights.

The training loop calls this module. Learning rate and decay are pure functions of the number of samples seen, so they do not
depend on the number of ranks, and a checkpoint need not store them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hpc.train.zero import shape_of

RAMPUP_RATIO = 0.05  # longest half-life of averaged weights, as a fraction of the samples seen


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the schedule of its learning rate."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 3e-4  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # for adamw and adam
    eps: float = 1e-8  # for adamw and adam
    momentum: float = 0.9  # for sgd
    weight_decay: float = 0.0  # adamw: decoupled from the gradient; adam and sgd: added to the gradient
    schedule: Literal["constant", "cosine", "trapezoid", "piecewise"] = "constant"
    warmup: int = 0  # length of the linear warm-up, in samples
    floor: float = 0.1  # for cosine: final learning rate, as a fraction of lr
    cooldown: float = 0.3  # for trapezoid: length of the final linear decay to 0, as a fraction of training
    pieces: tuple[float, ...] = ()  # for piecewise: learning rates as fractions of lr, each for an equal part of training

    def __post_init__(self):
        if self.lr <= 0 or self.eps <= 0:
            raise ValueError(f"lr and eps must be above 0, not {self.lr} and {self.eps}")
        if not all(0 <= b < 1 for b in (*self.betas, self.momentum)) or self.warmup < 0 or self.weight_decay < 0:
            raise ValueError("betas and momentum must be at least 0 and below 1; warmup and weight_decay at least 0")
        if not (0 <= self.floor <= 1 and 0 <= self.cooldown <= 1):
            raise ValueError("floor and cooldown must be fractions between 0 and 1")
        if (self.schedule == "piecewise") != bool(self.pieces) or any(p < 0 for p in self.pieces):
            raise ValueError(
                "set pieces if and only if schedule: piecewise; each must be at least 0. "
                "Example: [1, 1, 0.125] trains its last third with an eighth of lr"
            )


def learning_rate(config: OptimConfig, seen: int, total: int) -> float:
    """Returns the learning rate of one step.

    Args:
        config: The schedule.
        seen: Samples seen before this step.
        total: Samples in the whole training.
    """
    warmup_factor = min(1.0, (seen + 1) / config.warmup) if config.warmup else 1.0
    progress = min(1.0, seen / max(1, total))
    if config.schedule == "cosine":
        schedule_factor = config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "trapezoid":
        schedule_factor = min(1.0, (1 - progress) / config.cooldown) if config.cooldown else 1.0
    elif config.schedule == "piecewise":
        count = len(config.pieces)
        schedule_factor = config.pieces[min(count - 1, seen * count // max(1, total))]
    else:
        schedule_factor = 1.0
    return config.lr * warmup_factor * schedule_factor


def average_decay(half_life: float, seen: int, batch: int) -> float:
    """Returns the decay of the averaged weights at one step: average = decay * average + (1 - decay) * weights.

    Whatever the batch size, the influence of old weights halves every `half_life` samples. Early in training the half-life
    is limited to RAMPUP_RATIO of the samples seen, so that the average soon forgets the random initial weights. Follows the
    code of Karras et al. 2022 (arXiv:2206.00364).

    Args:
        half_life: Half-life of the average, in samples; 0 = no averaging, the decay is 0.
        seen: Samples seen before this step.
        batch: Samples in this step.
    """
    half_life = min(half_life, RAMPUP_RATIO * seen)
    return 0.5 ** (batch / half_life) if half_life else 0.0


class SkippableOptimizer(torch.optim.Optimizer):
    """An optimizer that can skip its update. The engine sets `skip`; DeepSpeed calls step().

    DeepSpeed's own step() calls this step() under every ZeRO stage, then clears gradients and gathers parameters. Skipping
    only this call keeps DeepSpeed's state consistent.

    Attributes:
        skip: Whether step() does nothing.
    """

    skip = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the parameters, unless `skip` is set. Returns the closure's loss, if a closure is given."""
        return None if self.skip else super().step(closure)


class AdamW(SkippableOptimizer, torch.optim.AdamW):
    """torch's AdamW, skippable."""


class Adam(SkippableOptimizer, torch.optim.Adam):
    """torch's Adam, skippable."""


class Momentum(torch.optim.Optimizer):
    """Gradient descent with momentum; the same updates as torch.optim.SGD.

    When the number of ranks changes, DeepSpeed converts only optimizer states that have Adam's names. So the momentum buffer
    is called exp_avg, and exp_avg_sq is the same tensor.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Updates the parameters. The closure is ignored."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                buffer = state["exp_avg"] if state else torch.zeros_like(p)
                buffer.mul_(group["momentum"]).add_(p.grad).add_(p, alpha=group["weight_decay"])
                p.sub_(buffer, alpha=group["lr"])
                state |= {"step": state.get("step", 0) + 1, "exp_avg": buffer, "exp_avg_sq": buffer}


class SGD(SkippableOptimizer, Momentum):
    """Gradient descent with momentum, skippable."""


def build_optimizer(module: nn.Module, config: OptimConfig) -> SkippableOptimizer:
    """Makes the optimizer of a module's trainable parameters.

    Weight decay applies to matrices and filters, not to biases, norms and embeddings.

    Args:
        module: The model.
        config: The optimizer's config.
    """
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trainable = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trainable if len(shape_of(p)) >= 2 and id(p) not in embeddings]
    decayed_ids = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if id(p) not in decayed_ids], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if config.name == "sgd":
        return SGD(groups, {"lr": config.lr, "momentum": config.momentum})
    return {"adamw": AdamW, "adam": Adam}[config.name](groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
