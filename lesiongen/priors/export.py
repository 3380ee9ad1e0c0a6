"""Loads exported priors. lesiongen/tokenizers/export.py writes them and describes the format."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from hpc.config import convert, read_yaml
from hpc.errors import UserError
from lesiongen.priors import PriorModel, make
from lesiongen.priors.prior import Prior


def load_prior(path: Path, device: torch.device) -> tuple[Prior, dict]:
    """Loads an exported prior.

    Args:
        path: Directory of the prior's stage, which holds export/.
        device: Device for the weights.

    Returns:
        The prior in evaluation mode, and the content of the export's config.yaml.

    Raises:
        UserError: The weights do not fit the model as this version builds it.
    """
    description = read_yaml(path / "export" / "config.yaml")
    shape = description["shape"] | {"grid": tuple(description["shape"]["grid"])}
    shape["upper"] = tuple((entries, tuple(grid)) for entries, grid in shape["upper"])
    net = make(convert(PriorModel, description["model"], "model"), **shape)
    try:
        net.load_state_dict(load_file(path / "export" / "model.safetensors"))
    except RuntimeError as error:
        kind = description["model"]["kind"]
        raise UserError(
            f"The weights in {path / 'export'} do not fit this version's {kind}; train this prior again. ({error})"
        ) from None
    return net.to(device).eval(), description
