"""Optimizer, parameter groups, and learning-rate schedules as pure functions of the samples seen."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "trapezoid"] = "constant"
    warmup: int = 0  # samples
    floor: float = 0.1  # the last learning rate of a cosine, as a fraction of lr
    cooldown: float = 0.3  # the last fraction of a trapezoid, down to zero

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        if not all(0 <= b < 1 for b in self.betas) or self.warmup < 0 or self.weight_decay < 0:
            raise ValueError("betas lie in 0 to 1; warmup and weight_decay are at least 0")
        if not (0 <= self.floor <= 1 and 0 <= self.cooldown <= 1):
            raise ValueError("floor and cooldown are fractions between 0 and 1")


def learning_rate(config: OptimConfig, seen: int, total: int) -> float:
    """Rate for the batch that begins at sample `seen` of `total`."""
    rise = min(1.0, (seen + 1) / config.warmup) if config.warmup else 1.0
    done = min(1.0, seen / max(1, total))
    if config.schedule == "cosine":
        fall = config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * done))
    elif config.schedule == "trapezoid":
        fall = min(1.0, (1 - done) / config.cooldown) if config.cooldown else 1.0
    else:
        fall = 1.0
    return config.lr * rise * fall


class AdamW(torch.optim.AdamW):
    """AdamW whose next step can be left out. DeepSpeed calls step() at the end of its own under every ZeRO stage, after
    which it clears gradients and gathers parameters: leaving out just this keeps its bookkeeping right."""

    skip = False

    def step(self, closure=None):
        return None if self.skip else super().step(closure)


def optimizer(module: nn.Module, config: OptimConfig) -> AdamW:
    """Weight decay on matrices and filters; none on biases, norms and embeddings."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trainable = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    kept = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if id(p) not in kept], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)
