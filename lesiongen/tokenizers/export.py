"""Release weights: write an export, name it by a digest, load it again. Priors use the same format."""

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


def write_export(folder: Path, net: nn.Module, facts: dict, readme: str) -> None:
    """Release weights: safetensors, what is needed to build the model again, and a card for people."""
    weights = {k: v.detach().float().cpu().contiguous() for k, v in net.state_dict().items()}
    content = save(weights)
    atomic_write(folder / "model.safetensors", content)
    atomic_write(folder / "README.md", readme.encode())
    atomic_write(folder / "config.yaml", yaml.safe_dump(facts, sort_keys=False, allow_unicode=True).encode())


def export_digest(folder: Path) -> str:
    facts = read_yaml(folder / "config.yaml")
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return digest({"weights": weights, "model": facts["model"]})


def load_tokenizer(path: Path, device: torch.device) -> tuple[Tokenizer, dict]:
    """The exported net, in evaluation mode, and its facts."""
    facts = read_yaml(path / "export" / "config.yaml")
    net = make(convert(TokenizerModel, facts["model"], "model"), facts["channels"], batch=1)
    weights = load_file(path / "export" / "model.safetensors")
    net.load_state_dict(weights)
    return net.to(device).eval(), facts
