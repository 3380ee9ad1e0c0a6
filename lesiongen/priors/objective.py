"""What prior training minimises, and the arguments of a prior that follow from a code store."""

import math

import torch
from torch import nn

from hpc.data.codestore import CodeStore
from hpc.errors import UserError
from hpc.train.flops import training_flops
from lesiongen.data import facts
from lesiongen.priors import make
from lesiongen.priors.prior import BasePriorConfig, Prior


class Objective(nn.Module):
    """A prior and its training loss, the mean cross-entropy of a level's codes. The training engine calls forward()."""

    def __init__(self, net: Prior):
        super().__init__()
        self.net = net

    def forward(self, batch: dict) -> dict:
        """Computes the loss of one micro-batch.

        Args:
            batch: "codes" [B, h, w]; "facts" [B, F], -1 for unknown; "upper", list of the coarser levels' codes [B, h, w].

        Returns:
            "loss", a scalar in nats per token; "metrics" {name: detached scalar}; "statistics", None; and "bits_B", the mean
            bits per token of each sample, detached.
        """
        nats_BT = self.net.token_losses(batch["codes"], batch["facts"], batch["upper"])
        loss = nats_BT.mean()
        metrics = {"bits_per_token": loss.detach() / math.log(2)}
        bits_B = nats_BT.detach().mean(1) / math.log(2)
        return {"loss": loss, "metrics": metrics, "statistics": None, "bits_B": bits_B}


def model_shape(store: CodeStore, level: str, names: tuple[str, ...]) -> dict:
    """Returns the arguments of a prior that follow from the data: grid, entries, facts and upper.

    Args:
        store: The code store.
        level: Name of the level that the prior models.
        names: Names of the facts that the prior is given.

    Raises:
        UserError: The store lacks the level, or a fact has no values in it.
    """
    levels = [entry["name"] for entry in store.levels]  # coarse to fine
    if level not in levels:
        raise UserError(f"The code store {store.folder} has the levels {', '.join(levels)}, not '{level}'.")
    level_index = levels.index(level)
    entry, upper = store.levels[level_index], store.levels[:level_index]
    return {
        "grid": tuple(entry["grid"]),
        "entries": entry["K"],
        "facts": {name: len(values) for name, values in facts.vocabularies(store, names).items()},
        "upper": tuple((u["K"], tuple(u["grid"])) for u in upper),
    }


def blank_batch(shape: dict, number: int) -> dict:
    """Returns a batch of zeros on the default device, to measure a model with.

    Args:
        shape: As model_shape() returns it.
        number: Samples in the batch.
    """
    return {
        "codes": torch.zeros(number, *shape["grid"], dtype=torch.long),
        "facts": torch.zeros(number, len(shape["facts"]), dtype=torch.long),
        "upper": [torch.zeros(number, *grid, dtype=torch.long) for _, grid in shape["upper"]],
    }


def training_flops_per_sample(model: BasePriorConfig, shape: dict) -> int:
    """Counts the floating-point operations of training on one sample, on the meta device.

    Args:
        model: The prior's config.
        shape: As model_shape() returns it.
    """
    with torch.device("meta"):
        net, batch = Objective(make(model, **shape)).eval(), blank_batch(shape, 1)
        return training_flops(lambda: net(batch)["loss"])
