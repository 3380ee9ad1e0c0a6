"""Begins a training with the weights of a model that was trained before, as far as they fit."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from hpc.train import weight_files
from hpc.train.zero import gathered


@dataclass
class Fit:
    """What warm_start() has copied.

    Attributes:
        copied, total: Numbers of weights copied, and of all weights of the model.
        left: Names of the tensors of which nothing was copied, and of those copied in part.
    """

    copied: int = 0
    total: int = 0
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Returns what fits and what does not, such as "98 % of the weights; not: facts.label.weight (in part)"."""
        text = f"{self.copied / max(1, self.total):.0%} of the weights"
        shown = ", ".join(self.left[:5]) + (f" and {len(self.left) - 5} more" if len(self.left) > 5 else "")
        return f"{text}; new are {shown}" if self.left else text


@torch.no_grad()
def warm_start(model: nn.Module, export: Path, rows: dict[str, Sequence[int]] | None = None) -> Fit:
    """Copies from an export each tensor that has the name and shape of one of a model. Collective under ZeRO 3.

    Args:
        model: The model. Tensors that do not fit keep their values.
        export: The folder with the weights.
        rows: For tensors whose rows have other meanings, such as classes: the row of the export for each row of the model; -1
            for a row that the export lacks.

    Returns:
        What was copied.
    """
    fit, rows = Fit(), rows or {}
    with gathered(model.parameters(), changed=True):
        own = model.state_dict()
        fit.total = sum(tensor.numel() for tensor in own.values())
        left = dict.fromkeys(own, "")
        for name, tensor in weight_files.read(export):
            mine = own.get(name)
            if mine is not None and name in rows and mine.shape[1:] == tensor.shape[1:]:
                here = [i for i, row in enumerate(rows[name]) if row >= 0]
                mine[here] = tensor[[rows[name][i] for i in here]].to(mine)
                fit.copied += len(here) * mine[0].numel()
                left[name] = " (in part)"
                if len(here) == len(mine):
                    del left[name]
            elif mine is not None and mine.shape == tensor.shape:
                mine.copy_(tensor)
                fit.copied += mine.numel()
                del left[name]
    fit.left = [name + note for name, note in left.items()]
    return fit
