"""What prior training minimises, and the shapes that a code store gives a prior."""

import math

import torch
from torch import nn

from hpc.data.codestore import CodeStore
from hpc.errors import UserError
from hpc.train.flops import training_flops
from lesiongen.data import facts
from lesiongen.priors import make
from lesiongen.priors.prior import Prior, PriorShape


class Objective(nn.Module):
    """Mean cross-entropy of a level's codes."""

    def __init__(self, net: Prior):
        super().__init__()
        self.net = net

    def forward(self, batch: dict) -> dict:
        loss = self.net.loss(batch["codes"], batch["facts"], batch["upper"])
        bits = loss.detach() / math.log(2)
        return {"loss": loss, "metrics": {"bits_per_token": bits}, "statistics": None}


def model_shape(store: CodeStore, level: str, names: tuple[str, ...]) -> dict:
    """Arguments of a prior for one level of a store. Raises UserError for a level or facts that it lacks."""
    levels = [entry["name"] for entry in store.levels]  # coarse to fine
    if level not in levels:
        raise UserError(f"The code store {store.folder} has the levels {', '.join(levels)}, not '{level}'.")
    place = levels.index(level)
    own, upper = store.levels[place], store.levels[:place]
    return {
        "grid": tuple(own["grid"]),
        "entries": own["K"],
        "facts": {name: len(values) for name, values in facts.vocabularies(store, names).items()},
        "upper": tuple((u["K"], tuple(u["grid"])) for u in upper),
    }


def blank_batch(shape: dict, number: int) -> dict:
    """A batch that only has the right shapes, on the default device."""
    return {
        "codes": torch.zeros(number, *shape["grid"], dtype=torch.long),
        "facts": torch.zeros(number, len(shape["facts"]), dtype=torch.long),
        "upper": [torch.zeros(number, *grid, dtype=torch.long) for _, grid in shape["upper"]],
    }


def training_flops_per_sample(model: PriorShape, shape: dict) -> int:
    """Of training on one sample."""
    with torch.device("meta"):
        net, batch = Objective(make(model, **shape)).eval(), blank_batch(shape, 1)
        return training_flops(lambda: net(batch))
