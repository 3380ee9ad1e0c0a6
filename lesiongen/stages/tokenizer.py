"""tokenizer: shards → a trained tokenizer.

The stage exports the weights that were best on the validation split. The stages encode, polish, sample and evaluate read the
export.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from hpc import dist
from hpc.config import read_yaml, to_plain
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run.metrics_log import MetricsLog
from hpc.train.engine import Engine
from hpc.train.loop import train
from hpc.train.warm_start import warm_start
from hpc.train.zero import Weights, gathered
from lesiongen.data.images import to_float
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.data.training import TrainingImages
from lesiongen.evaluation import plots
from lesiongen.evaluation.card import card
from lesiongen.evaluation.held_out import evaluate_tokenizer
from lesiongen.experiment import Experiment
from lesiongen.ingest.licences import merge_counts
from lesiongen.stages.base import Stage, beginning, initial_export, packed, size_of, training
from lesiongen.tokenizers import make
from lesiongen.tokenizers.export import export_digest, write_export
from lesiongen.tokenizers.losses import ReconstructionLoss
from lesiongen.tokenizers.objective import Objective
from lesiongen.tokenizers.tokenizer import Tokenizer

KMEANS_IMAGES = 256  # training images whose vectors are clustered to initialise the codebooks


def stage(config: Experiment) -> Stage:
    """Returns the stage that trains the tokenizer."""
    identity = {"tokenizer": to_plain(config.tokenizer, volatile=False), "seed": config.seed} | beginning(config)
    how = training("tokenizer.train", config.tokenizer.train)
    return Stage("tokenizer", ("shards",), identity, run, check=_check, describe=_describe, **how)


def _describe(config: Experiment) -> str:
    """Returns kind, grids, codes and size of the tokenizer, such as "vqvae2 16²+32² of 512 · 1.8 M"."""
    model, shards = config.tokenizer.model, packed(config)
    grids = "+".join(f"{side}²" for side in sorted(model.grids(shards.size).values()))
    size = size_of(lambda: make(model, shards.channels, config.tokenizer.train.batch))
    return f"{model.kind} {grids} of {model.entries:,} · {size}"


def _check(config: Experiment) -> None:
    """Raises UserError if a network of the loss, or the weights to begin with, cannot be loaded."""
    initial_export(config, "tokenizer")
    ReconstructionLoss(config.tokenizer.loss, 1.0)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    """Trains the tokenizer and returns the digest of the export. Collective."""
    task = TokenizerTask(config, packed(config), folder, topology.device)
    train(task, config.tokenizer.train, folder, topology, config.seed, "tokenizer", ledger=config.data.ledger)
    return export_digest(folder / "export")


class TokenizerTask:
    """Model, data, evaluation and export of a tokenizer, for the training loop; see hpc.train.task.Task."""

    metric, shown = "mse", "psnr"
    worst = 4.0  # the squared error of white pixels for black ones, which are 1 and -1

    def __init__(self, config: Experiment, shards: Packed, folder: Path, device: torch.device | None = None):
        """Prepares the task. Raises UserError if the images do not fit the model's strides.

        Args:
            config: The run's config.
            shards: The images.
            folder: The stage's directory; the export is written below it.
            device: The device that trains; the CPU by default.
        """
        tokenizer = config.tokenizer
        self.config, self.folder, self.name = config, folder, f"{config.name}: tokenizer"
        how = tokenizer.augment, tokenizer.stream, tokenizer.train.batch, config.seed
        self.images = TrainingImages(shards, config.data, *how, device or torch.device("cpu"))
        self.data, self.held_out = self.images.split, ImageShards(shards, "val")
        self.size = len(self.data)
        self.loss = ReconstructionLoss(tokenizer.loss, shards.moments["data_variance"])
        try:
            self.grids = config.tokenizer.model.grids(self.data.size)
        except ValueError as error:
            raise UserError(f"tokenizer.model: {error}") from None

    def build(self) -> nn.Module:
        """Builds the tokenizer and its loss, with random weights."""
        config = self.config.tokenizer
        net = make(config.model, self.data.channels, config.train.batch)
        return Objective(net, self.loss)

    def prepare(self, module: nn.Module) -> None:
        """Copies the weights of inputs.init_from. Without, initialises the codebooks by k-means, if the config asks for it."""
        config = self.config.tokenizer
        if export := initial_export(self.config, "tokenizer"):
            fit = warm_start(module.net, export)
            dist.run_on_leader(print, f"tokenizer begins with {export.parent}: {fit}")
        elif config.model.kmeans:
            # Every rank reads the same first images, so that all ranks get the same codebooks without communication.
            images = self.images.first(min(KMEANS_IMAGES, self.size))
            with gathered(module.parameters(), changed=True):
                module.net.initialise(to_float(images))

    def stream(self, position: int, micro_batch: int) -> Iterator[dict]:
        """Yields this rank's micro-batches of augmented images, without end; see TrainingImages.stream()."""
        return self.images.stream(position, micro_batch)

    def finish(self, batch: dict) -> dict:
        """Augments the images of a batch on the device, if the data workers have left that to it."""
        return self.images.finish(batch)

    def after_step(self, module: nn.Module, statistics: torch.Tensor) -> dict[str, torch.Tensor]:
        """Updates the codebooks from the statistics of the global batch. Returns the metrics of each level's codebook."""
        return module.net.update(statistics)

    def evaluate(self, engine: Engine) -> tuple[dict[str, float], dict[str, bytes]]:
        """Measures the tokenizer on the validation split; rank 0 warns of collapsing levels. Collective.

        Tokenizers have some million parameters, so ZeRO 3 gathers all of them for the evaluation.
        """
        with engine.whole_module() as module:
            net = module.net
            check_codebooks(net)
            metrics, pictures = evaluate_tokenizer(net, self.held_out, self.config.evaluate.batch)
        for name in net.names:
            if metrics[f"collapsed/{name}"]:
                MetricsLog(self.folder, dist.rank() == 0).alarm(
                    "collapse",
                    f"level '{name}' is collapsing. Held-out images use {metrics[f'usage/{name}']:.1%} of its "
                    f"{net.entries} codes, with a perplexity of {metrics[f'perplexity/{name}']:.1f}. Samples from this "
                    "level will look alike. Try quantizer ema with a higher revive_below, kmeans: true, or fewer entries.",
                )
        return metrics, pictures

    def curves(self, rows: list[dict]) -> dict[str, bytes]:
        """Draws the learning curves from the metrics log. Returns name → PNG."""
        picture = plots.curves({"tokenizer": rows})
        return {"curves": picture} if picture else {}

    def export(self, weights: Weights, metrics: dict[str, float]) -> None:
        """Writes the weights, what is needed to build the model again, and a model card. Collective.

        Args:
            weights: The weights.
            metrics: The held-out metrics of these weights.
        """
        facts = {"model": to_plain(self.config.tokenizer.model), "channels": self.data.channels, "size": self.data.size}
        data = self.data.packed.about
        if export := initial_export(self.config, "tokenizer"):
            data = merge_counts(data, read_yaml(export / "config.yaml")["data"])
        facts |= {"preprocess": self.data.packed.preprocess, "data": data, "held_out": metrics}
        about = {"levels": " + ".join(f"{g}² {n}" for n, g in self.grids.items()), "image size": f"{self.data.size} px"}
        write_export(self.folder / "export", weights, facts, card("tokenizer", self.name, about, facts["data"], metrics))


def check_codebooks(net: Tokenizer) -> None:
    """Raises RuntimeError if the codebooks of any two ranks differ. Collective."""
    sums = [float(b.detach().double().sum()) for q in net.quantizers for b in [*q.buffers(), *q.parameters()]]
    if any(other != sums for other in dist.gather(sums)):
        raise RuntimeError("The codebooks differ between ranks, so the ranks no longer train the same tokenizer.")
