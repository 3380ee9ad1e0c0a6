"""Optimizers, parameter groups; learning rates and averaging as pure functions of the samples seen."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

RAMP = 0.05  # of the samples seen: the longest half-life of an average


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)  # of adamw and adam
    eps: float = 1e-8
    momentum: float = 0.9  # of sgd
    weight_decay: float = 0.0  # adamw takes it off the weights, adam and sgd add it to the gradient
    schedule: Literal["constant", "cosine", "trapezoid", "piecewise"] = "constant"
    warmup: int = 0  # samples
    floor: float = 0.1  # the last learning rate of a cosine, as a fraction of lr
    cooldown: float = 0.3  # the last fraction of a trapezoid, down to zero
    pieces: tuple[float, ...] = ()  # of a piecewise schedule: fractions of lr, each over an equal part of training

    def __post_init__(self):
        if self.lr <= 0 or self.eps <= 0:
            raise ValueError(f"lr and eps must be above 0, not {self.lr} and {self.eps}")
        if not all(0 <= b < 1 for b in (*self.betas, self.momentum)) or self.warmup < 0 or self.weight_decay < 0:
            raise ValueError("betas and momentum lie in 0 to 1; warmup and weight_decay are at least 0")
        if not (0 <= self.floor <= 1 and 0 <= self.cooldown <= 1):
            raise ValueError("floor and cooldown are fractions between 0 and 1")
        if (self.schedule == "piecewise") != bool(self.pieces) or any(p < 0 for p in self.pieces):
            raise ValueError("pieces, each at least 0, go with schedule: piecewise; [1, 1, 0.125] ends at an eighth of lr")


def learning_rate(config: OptimConfig, seen: int, total: int) -> float:
    """Rate for the batch that begins at sample `seen` of `total`."""
    rise = min(1.0, (seen + 1) / config.warmup) if config.warmup else 1.0
    done = min(1.0, seen / max(1, total))
    if config.schedule == "cosine":
        fall = config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * done))
    elif config.schedule == "trapezoid":
        fall = min(1.0, (1 - done) / config.cooldown) if config.cooldown else 1.0
    elif config.schedule == "piecewise":
        number = len(config.pieces)
        fall = config.pieces[min(number - 1, seen * number // max(1, total))]
    else:
        fall = 1.0
    return config.lr * rise * fall


def average_decay(half_life: float, seen: int, batch: int) -> float:
    """What the averaged weights keep of themselves at the step over the samples from `seen` to `seen + batch`; the rest
    comes from the new weights. These count half as much after `half_life` samples, whatever the batch. It is short at
    first, so that the random weights of the start are forgotten (Karras et al. 2022, arXiv:2206.00364, their code)."""
    half_life = min(half_life, RAMP * seen)
    return 0.5 ** (batch / half_life) if half_life else 0.0


class Skippable(torch.optim.Optimizer):
    """An optimizer whose next step can be left out. DeepSpeed calls step() at the end of its own under every ZeRO stage,
    after which it clears gradients and gathers parameters: leaving out just this keeps its bookkeeping right."""

    skip = False

    def step(self, closure=None):
        return None if self.skip else super().step(closure)


class AdamW(Skippable, torch.optim.AdamW):
    pass


class Adam(Skippable, torch.optim.Adam):
    pass


class Momentum(torch.optim.Optimizer):
    """Gradient descent with momentum, as torch.optim.SGD. Its state has the names of Adam's, the only ones that DeepSpeed
    carries over to another number of ranks: exp_avg is the sum of gradients, exp_avg_sq is the same tensor again."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                total = state["exp_avg"] if state else torch.zeros_like(p)
                total.mul_(group["momentum"]).add_(p.grad).add_(p, alpha=group["weight_decay"])
                p.sub_(total, alpha=group["lr"])
                state |= {"step": state.get("step", 0) + 1, "exp_avg": total, "exp_avg_sq": total}


class SGD(Skippable, Momentum):
    pass


def optimizer(module: nn.Module, config: OptimConfig) -> Skippable:
    """Weight decay on matrices and filters; none on biases, norms and embeddings."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trainable = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    kept = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if id(p) not in kept], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if config.name == "sgd":
        return SGD(groups, {"lr": config.lr, "momentum": config.momentum})
    return {"adamw": AdamW, "adam": Adam}[config.name](groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
