"""Loads exported priors. lesiongen/tokenizers/export.py writes them and describes the format."""

from pathlib import Path

import torch

from hpc.config import convert, read_yaml
from hpc.errors import UserError
from hpc.train import weight_files
from hpc.train.layer_streaming import stream_layers
from lesiongen.priors import PriorModel, make
from lesiongen.priors.prior import Prior
from lesiongen.tokenizers.export import refuse_changed

# Share of a GPU's free memory that a prior's weights may take. The rest is for the caches of sampling and the other models.
WEIGHTS_SHARE = 0.5


def load_prior(path: Path, device: torch.device) -> tuple[Prior, dict]:
    """Loads an exported prior. A prior that is too large for the device is copied to it layer by layer while it runs.

    Args:
        path: Directory of the prior's stage, which holds export/.
        device: The device that computes.

    Returns:
        The prior in evaluation mode, and the content of the export's config.yaml.

    Raises:
        UserError: The weights do not fit the model as this version builds it, or have changed since the stage was done.
    """
    refuse_changed(path)
    description = read_yaml(path / "export" / "config.yaml")
    shape = description["shape"] | {"grid": tuple(description["shape"]["grid"])}
    shape["upper"] = tuple((entries, tuple(grid)) for entries, grid in shape["upper"])
    model = convert(PriorModel, description["model"], "model")
    try:
        net = weight_files.load_into(lambda: make(model, **shape), path / "export").eval()
    except RuntimeError as error:
        kind = description["model"]["kind"]
        raise UserError(
            f"The weights in {path / 'export'} do not fit this version's {kind}; train this prior again. ({error})"
        ) from None
    if device.type == "cuda":
        resident_bytes = int(WEIGHTS_SHARE * torch.cuda.mem_get_info(device)[0])
        if weight_files.total_bytes(path / "export") > resident_bytes:
            return stream_layers(net, device, resident_bytes), description
    return net.to(device), description
