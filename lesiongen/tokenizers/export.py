"""Exports of trained models: write one, identify it by a digest, load a tokenizer from it. Priors use the same format.

An export folder holds the fp32 weights (hpc/train/weight_files.py), config.yaml (what is needed to build the model again, and
where the weights come from) and README.md. The training stages write exports; later stages read them.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from hpc import dist
from hpc.config import convert, digest, read_yaml
from hpc.errors import UserError
from hpc.run.rundir import atomic_write, read_stage_record
from hpc.train import weight_files
from hpc.train.zero import Weights
from lesiongen.tokenizers import TokenizerModel, make
from lesiongen.tokenizers.texture import TextureConfig
from lesiongen.tokenizers.tokenizer import Tokenizer


def write_export(
    folder: Path, weights: Weights, description: dict, readme: str, frozen: dict[str, torch.Tensor] | None = None
) -> None:
    """Writes an export. Collective: the weights are gathered one tensor at a time, and rank 0 writes them.

    Args:
        folder: The export folder.
        weights: The weights of an Objective; those of its `net` are written.
        description: Content of config.yaml. "model" holds the model config; export_digest() reads it.
        readme: Content of README.md, the model card.
        frozen: Weights of the export that were not trained, by name.
    """
    frozen = frozen or {}
    shapes = {name.removeprefix("net."): shape for name, shape in weights.shapes().items() if name.startswith("net.")}
    shapes |= {name: tensor.shape for name, tensor in frozen.items()}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        trained = weights.whole(f"net.{name}" for name in sorted(shapes) if name not in frozen)
        for name in sorted(shapes):
            yield name, frozen[name] if name in frozen else next(trained)[1]

    weight_files.write(folder, shapes, tensors())
    dist.run_on_leader(_write_texts, folder, description, readme)


def _write_texts(folder: Path, description: dict, readme: str) -> None:
    atomic_write(folder / "README.md", readme.encode())
    atomic_write(folder / "config.yaml", yaml.safe_dump(description, sort_keys=False, allow_unicode=True).encode())


def export_digest(folder: Path) -> str:
    """Returns the digest of an export's weights, its model config, and the classes of a polished decoder."""
    description = read_yaml(folder / "config.yaml")
    decides = {name: description[name] for name in ("model", "classes") if name in description}
    return digest({"weights": weight_files.sha256(folder), **decides})


def changed_since(path: Path) -> str | None:
    """Returns the digest that a finished stage recorded if its export is another one now; otherwise None.

    Args:
        path: Directory of the stage, which holds export/. An export without a stage's record is not checked.
    """
    record = read_stage_record(path)
    changed = record and record["done"] and export_digest(path / "export") != record["digest"]
    return record["digest"] if changed else None


def refuse_changed(path: Path) -> None:
    """Raises UserError if an export is not the one that its finished stage recorded. Argument as in changed_since()."""
    if recorded := changed_since(path):
        raise UserError(
            f"{path / 'export'} has changed since the stage was done: its digest is not {recorded}. What was made from "
            f"it would not fit it. Restore the files, or train again (--fresh {path.name})."
        )


def load_tokenizer(path: Path, device: torch.device) -> tuple[Tokenizer, dict]:
    """Loads an exported tokenizer.

    Args:
        path: Directory of the tokenizer or polish stage, which holds export/.
        device: Device for the weights.

    Returns:
        The tokenizer in evaluation mode, and the content of the export's config.yaml.

    Raises:
        UserError: The export has changed since its stage was done, or its weights are of another architecture.
    """
    refuse_changed(path)
    description = read_yaml(path / "export" / "config.yaml")
    net = make(convert(TokenizerModel, description["model"], "model"), description["channels"], batch=1)
    if texture := description.get("texture"):
        net.add_polish(convert(TextureConfig, texture, "texture"), description.get("classes", []))
    try:
        net.load_state_dict(dict(weight_files.read(path / "export")))
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(
            f"The weights in {path / 'export'} do not fit this version of lesiongen. Run the stage again in {path.parent}: "
            f"--fresh {path.name}. ({reason:.100} …)"
        ) from None
    return net.to(device).eval(), description
