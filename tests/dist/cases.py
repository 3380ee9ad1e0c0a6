"""What each rank does in test_training.py and test_average.py. Every function runs on every rank of a pool."""

import dataclasses
from pathlib import Path

import torch

from hpc import dist
from hpc.errors import UserError
from hpc.run.rundir import StageDir
from hpc.train import checkpoint
from hpc.train.engine import Engine, EngineConfig, build
from hpc.train.optim import OptimConfig, build_optimizer
from lesiongen import experiment
from lesiongen.data.packed import Packed
from lesiongen.stages import base, stages
from lesiongen.stages.tokenizer import TokenizerTask


def tokenizer_engine(topology, run: str, zero: int, accumulation: int, precision: str = "fp32"):
    """Returns (task, engine, module) for a tiny tokenizer on packed phantoms."""
    torch.manual_seed(0)
    config = experiment.load(f"{run}/config.yaml")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0))
    task = TokenizerTask(config, Packed([Path(run) / "shards"]), Path(run) / "unused")
    settings = EngineConfig(zero=zero, accumulation=accumulation, precision=precision)
    module = build(task.build, settings, 16)
    engine = Engine(module, build_optimizer(module, OptimConfig(lr=1e-3)), settings, batch=16)
    return task, engine, module


def train_steps(task, engine, module, position: int, steps: int, poison: tuple[int, int] | None = None) -> list[float]:
    """Trains for some steps and returns the losses. poison=(step, rank) puts NaN into the images of that rank at that step."""
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


def fingerprints(engine) -> tuple[float, float, list[float]]:
    """Returns (sum of absolute weights, sum of the exported codebooks, each rank's sum of its codebooks)."""
    whole = whole_weights(engine)
    books = float(sum(value.double().sum() for name, value in whole.items() if name.endswith(".codebook")))
    own = float(sum(q.codebook.double().sum() for q in engine.module.net.quantizers))
    parameters = [name for name, _ in engine.module.named_parameters()]
    return float(sum(whole[name].double().abs().sum() for name in parameters)), books, dist.gather(own)


def whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Returns the weights and buffers that an export would hold now, by name. Collective."""
    with engine.evaluating():
        return {name: value.detach().clone() for name, value in engine.weights.whole(engine.weights.shapes())}


def curve(topology, run: str, zero: int, accumulation: int, precision: str = "fp32"):
    task, engine, module = tokenizer_engine(topology, run, zero, accumulation, precision)
    losses = train_steps(task, engine, module, 0, 6)
    return losses, *fingerprints(engine)


def skipped_step(topology, run: str, zero: int):
    """Puts NaN into the images of the last rank. No rank may change its weights at that step, and training must continue."""
    task, engine, module = tokenizer_engine(topology, run, zero, 1)
    train_steps(task, engine, module, 0, 2)
    before = fingerprints(engine)
    train_steps(task, engine, module, 32, 1, poison=(0, topology.world_size - 1))
    after = fingerprints(engine)
    losses = train_steps(task, engine, module, 48, 2)
    return before, after, losses


def save_and_resume(topology, run: str, zero: int, folder: str):
    """Returns the losses of steps 4 to 6, once without interruption and once from a checkpoint that was saved after step 3."""
    task, engine, module = tokenizer_engine(topology, run, zero, 1)
    train_steps(task, engine, module, 0, 3)
    checkpoint.save(Path(folder), 3, engine, {"samples": 48})
    uninterrupted = train_steps(task, engine, module, 48, 3)
    return uninterrupted, resume(topology, run, zero, 1, folder)


def resume(topology, run: str, zero: int, accumulation: int, folder: str):
    path = checkpoint.newest_sound(Path(folder))
    settings = EngineConfig(zero=zero, accumulation=accumulation)
    universal = checkpoint.needs_universal(path, settings, topology.world_size)
    if universal:
        checkpoint.to_universal(path)
    config = experiment.load(f"{run}/config.yaml")
    task = TokenizerTask(config, Packed([Path(run) / "shards"]), Path(run) / "unused")
    torch.manual_seed(1)  # initial weights differ from the saved ones, so a load that does nothing fails the test
    module = build(task.build, settings, 16)
    engine = Engine(module, build_optimizer(module, OptimConfig(lr=1e-3)), settings, 16, universal)
    engine.load(path, universal)
    return train_steps(task, engine, module, 48, 3)


def damaged(topology, run: str, folder: str):
    """Saves two checkpoints and damages the newer one. Returns the checkpoint from which this rank would resume."""
    task, engine, module = tokenizer_engine(topology, run, 2, 1)
    for step in (1, 2):
        train_steps(task, engine, module, 16 * (step - 1), 1)
        checkpoint.save(Path(folder), step, engine, {"samples": 16 * step})
    if topology.leader:
        damaged_file = next(iter(sorted((Path(folder) / "step-000002").rglob("*optim*"))))
        content = bytearray(damaged_file.read_bytes())
        content[len(content) // 2] ^= 1
        damaged_file.write_bytes(content)
    dist.barrier()
    return checkpoint.newest_sound(Path(folder)).name


def run_stages(topology, overrides: list[str], config_path: str, names: list[str]):
    """Runs whole stages as the ranks of an executor do. Returns the digest of each stage."""
    config = experiment.load(config_path, overrides)
    for name in names:
        base.execute(config, stages(config)[name], topology)
    return {name: base.digest_of(config, name) for name in names}


def refused(topology, folder: str):
    """Returns the UserError that rank 0 raises and every other rank must raise too; otherwise the other ranks would hang."""
    stage_dir = StageDir(Path(folder), {"a": 2}, {})
    if topology.leader:
        StageDir(Path(folder), {"a": 1}, {}).begin()
        (Path(folder) / "part-of-a-result").touch()
    try:
        dist.run_on_leader(stage_dir.check)
    except UserError as error:
        return str(error)
