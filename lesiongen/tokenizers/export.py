"""Exports of trained models: write one, identify it by a digest, load a tokenizer from it. Priors use the same format.

An export folder holds model.safetensors (fp32 weights), config.yaml (what is needed to build the model again, and where the
weights come from) and README.md. The training stages write exports; later stages read them.
"""

import hashlib
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save
from torch import nn

from hpc.config import convert, digest, read_yaml
from hpc.run.rundir import atomic_write
from lesiongen.tokenizers import TokenizerModel, make
from lesiongen.tokenizers.tokenizer import Tokenizer


def write_export(folder: Path, net: nn.Module, description: dict, readme: str) -> None:
    """Writes the three files of an export, each atomically.

    Args:
        folder: The export folder.
        net: The trained model. Its whole state dict is written as fp32.
        description: Content of config.yaml. "model" holds the model config; export_digest() reads it.
        readme: Content of README.md, the model card.
    """
    weights = {k: v.detach().float().cpu().contiguous() for k, v in net.state_dict().items()}
    content = save(weights)
    atomic_write(folder / "model.safetensors", content)
    atomic_write(folder / "README.md", readme.encode())
    atomic_write(folder / "config.yaml", yaml.safe_dump(description, sort_keys=False, allow_unicode=True).encode())


def export_digest(folder: Path) -> str:
    """Returns the digest of an export's weights and model config."""
    description = read_yaml(folder / "config.yaml")
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return digest({"weights": weights, "model": description["model"]})


def load_tokenizer(path: Path, device: torch.device) -> tuple[Tokenizer, dict]:
    """Loads an exported tokenizer.

    Args:
        path: Directory of the tokenizer stage, which holds export/.
        device: Device for the weights.

    Returns:
        The tokenizer in evaluation mode, and the content of the export's config.yaml.
    """
    description = read_yaml(path / "export" / "config.yaml")
    net = make(convert(TokenizerModel, description["model"], "model"), description["channels"], batch=1)
    weights = load_file(path / "export" / "model.safetensors")
    net.load_state_dict(weights)
    return net.to(device).eval(), description
