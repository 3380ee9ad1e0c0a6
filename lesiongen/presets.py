"""Presets: settings that fit a number of photographs, for all that a config leaves open (`preset: auto`, or --preset auto).

A preset is one of the configs in configs/, with the lengths of its trainings changed to epochs that suit the number of
training images. lesiongen/experiment.py merges a preset with the user's config before the config is checked.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

from hpc.config import expand_path, is_other_kind, read_yaml
from hpc.errors import UserError
from hpc.train import hardware
from lesiongen.ingest.folders import count_images
from lesiongen.ingest.sources import read_csv

CONFIGS = Path(__file__).parents[1] / "configs"
SECTIONS = ("tokenizer", "encode", "polish", "priors", "sample")  # sections of the config that a preset fills in
LENGTHS = ("samples", "patience", "log_every", "eval_every", "save_every")  # settings of a training in samples


@dataclass(frozen=True)
class Preset:
    """Where a preset comes from, and how long its trainings are.

    Attributes:
        config: Config in configs/.
        images: Largest number of training images that `auto` chooses this preset for on a GPU.
        tokenizer_epochs: Length of tokenizer training.
        polish_epochs: Length of the decoder's second training.
        prior_epochs: Length of prior training. Each epoch shows other views of the images.
        capped: Whether no training is longer than in the config, so that more photographs do not take more hours.
    """

    config: str
    images: float
    tokenizer_epochs: int
    polish_epochs: int
    prior_epochs: int
    capped: bool = False


PRESETS = {
    "cpu": Preset("ham10000-cpu.yaml", 0, tokenizer_epochs=100, polish_epochs=100, prior_epochs=200, capped=True),
    "small": Preset("gpu/one-128.yaml", 15_000, tokenizer_epochs=100, polish_epochs=40, prior_epochs=200),
    "base": Preset("gpu/one-256.yaml", 150_000, tokenizer_epochs=40, polish_epochs=10, prior_epochs=60),
    "large": Preset("gpu/node-256.yaml", math.inf, tokenizer_epochs=20, polish_epochs=5, prior_epochs=20),
}


def fill_in(data: dict, on_gpu: bool | None = None) -> dict:
    """Returns a config with the settings of its preset where the config says nothing. Without `preset` it is unchanged.

    Args:
        data: Plain data of a config. `preset` is the name of one, or auto: on GPUs the one that suits the number of images,
            otherwise cpu.
        on_gpu: Whether the run will have GPUs; None if the config decides (local.device, hardware.gpus), else this machine.

    Raises:
        UserError: There is no such preset, or the images cannot be counted.
    """
    data = dict(data)
    name = data.pop("preset", None)
    if name is None:
        return data
    if name not in (*PRESETS, "auto"):
        raise UserError(f"preset: '{name}' is not a preset; choose among {', '.join(PRESETS)} and auto.")
    own = data.get("data") or {}
    number = round(_photographs(own) * (1 - own.get("val", 0.1) - own.get("test", 0.1)))
    if number < 1:
        raise UserError(
            f"preset: there are no images in data.images={own.get('images')}, so a preset cannot set lengths. Once a run has "
            "begun, give its directory in place of the config."
        )
    if name == "auto":
        if on_gpu is None:
            on_cpu = (data.get("local") or {}).get("device") == "cpu"
            on_gpu = not on_cpu and (bool((data.get("hardware") or {}).get("gpus")) or hardware.has_gpu())
        name = next(name for name, preset in PRESETS.items() if number <= preset.images) if on_gpu else "cpu"
    return _merge(settings(name, number, data), data)


def _photographs(data: dict) -> int:
    """Returns how many photographs the section `data` names: the image files, or the rows of its table if they are fewer."""
    images, metadata = (expand_path(str(data.get(key) or ""), f"data.{key}") for key in ("images", "metadata"))
    files, table = count_images(images), Path(metadata)
    return min(files, len(read_csv(table)[0])) if table.is_file() else files


def settings(name: str, images: int, own: dict | None = None) -> dict:
    """Returns the settings of a preset, as plain data of a config.

    Args:
        name: The preset.
        images: Number of training images.
        own: The user's config. Where it sets the samples of a training, warm-up and intervals are in proportion to them.
    """
    preset = PRESETS[name]
    content = copy.deepcopy(read_yaml(CONFIGS / preset.config))
    filled = {section: content[section] for section in SECTIONS}
    filled["data"] = {"size": content["data"]["size"]}
    own = own or {}
    own_priors = own.get("priors") or {}
    trainings = [(filled[name], own.get(name), getattr(preset, f"{name}_epochs")) for name in ("tokenizer", "polish")]
    trainings += [(prior, own_priors.get(level), preset.prior_epochs) for level, prior in filled["priors"].items()]
    for section, mine, epochs in trainings:
        asked = ((mine or {}).get("train") or {}).get("samples")
        longest = section["train"]["samples"] if preset.capped else math.inf
        section["train"] = _scale(section["train"], asked or min(longest, epochs * images))
        if name == "cpu" and not hardware.cpu_has_bf16():
            section["train"]["engine"]["precision"] = "fp32"
    return filled


def _scale(train: dict, samples: int) -> dict:
    """Returns the settings of a training with its length changed; intervals, warm-up and averaging are in proportion."""
    factor, batch = samples / train["samples"], train["batch"]

    def scaled(section: dict, *keys: str) -> dict:
        return section | {key: batch * max(1, round(section[key] * factor / batch)) for key in keys if key in section}

    changed = scaled(train, *LENGTHS)
    return changed | {"optim": scaled(train["optim"], "warmup"), "engine": scaled(train["engine"], "average")}


def _merge(base: dict, own: dict) -> dict:
    """Returns `base` with the values of `own` in place of its own, section by section. Another `kind` replaces its section."""
    merged = {} if is_other_kind(base, own) else dict(base)
    for key, value in own.items():
        merged[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged
