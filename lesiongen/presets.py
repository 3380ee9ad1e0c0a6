"""Presets: settings that fit a number of photographs, for all that a config leaves open (`preset: auto`, or --preset auto).

A preset is one of the configs in configs/gpu, with the lengths of its trainings changed to epochs that suit the number of
training images. lesiongen/experiment.py merges a preset with the user's config before the config is checked.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

from hpc.config import expand_path, read_yaml
from hpc.errors import UserError
from lesiongen.ingest.folders import count_images
from lesiongen.ingest.sources import read_csv

CONFIGS = Path(__file__).parents[1] / "configs" / "gpu"
SECTIONS = ("tokenizer", "encode", "polish", "priors", "sample")  # sections of the config that a preset fills in
LENGTHS = ("samples", "patience", "log_every", "eval_every", "save_every")  # settings of a training that are scaled


@dataclass(frozen=True)
class Preset:
    """Where a preset comes from, and how long its trainings are.

    Attributes:
        config: Config in configs/gpu.
        images: Largest number of training images that `auto` chooses this preset for.
        tokenizer_epochs: Length of tokenizer training.
        polish_epochs: Length of the decoder's second training.
        prior_epochs: Length of prior training. Each epoch shows other views of the images.
    """

    config: str
    images: float
    tokenizer_epochs: int
    polish_epochs: int
    prior_epochs: int


PRESETS = {
    "small": Preset("one-128.yaml", 15_000, tokenizer_epochs=100, polish_epochs=40, prior_epochs=200),
    "base": Preset("one-256.yaml", 150_000, tokenizer_epochs=40, polish_epochs=10, prior_epochs=60),
    "large": Preset("node-256.yaml", float("inf"), tokenizer_epochs=20, polish_epochs=5, prior_epochs=20),
}


def fill_in(data: dict) -> dict:
    """Returns a config with the settings of its preset where the config says nothing. Without `preset` it is unchanged.

    Args:
        data: Plain data of a config. `preset` is small, base, large, or auto for the one that suits the number of images.

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
        raise UserError(f"preset: there are no images in data.images={own.get('images')}, so a preset cannot set lengths.")
    if name == "auto":
        name = next(name for name, preset in PRESETS.items() if number <= preset.images)
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
        section["train"] = _scale(section["train"], asked or epochs * images)
    if name == "small":  # also for machines without a GPU, which compute slowly in bf16; fp32 takes twice the memory
        for section, *_ in trainings:
            section["train"]["engine"] = {"accumulation": 2}
    return filled


def _scale(train: dict, samples: int) -> dict:
    """Returns the settings of a training with its length changed, and its intervals and warm-up in proportion."""
    factor, batch = samples / train["samples"], train["batch"]

    def scaled(value: int) -> int:
        return batch * max(1, round(value * factor / batch))

    optim = train["optim"] | {"warmup": scaled(train["optim"]["warmup"])}
    return (
        train | {key: scaled(train[key]) for key in LENGTHS if key in train} | {"optim": optim, "engine": dict(train["engine"])}
    )


def _merge(base: dict, own: dict) -> dict:
    """Returns `base` with the values of `own` in place of its own, section by section."""
    merged = dict(base)
    for key, value in own.items():
        merged[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged
