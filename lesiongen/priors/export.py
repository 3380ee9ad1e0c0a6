"""Load an exported prior. The format is that of tokenizers/export.py."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from hpc.config import convert, read_yaml
from hpc.errors import UserError
from lesiongen.priors import PriorModel, make
from lesiongen.priors.prior import Prior


def load_prior(path: Path, device: torch.device) -> tuple[Prior, dict]:
    """The exported prior, in evaluation mode, and what is written beside it."""
    about = read_yaml(path / "export" / "config.yaml")
    shape = about["shape"] | {"grid": tuple(about["shape"]["grid"])}
    shape["upper"] = tuple((entries, tuple(grid)) for entries, grid in shape["upper"])
    net = make(convert(PriorModel, about["model"], "model"), **shape)
    try:
        net.load_state_dict(load_file(path / "export" / "model.safetensors"))
    except RuntimeError as error:
        raise UserError(
            f"{path / 'export'} holds other weights than this version's {about['model']['kind']} has; train it anew. ({error})"
        ) from None
    return net.to(device).eval(), about
