"""What the ranks of the distributed tests do. Each function runs on every rank of a pool."""

import dataclasses
from pathlib import Path

import torch

from hpc import dist
from hpc.train import checkpoint
from hpc.train.engine import Engine, EngineConfig
from hpc.errors import UserError
from hpc.train.optim import OptimConfig, build_optimizer
from hpc.run.rundir import StageDir
from lesiongen import experiment
from lesiongen.stages import base, stages
from lesiongen.data.packed import Packed
from lesiongen.stages.tokenizer import TokenizerTask


def tokenizer_engine(topology, run: str, zero: int, accumulation: int, precision: str = "fp32"):
    """(task, engine, module) of a tiny tokenizer on packed phantoms."""
    torch.manual_seed(0)
    config = experiment.load(f"{run}/config.yaml")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0))
    task = TokenizerTask(config, Packed([Path(run) / "shards"]), Path(run) / "unused")
    module = task.build()
    settings = EngineConfig(zero=zero, accumulation=accumulation, precision=precision)
    engine = Engine(module, build_optimizer(module, OptimConfig(lr=1e-3)), settings, batch=16)
    return task, engine, module


def advance(task, engine, module, position: int, steps: int, poison: tuple[int, int] | None = None) -> list[float]:
    """Trains some steps; poison=(step, rank) puts a NaN into one rank's images. Returns the losses."""
    batches = task.stream(position, engine.micro_batch)
    losses = []
    for number in range(steps):
        micro = [next(batches) for _ in range(engine.config.accumulation)]
        for batch in micro:
            batch.pop("key"), batch.pop("bad")
            if poison == (number, dist.rank()):
                batch["image"] = torch.full(batch["image"].shape, torch.nan)
        step = engine.step(micro, 1e-3, {"stop": 0})
        if step.accepted:
            task.after_step(module, step.statistics)
        losses.append(step.metrics["loss"])
    return losses


def fingerprints(engine, task) -> tuple[float, float, list[float]]:
    """(sum of weights, sum of codebooks, sum of each rank's codebooks)."""
    plain = task.build()
    engine.copy_to(plain)
    books = float(sum(q.codebook.double().sum() for q in plain.net.quantizers))
    own = float(sum(q.codebook.double().sum() for q in engine.module.net.quantizers))
    return float(sum(p.double().abs().sum() for p in plain.parameters())), books, dist.gather(own)


def curve(topology, run: str, zero: int, accumulation: int, precision: str = "fp32"):
    task, engine, module = tokenizer_engine(topology, run, zero, accumulation, precision)
    losses = advance(task, engine, module, 0, 6)
    return losses, *fingerprints(engine, task)


def skipped_step(topology, run: str, zero: int):
    """A NaN on the last rank only: nothing may change on any rank, and training goes on."""
    task, engine, module = tokenizer_engine(topology, run, zero, 1)
    advance(task, engine, module, 0, 2)
    before = fingerprints(engine, task)
    advance(task, engine, module, 32, 1, poison=(0, topology.world_size - 1))
    after = fingerprints(engine, task)
    losses = advance(task, engine, module, 48, 2)
    return before, after, losses


def save_and_resume(topology, run: str, zero: int, folder: str):
    """Losses of steps 4 to 6, once straight on and once from a checkpoint written after step 3."""
    task, engine, module = tokenizer_engine(topology, run, zero, 1)
    advance(task, engine, module, 0, 3)
    checkpoint.save(Path(folder), 3, engine, {"samples": 48})
    straight = advance(task, engine, module, 48, 3)
    return straight, resume(topology, run, zero, 1, folder)


def resume(topology, run: str, zero: int, accumulation: int, folder: str):
    path = checkpoint.newest_sound(Path(folder))
    settings = EngineConfig(zero=zero, accumulation=accumulation)
    universal = checkpoint.needs_universal(path, settings, topology.world_size)
    if universal:
        checkpoint.to_universal(path)
    config = experiment.load(f"{run}/config.yaml")
    task = TokenizerTask(config, Packed([Path(run) / "shards"]), Path(run) / "unused")
    torch.manual_seed(1)  # other weights than the saved ones, so that loading is what makes them equal
    module = task.build()
    engine = Engine(module, build_optimizer(module, OptimConfig(lr=1e-3)), settings, 16, universal)
    engine.load(path, universal)
    return advance(task, engine, module, 48, 3)


def damaged(topology, run: str, folder: str):
    """Two checkpoints, the newer one with a flipped byte: all ranks agree on the older."""
    task, engine, module = tokenizer_engine(topology, run, 2, 1)
    for step in (1, 2):
        advance(task, engine, module, 16 * (step - 1), 1)
        checkpoint.save(Path(folder), step, engine, {"samples": 16 * step})
    if topology.leader:
        victim = next(iter(sorted((Path(folder) / "step-000002").rglob("*optim*"))))
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    dist.barrier()
    return checkpoint.newest_sound(Path(folder)).name


def run_stages(topology, overrides: list[str], config_path: str, names: list[str]):
    """Whole stages, as an executor's ranks would run them."""
    config = experiment.load(config_path, overrides)
    for name in names:
        base.execute(config, stages(config)[name], topology)
    return {name: base.digest_of(config, name) for name in names}


def refused(topology, folder: str):
    """The leader's UserError reaches every rank in place of a hang."""
    place = StageDir(Path(folder), {"a": 2}, {})
    if topology.leader:
        StageDir(Path(folder), {"a": 1}, {}).begin()
    try:
        dist.run_on_leader(place.check)
    except UserError as error:
        return str(error)
