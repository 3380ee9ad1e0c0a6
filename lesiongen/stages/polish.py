"""polish: shards + tokenizer → the same tokenizer with a decoder that makes sharp images with texture.

Encoder and codebooks stay as they are, so codes and priors stay valid. The stage exports the weights whose loss was lowest on
the validation split. The sample and evaluate stages decode with the export.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from hpc.config import to_plain
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.train.engine import Engine
from hpc.train.loop import train
from hpc.train.zero import Weights
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.data.training import TrainingImages
from lesiongen.evaluation import plots
from lesiongen.evaluation.card import card
from lesiongen.evaluation.held_out import evaluate_tokenizer
from lesiongen.experiment import Experiment
from lesiongen.ingest.licences import merge_counts
from lesiongen.stages.base import Stage, digest_of, packed, require, training
from lesiongen.tokenizers.code_noise import CodeNoise
from lesiongen.tokenizers.export import export_digest, load_tokenizer, write_export
from lesiongen.tokenizers.polish import Objective
from lesiongen.tokenizers.polish_loss import PolishLoss


def stage(config: Experiment) -> Stage:
    """Returns the stage that trains the decoder of a trained tokenizer once more."""
    identity = {"polish": to_plain(config.polish, volatile=False), "seed": config.seed}
    how = training("polish.train", config.polish.train)
    return Stage("polish", ("shards", "tokenizer"), identity, run, check=_check, describe=_describe, **how)


def _describe(config: Experiment) -> str:
    """Returns the weights of the loss that the decoder is polished with, as far as they are not 0."""
    weights = {name: value for name, value in to_plain(config.polish.loss).items() if isinstance(value, float) and value}
    return " ".join(f"{name} {value:g}" for name, value in weights.items())


def _check(config: Experiment) -> None:
    """Raises UserError if a network of the loss is not installed."""
    PolishLoss(config.polish.loss, classes=0)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    """Trains the decoder and returns the digest of the export. Collective."""
    task = PolishTask(config, packed(config), folder, topology.device)
    train(task, config.polish.train, folder, topology, config.seed, "polish", ledger=config.data.ledger)
    return export_digest(folder / "export")


class PolishTask:
    """Decoder, data, evaluation and export, for the training loop; see hpc.train.task.Task."""

    metric = "loss"

    def __init__(self, config: Experiment, shards: Packed, folder: Path, device: torch.device):
        """Prepares the task.

        Args:
            config: The run's config.
            shards: The images.
            folder: The stage's directory; the export is written below it.
            device: The device that trains.
        """
        polish = config.polish
        self.config, self.folder, self.name, self.device = config, folder, f"{config.name}: polished tokenizer", device
        # Tokenizer, loss and noise are made here and not in build(): under ZeRO 3, weights that are made there are divided.
        self.tokenizer, self.about = load_tokenizer(require(config, "tokenizer"), device)
        self._refuse_other_images(shards)
        # The export holds what the tokenizer's training had set; recomputing activations is a setting of each training.
        self.tokenizer.config = replace(self.tokenizer.config, checkpoint=config.tokenizer.model.checkpoint)
        with torch.random.fork_rng([]):  # the first weights are the same on every rank
            torch.manual_seed(config.seed)
            self.tokenizer.add_polish(polish.texture, shards.classes)
            self.loss = PolishLoss(polish.loss, len(shards.classes), shards.channels)
        self.tokenizer.to(device)
        self.code_noise = CodeNoise(self.tokenizer, polish.code_noise)
        self.worst = self.loss.worst
        how = polish.augment, polish.stream, polish.train.batch, config.seed
        self.images = TrainingImages(shards, config.data, *how, device)
        self.held_out = ImageShards(shards, "val")
        self.size = len(self.images.split)
        self.shards = shards

    def _refuse_other_images(self, shards: Packed) -> None:
        """Raises UserError if the shards were packed in another way than those that the tokenizer was trained on."""
        mine = {"channels": shards.channels, "size": shards.size, "preprocess": shards.preprocess}
        for name, value in mine.items():
            if value != self.about[name]:
                raise UserError(
                    f"The tokenizer was trained on images of {name} {self.about[name]}, but the shards have {name} {value}. "
                    "Polish it on shards that were packed as its own."
                )

    def build(self) -> nn.Module:
        """Builds the objective around copies of the trained tokenizer and of the loss, whose critic trains too."""
        return Objective(copy.deepcopy(self.tokenizer), copy.deepcopy(self.loss), self.code_noise)

    def prepare(self, module: nn.Module) -> None:
        """Does nothing: the decoder starts from the trained weights, the texture from none."""

    def stream(self, position: int, micro_batch: int) -> Iterator[dict]:
        """Yields this rank's micro-batches of augmented images, without end; see TrainingImages.stream()."""
        return self.images.stream(position, micro_batch)

    def finish(self, batch: dict) -> dict:
        """Augments the images of a batch on the device, if the data workers have left that to it."""
        return self.images.finish(batch)

    def after_step(self, module: nn.Module, statistics: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Returns no metrics: the codebooks are frozen."""
        return {}

    def evaluate(self, engine: Engine) -> tuple[dict[str, float], dict[str, bytes]]:
        """Measures the loss and the tokenizer's metrics on the validation split. Collective."""
        batch = self.config.evaluate.batch
        with engine.whole_module() as module:
            return evaluate_tokenizer(module.tokenizer, self.held_out, batch, module.held_out_loss)

    def curves(self, rows: list[dict]) -> dict[str, bytes]:
        """Draws the learning curves from the metrics log. Returns name → PNG."""
        picture = plots.curves({"polish": rows})
        return {"curves": picture} if picture else {}

    def export(self, weights: Weights, metrics: dict[str, float]) -> None:
        """Writes a whole tokenizer, bound to the one whose codes it decodes, and a model card. Collective.

        Args:
            weights: The weights of decoder, texture and label vectors.
            metrics: The held-out metrics of these weights.
        """
        trained = ("decoder.", "texture.", "label_vectors.")
        frozen = {name: value for name, value in self.tokenizer.state_dict().items() if not name.startswith(trained)}
        made_for = digest_of(self.config, "tokenizer")
        data = merge_counts(self.about["data"], self.shards.about)
        texture = to_plain(self.config.polish.texture)
        polished = {"polished": made_for, "texture": texture, "classes": list(self.shards.classes)}
        facts = self.about | polished | {"held_out": metrics, "data": data}
        about = {"decodes codes of tokenizer": made_for, "image size": f"{facts['size']} px"}
        readme = card("tokenizer", self.name, about, facts["data"], metrics)
        write_export(self.folder / "export", weights, facts, readme, frozen)
