"""tokenizer: shards → a trained tokenizer, exported with the weights that were best on held-out images."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from hpc import dist
from hpc.config import plain
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.train.loop import train
from lesiongen.data.images import to_float
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.evaluation import report
from lesiongen.evaluation.card import card
from lesiongen.evaluation.held_out import held_out_figures
from lesiongen.experiment import Experiment
from lesiongen.stages.base import Stage, packed
from lesiongen.tokenizers import make
from lesiongen.tokenizers.export import export_digest, write_export
from lesiongen.tokenizers.objective import Objective
from lesiongen.tokenizers.tokenizer import Tokenizer

KMEANS_IMAGES = 256
PERTURBED_IMAGES = 256  # of each rank, for the figure of wrong codes
COLLAPSED = 0.02  # a level whose perplexity is below this share of its codes


def stage(config: Experiment) -> Stage:
    own = config.tokenizer
    identity = {"tokenizer": plain(own, volatile=False), "seed": config.seed}
    return Stage("tokenizer", ("shards",), identity, run, target=own.train.samples, trains=True)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    own = config.tokenizer
    task = TokenizerTask(config, packed(config), folder)
    train(task, own.train, folder, topology, config.seed, "tokenizer", ledger=config.data.ledger)
    return export_digest(folder / "export")


class TokenizerTask:
    """What the training loop needs to know of a tokenizer."""

    metric = "mse"

    def __init__(self, config: Experiment, shards: Packed, folder: Path):
        self.config, self.folder, self.name = config, folder, f"{config.name}: tokenizer"
        self.data = ImageShards(shards, "train")
        self.held_out = ImageShards(shards, "val")
        self.size = len(self.data)
        try:
            self.grids = config.tokenizer.model.grids(self.data.size)
        except ValueError as error:
            raise UserError(f"tokenizer.model: {error}") from None

    def build(self) -> nn.Module:
        own = self.config.tokenizer
        net = make(own.model, self.data.channels, own.train.batch)
        return Objective(net, own.loss, self.data.packed.moments["data_variance"])

    def prepare(self, module: nn.Module) -> None:
        """Before the first step: codebooks on k-means centres of training images, the same on every rank."""
        if self.config.tokenizer.model.kmeans:
            own = self.config.tokenizer
            number = min(KMEANS_IMAGES, self.size)
            # Every rank reads the same first images of the sequence: nothing needs to be sent.
            images_ = next(self.data.first(number, own.train.batch, own.augment, self.config.seed))["image"]
            module.net.initialise(to_float(images_))

    def stream(self, position: int, micro_batch: int) -> Iterator[dict]:
        own = self.config.tokenizer
        seed, workers = self.config.seed, self.config.data.workers
        batches = self.data.train(position, own.train.batch, micro_batch, own.augment, seed, workers, own.stream)
        return ({k: batch[k] for k in ("image", "slot", "position", "key", "bad")} for batch in batches)

    def after_step(self, module: nn.Module, statistics: torch.Tensor) -> dict[str, float]:
        return module.net.update(statistics)

    def evaluate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, bytes]]:
        check_codebooks(module.net)
        metrics, pictures = held_out_figures(module.net, self.held_out, self.config.evaluate.batch)
        for name in module.net.names:
            if metrics[f"collapsed/{name}"] and dist.rank() == 0:
                print(
                    f"warning: level '{name}' is collapsing: {metrics[f'usage/{name}']:.1%} of {module.net.entries} codes are "
                    f"used on held-out images, perplexity {metrics[f'perplexity/{name}']:.1f}. Samples from it will be alike. "
                    "Try quantizer ema with a higher revive_below, kmeans: true, or fewer entries."
                )
        return metrics, pictures

    def curves(self, rows: list[dict]) -> dict[str, bytes]:
        picture = report.curves({"tokenizer": rows})
        return {"curves": picture} if picture else {}

    def export(self, module: nn.Module, metrics: dict[str, float]) -> None:
        facts = {"model": plain(self.config.tokenizer.model), "channels": self.data.channels, "size": self.data.size}
        facts |= {"preprocess": self.data.packed.preprocess, "data": self.data.packed.about, "held_out": metrics}
        about = {"levels": " + ".join(f"{g}² {n}" for n, g in self.grids.items()), "image size": f"{self.data.size} px"}
        write_export(self.folder / "export", module.net, facts, card("tokenizer", self.name, about, facts["data"], metrics))


def check_codebooks(net: Tokenizer) -> None:
    """Every rank must hold the same codebooks. Collective."""
    own = [float(b.detach().double().sum()) for q in net.quantizers for b in [*q.buffers(), *q.parameters()]]
    if any(theirs != own for theirs in dist.gather(own)):
        raise RuntimeError("codebooks differ between ranks")
