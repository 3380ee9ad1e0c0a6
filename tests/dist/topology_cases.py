"""Trains a leg on each rank: some steps, from scratch or from a checkpoint, that may end with a checkpoint."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import torch

from hpc import dist
from hpc.train import checkpoint
from hpc.train.engine import Engine, EngineConfig, Step, build
from hpc.train.optim import OptimConfig, build_optimizer, learning_rate
from lesiongen import experiment
from lesiongen.data.packed import Packed
from lesiongen.stages.tokenizer import TokenizerTask
from tests.dist.cases import whole_weights

BATCH, TOTAL = 16, 96  # samples
DECAY = 0.6  # of averaged weights per step; far from 1, so that an error shows after a few steps
RATES = {"adamw": 1e-3, "adam": 1e-3, "sgd": 1e-2}


@dataclasses.dataclass
class Leg:
    """Result of some steps of a training. The lists have an item for each step or for each rank."""

    losses: list[float]
    norms: list[float]
    weights: np.ndarray  # as exported
    books: list[str]  # digest of each rank's codebooks
    settings: list[tuple]  # (weight decay, steps taken) as each rank's optimizer has them


class Trainer:
    """A tiny tokenizer and its engine, from scratch or from the newest checkpoint in `load`."""

    def __init__(
        self,
        topology,
        run: str,
        engine: dict,
        name: str = "adamw",
        load: str | None = None,
        model: dict | None = None,
        prepare: bool = False,
    ):
        config = experiment.load(f"{run}/config.yaml")
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0))
        if model:
            own = dataclasses.replace(config.tokenizer, model=dataclasses.replace(config.tokenizer.model, **model))
            config = dataclasses.replace(config, tokenizer=own)
        self.task = TokenizerTask(config, Packed([Path(run) / "shards"]), Path(run) / "unused")
        self.optim = OptimConfig(name=name, lr=RATES[name], weight_decay=0.1, schedule="piecewise", pieces=(1, 1, 0.5))
        settings = EngineConfig(**engine)
        start = checkpoint.newest_sound(Path(load)) if load else None
        universal = start is not None and checkpoint.needs_universal(start, settings, topology.world_size)
        if universal:
            checkpoint.to_universal(start)
        torch.manual_seed(1 if start else 0)  # initial weights differ from the saved ones: loading must restore them
        self.module = build(self.task.build, settings, BATCH)
        if prepare:
            self.task.prepare(self.module)
        self.engine = Engine(self.module, build_optimizer(self.module, self.optim), settings, BATCH, universal)
        self.seen = checkpoint.read_manifest(start)["state"]["samples"] if start else 0
        if start:
            self.engine.load(start, universal)
        self.batches = self.task.stream(self.seen, self.engine.micro_batch)

    def step(self, poison: bool = False) -> Step:
        """Trains for one step. poison: put NaN into the images of this rank."""
        micro = [next(self.batches) for _ in range(self.engine.config.accumulation)]
        for batch in micro:
            batch.pop("key"), batch.pop("bad")
            if poison:
                batch["image"] = torch.full(batch["image"].shape, torch.nan)
        step = self.engine.step(micro, learning_rate(self.optim, self.seen, TOTAL), {"stop": 0}, DECAY)
        if step.accepted:
            self.task.after_step(self.module, step.statistics)
        self.seen += BATCH
        return step


def leg(topology, run: str, engine: dict, steps: int, name: str = "adamw", load: str | None = None, save: str | None = None):
    """Trains for some steps, from the newest checkpoint in `load` if given, and saves a checkpoint to `save` if given."""
    trainer = Trainer(topology, run, engine, name, load)
    metrics = [trainer.step().metrics for _ in range(steps)]
    if save:
        checkpoint.save(Path(save), trainer.seen // BATCH, trainer.engine, {"samples": trainer.seen})
    whole = whole_weights(trainer.engine)
    weights = np.concatenate([whole[name].flatten().numpy() for name, _ in trainer.module.named_parameters()])
    own = b"".join(q.codebook.numpy().tobytes() for q in trainer.module.net.quantizers)
    optimizer = trainer.engine.optimizer
    settings = [g["weight_decay"] for g in optimizer.param_groups], {float(s["step"]) for s in optimizer.state.values()}
    books, settings = dist.gather(hashlib.sha256(own).hexdigest()), dist.gather(settings)
    return Leg([m["loss"] for m in metrics], [float(m["gradient_norm"]) for m in metrics], weights, books, settings)
