"""The one training loop, for tokenizers and priors alike. Its whole position is one integer: samples seen."""

import contextlib
import itertools
import math
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from hpc import dist
from hpc.config import volatile
from hpc.data.order import sample_seed
from hpc.errors import Diverged, Stopped, UserError
from hpc.run import journal, metrics_log
from hpc.run.progress import bar
from hpc.train import checkpoint, flops, health
from hpc.train.engine import Engine, EngineConfig, Step
from hpc.train.health import HealthConfig
from hpc.train.optim import OptimConfig, average_decay, learning_rate, optimizer
from hpc.train.preempt import Preemption


@dataclass(frozen=True)
class TrainConfig:
    """Lengths and intervals are in samples."""

    samples: int = volatile(1_000_000)
    batch: int = 32  # global
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    log_every: int = volatile(1_000)
    eval_every: int = volatile(50_000)
    patience: int = volatile(0)  # samples without a better held-out figure after which training ends, well; 0 = never
    save_every: int = volatile(50_000)
    keep: int = volatile(2)
    max_bad_fraction: float = volatile(0.001)

    def __post_init__(self):
        if min(self.samples, self.batch, self.log_every, self.eval_every, self.save_every) < 1:
            raise ValueError("samples, batch, log_every, eval_every and save_every must be at least 1")
        if self.patience < 0:
            raise ValueError("patience is a number of samples, or 0 for never")
        if self.keep < 2:
            raise ValueError("keep must be at least 2: a damaged checkpoint needs one to fall back to")


class Task(Protocol):
    """What is trained. `metric` is the held-out figure that selects the exported weights; lower is better. What a task knows
    of its samples' cost, tokens_per_sample and flops_per_sample, is logged as speed; see hpc/train/flops.py."""

    metric: str
    size: int  # samples in an epoch

    def build(self) -> nn.Module: ...
    def prepare(self, module: nn.Module) -> None: ...  # once, before the engine holds it; the same on every rank
    def stream(self, position: int, micro_batch: int) -> Iterator[dict]: ...
    def after_step(self, module: nn.Module, statistics: torch.Tensor | None) -> dict[str, float]: ...
    def evaluate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, bytes]]: ...
    def curves(self, rows: list[dict]) -> dict[str, bytes]: ...  # pictures of metrics.jsonl so far; on rank 0
    def export(self, module: nn.Module, metrics: dict[str, float]) -> None: ...


@dataclass
class State:
    """Everything a resumed run needs beside the engine's own state; plain numbers, exact in JSON."""

    samples: int = 0
    evaluated: int = 0  # samples at the last evaluation
    best: float | None = None
    best_at: int = 0
    patient_from: int = 0  # patience counts from here, or from the best
    ended_for: int = 0  # length that was asked for when patience ran out
    skipped: int = 0  # non-finite steps in a row
    skipped_total: int = 0
    bad: int = 0  # samples replaced because they could not be read
    sums: dict[str, float] = field(default_factory=dict)  # since the last log line
    count: int = 0


def train(
    task: Task, config: TrainConfig, folder: Path, topology: dist.Topology, seed: int, what: str, ledger: bool = False
) -> None:
    """Trains until config.samples, from the newest sound checkpoint. Raises Stopped when asked to stop early, after
    saving; Diverged after too many non-finite steps. ledger: each rank logs the samples delivered to it. Collective."""
    torch.manual_seed(seed)
    start = checkpoint.choose(folder / "checkpoints")
    universal = start is not None and checkpoint.needs_universal(start, config.engine, topology.world)
    if universal:
        checkpoint.to_universal(start)
    state = State(**checkpoint.read(start)["state"]) if start else State()
    if 0 < state.ended_for < config.samples:  # more was asked for than when patience ran out: it begins anew
        state.patient_from, state.ended_for = state.samples, 0
    # First, so that data workers start while the engine is built.
    batches = task.stream(state.samples, config.engine.micro_batch(config.batch, topology.world))
    module, plain = task.build(), task.build().eval()
    if not start:
        task.prepare(module)
    engine = Engine(module, optimizer(module, config.optim), config.engine, config.batch, universal)
    if start:
        engine.load(start, universal)
    tracker = metrics_log.MetricsLog(folder, enabled=topology.leader)
    tracker.resume(state.samples)
    ledger_path = folder / f"ledger-{topology.rank}.jsonl" if ledger else None
    if ledger_path:
        journal.cut_back(ledger_path, state.samples)
    watchdog = health.Watchdog(folder, topology.rank, config.health.hang_minutes * 60)
    progress = bar(config.samples, what, initial=state.samples, shown=topology.leader)

    def due(every: int, last: int) -> bool:
        """Whether a multiple of `every` samples, or the end, has come since `last`."""
        return state.samples // every > last // every or state.samples >= config.samples > last

    def evaluate() -> None:
        with watchdog.allow_longer(), speed.paused():
            engine.copy_to(plain.to(engine.device))
            metrics, pictures = task.evaluate(plain)
            tracker.log(state.samples // config.batch, state.samples, {f"val/{k}": v for k, v in metrics.items()})
            if topology.leader:
                pictures = pictures | task.curves(metrics_log.read_metrics(folder))
            for name, png in pictures.items():
                tracker.image(name, state.samples, png)
            progress.set_postfix_str(f"val {task.metric} {metrics[task.metric]:.4g}")
            if math.isfinite(metrics[task.metric]) and (state.best is None or metrics[task.metric] < state.best):
                state.best, state.best_at = metrics[task.metric], state.samples
                dist.run_on_leader(task.export, plain, metrics)
            plain.to("cpu")  # a second model on the device would undo what ZeRO 3 saves
        state.evaluated = state.samples
        if config.patience and state.samples - max(state.best_at, state.patient_from) >= config.patience:
            state.ended_for = config.samples  # the same on all ranks, as the figure is
            if topology.leader:
                print(
                    f"{what}: no better held-out {task.metric} since {state.best_at:,} samples (patience {config.patience:,}): "
                    f"training ends at {state.samples:,}, the export holds the best weights"
                )

    def save() -> None:
        nonlocal saved
        with watchdog.allow_longer(), speed.paused():
            step, best = state.samples // config.batch, state.best_at // config.batch
            checkpoint.save(folder / "checkpoints", step, engine, asdict(state), config.keep, best)
        saved = state.samples

    def log(lr: float) -> None:
        counters = {"lr": lr, "skipped_steps": state.skipped_total, "bad_samples": state.bad}
        rate = speed.rate()
        counters |= {"epoch": state.samples / task.size, "images_per_second": rate}
        counters |= flops.throughput(task, rate, topology.world, topology.device)
        waits = dist.gather((speed.waited, socket.gethostname()))
        if late := health.find_straggler([w for w, _ in waits], [h for _, h in waits]):
            counters |= {"straggler/rank": late["rank"], "straggler/ratio": late["ratio"]}
        means = {f"train/{k}": v / state.count for k, v in state.sums.items()}
        tracker.log(state.samples // config.batch, state.samples, means | counters | metrics_log.system_metrics())
        state.sums, state.count = {}, 0
        speed.restart()

    saved, speed = state.samples, Speed()
    with Preemption() as preemption, contextlib.ExitStack() as closing:
        for resource in (tracker, progress, watchdog):
            closing.callback(resource.close)
        while True:
            # What is owed at these samples comes before the next step, also after a resume.
            if due(config.eval_every, state.evaluated):
                evaluate()
                if state.ended_for or state.best_at == state.samples:
                    save()  # the best is kept; also in place of a checkpoint at these samples, which does not know of the end
            if due(config.save_every, saved):
                save()
            if state.ended_for or state.samples >= config.samples:
                break
            with speed.waiting():
                micro_batches = list(itertools.islice(batches, config.engine.accumulation))
            bad = [entry for b in micro_batches for entry in b.pop("bad", ())]
            journal.append(folder / "quarantine.jsonl", *bad)
            keys = [key for b in micro_batches for key in b.pop("key")]
            torch.manual_seed(sample_seed(seed, state.samples) + topology.rank)  # dropout is the same after a resume
            lr = learning_rate(config.optim, state.samples, config.samples)
            flags = {"stop": preemption.requested, "bad": len(bad)}
            decay = average_decay(config.engine.average, state.samples, config.batch)
            step = engine.step([_to(b, engine.device) for b in micro_batches], lr, flags, decay)
            changed = task.after_step(module, step.statistics) if step.accepted else {}
            state.samples += config.batch
            if ledger_path:
                journal.append(ledger_path, {"samples": state.samples, "keys": keys})
            _account(state, step, changed)
            health.check_skipped(state.skipped, config.health)
            _check_bad(state, task.size, config.max_bad_fraction)
            watchdog.beat()
            speed.count(config.batch)
            progress.update(config.batch)
            if due(config.log_every, state.samples - config.batch):
                log(lr)
            if step.flags["stop"] and state.samples < config.samples:
                save()
                raise Stopped(f"{what} stopped by {preemption.reason or 'another rank'} at {state.samples:,} samples")
    if state.best is None:
        raise Diverged(f"{what}: the held-out {task.metric} was never finite, so there is nothing to export")


class Speed:
    """Images per second and time spent waiting for data, since the last log line."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.began, self.images, self.waited = time.monotonic(), 0, 0.0

    def count(self, images: int) -> None:
        self.images += images

    def rate(self) -> float:
        return self.images / max(time.monotonic() - self.began, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.began += time.monotonic() - began

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began


def _to(value, device: torch.device):
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    if isinstance(value, list):
        return [_to(v, device) for v in value]
    return value.to(device, non_blocking=True)


def _account(state: State, step: Step, changed: dict[str, float]) -> None:
    state.skipped = 0 if step.accepted else state.skipped + 1
    state.skipped_total += not step.accepted
    state.bad += int(step.flags["bad"])
    if step.accepted:
        state.count += 1
        for name, value in (step.metrics | changed).items():
            state.sums[name] = state.sums.get(name, 0.0) + value


def _check_bad(state: State, size: int, limit: float) -> None:
    # One in the first thousand is no verdict on a data set.
    if state.bad > limit * max(state.samples, size, 1_000):
        raise UserError(
            f"{state.bad} of {state.samples} samples could not be read, above max_bad_fraction={limit}. They are listed in "
            "quarantine.jsonl; `lesiongen verify` shows which shards are damaged."
        )
