"""The training loop of all stages that train. The position in the data is one integer: the number of samples seen.

`train` is the loop. `Trainer` owns the model, the engine and the logs, and has one method for each step of the loop. The
stages tokenizer, polish and prior call `train` with a task (hpc/train/task.py). Batches come from the task's stream.
Checkpoints go to `checkpoints/`, the best weights through the task to `export/`, and metrics to the metrics log.
"""

import gc
import itertools
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from hpc import dist, watchdog
from hpc.config import volatile
from hpc.data.order import sample_seed
from hpc.errors import Diverged, Stopped, UserError
from hpc.run import journal, metrics_log
from hpc.run.progress import progress_bar
from hpc.train import checkpoint, flops
from hpc.train.engine import Engine, EngineConfig, Step, build
from hpc.train.health import HealthConfig, loss_limit
from hpc.train.optim import OptimConfig, average_decay, build_optimizer, learning_rate
from hpc.train.preempt import Preemption
from hpc.train.prefetch import on_device
from hpc.train.profiling import Trace
from hpc.train.rollback import Rollbacks, Spike
from hpc.train.state import State
from hpc.train.stragglers import Speed, Stragglers
from hpc.train.task import Task

# Settings of a TrainConfig that may change when a training has diverged. The optimizer's state does not depend on them.
ADJUSTABLE = (
    *(f"optim.{name}" for name in ("lr", "schedule", "warmup", "floor", "cooldown", "pieces")),
    "engine.clip",
    "engine.precision",
)


@dataclass(frozen=True)
class TrainConfig:
    """How long and how a model is trained. Lengths and intervals are in samples."""

    samples: int = volatile(1_000_000)  # length of training
    batch: int = 32  # global batch: samples of one optimizer step, over all ranks
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    log_every: int = volatile(1_000)
    eval_every: int = volatile(50_000)
    patience: int = volatile(0)  # end training after this many samples without a better held-out metric; 0 = never
    save_every: int = volatile(50_000)
    keep: int = volatile(2)  # number of newest checkpoints to keep, in addition to the best
    max_bad_fraction: float = volatile(0.001)  # stop when more than this share of the samples cannot be read
    profile: bool = volatile(False)  # write a trace of ten steps for torch's profiler, profile/trace-<rank>.json

    def __post_init__(self):
        if min(self.samples, self.batch, self.log_every, self.eval_every, self.save_every) < 1:
            raise ValueError("samples, batch, log_every, eval_every and save_every must be at least 1")
        if self.patience < 0:
            raise ValueError("patience is a number of samples, or 0 for never")
        if self.keep < 2:
            raise ValueError("keep must be at least 2, so that an older checkpoint remains if the newest is damaged")


def train(
    task: Task, config: TrainConfig, folder: Path, topology: dist.Topology, seed: int, what: str, ledger: bool = False
) -> None:
    """Trains until `config.samples`, or until patience runs out. Resumes from the newest sound checkpoint. Collective.

    Args:
        task: What to train, with its data.
        config: Length, batch, optimizer, evaluations and checkpoints.
        folder: The stage's directory.
        topology: This process among the ranks.
        seed: Seed of the initial weights and of dropout.
        what: Name of the training in messages.
        ledger: Whether each rank writes the keys of the samples that it trained on into ledger-<rank>.jsonl.

    Raises:
        Stopped: A signal or the end of the allocation requested a stop. A checkpoint was saved.
        Diverged: The loss still spikes after the allowed rollbacks, or no weights could be exported.
        UserError: Too many samples cannot be read.
    """
    while True:
        rollbacks = Rollbacks(folder, config.optim, config.engine)
        start = checkpoint.newest_sound(folder / "checkpoints")
        if start is None:
            dist.run_on_leader(_refuse_second_start, folder)
        try:
            _train(Trainer(task, config, folder, topology, seed, what, start, ledger), rollbacks.passes_over)
            return
        except Spike as spike:
            done = rollbacks.roll_back(spike, config.batch, config.health.max_rollbacks)
            metrics_log.MetricsLog(folder, topology.leader).alarm("spike", f"{what}: {done}")
        gc.collect()  # frees the model and its engine before they are built again


def _train(trainer: "Trainer", passes_over: Callable[[int], bool]) -> None:
    """Trains to the end, or until a spike.

    Args:
        trainer: What the training needs. Nothing else may hold it, so that a rollback can free its memory.
        passes_over: Whether the step that begins at a position is left out.

    Raises:
        Spike: The last steps were spikes, or the weights are destroyed.

    Further errors are those of `train`.
    """
    config, state, what = trainer.config, trainer.state, trainer.what
    with Preemption() as preemption, trainer, watchdog.phase("a step", config.health.hang_minutes * 60):
        while True:
            # Run any evaluation or save that is due before training on. This also covers a run that was killed just before one.
            # Weights from which the last step was skipped may be damaged: wait until a step shows that they are not.
            ended = state.samples >= config.samples
            if (state.evaluating or trainer.due(config.eval_every, state.evaluated)) and (ended or not state.skipped):
                trainer.evaluate()
            if trainer.due(config.save_every, trainer.saved) and not state.skipped:
                trainer.save()
            if state.ended_length or ended:
                break

            # Take one optimizer step. It tells all ranks whether the step is accepted and whether any rank was asked to stop.
            with trainer.speed.waiting():
                micro_batches = list(itertools.islice(trainer.batches, config.engine.accumulation))
            if passes_over(state.samples):
                trainer.pass_over()
                continue
            step = trainer.step(micro_batches, stop=preemption.requested)
            trainer.check()
            if trainer.due(config.log_every, state.samples - config.batch):
                trainer.log()

            # Stop early if any rank was asked to, on all ranks after the same step.
            if step.flags["stop"] and state.samples < config.samples and not state.skipped:
                trainer.save()
                raise Stopped(f"{what} stopped by {preemption.reason or 'another rank'} at {state.samples:,} samples")
    if state.best is None:
        raise Diverged(f"{what}: training ended before any step after which the weights could be exported")


def _refuse_second_start(folder: Path) -> None:
    """Raises UserError if an earlier training in this directory saved checkpoints that are gone or all damaged."""
    damaged = checkpoint.committed(folder / "checkpoints")
    if damaged or (folder / "export").exists():
        seen = f"all {len(damaged)} checkpoints are damaged" if damaged else "its checkpoints are gone"
        raise UserError(
            f"{folder} holds a training, but {seen}. Restore them (`lesiongen verify {folder}` names what is wrong), or train "
            f"again from the start with --fresh {folder.name}, which deletes the log and the export. Nothing was changed."
        )


class Trainer:
    """Owns what one training needs: data, model, engine, logs, progress bar. `train` calls its methods."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        folder: Path,
        topology: dist.Topology,
        seed: int,
        what: str,
        start: Path | None,
        ledger: bool,
    ):
        """Builds the model and its engine. If there is a checkpoint, loads it and cuts the logs back to it.

        Args:
            start: The checkpoint; None for a training from scratch.

        The other arguments are those of `train`.
        """
        self.task, self.config, self.folder, self.topology = task, config, folder, topology
        self.seed, self.what = seed, what
        torch.manual_seed(seed)
        self.state = state = State.resume(start, config.samples)
        # Start the data workers first: they load while the engine is built.
        stream = task.stream(state.samples, config.engine.micro_batch(config.batch, topology.world_size))
        self.batches = on_device(stream, topology.device)
        self.engine = self._build(start)
        self.module = self.engine.module
        self.log_file = metrics_log.MetricsLog(folder, enabled=topology.leader)
        self.log_file.resume(state.samples, state.evaluated)
        # Each rank has files of its own: appends of several machines to one file can overwrite one another.
        self.ledger = folder / f"ledger-{topology.rank}.jsonl" if ledger else None
        self.quarantine = folder / f"quarantine-{topology.rank}.jsonl"
        # Rank 0 cuts back the files of all ranks, also of those that this attempt does not have. No rank appends before a step.
        if topology.leader:
            for path in (*folder.glob("ledger-*.jsonl"), *folder.glob("quarantine-*.jsonl")):
                journal.cut_back(path, lambda entry: entry["samples"] <= state.samples)
        self.saved, self.save_seconds = state.samples, 0.0
        self.speed = Speed()
        self.stragglers = Stragglers()
        self.progress = progress_bar(config.samples, what, initial=state.samples, shown=topology.leader)
        self.trace = Trace(folder, topology.rank, config.profile)

    def _build(self, start: Path | None) -> Engine:
        """Builds the model and its engine, and loads the checkpoint, if there is one."""
        task, config, world = self.task, self.config, self.topology.world_size
        universal = start is not None and checkpoint.needs_universal(start, config.engine, world)
        if universal:
            checkpoint.to_universal(start)
        module = build(task.build, config.engine, config.batch)
        if start is None:
            task.prepare(module)
        engine = Engine(module, build_optimizer(module, config.optim), config.engine, config.batch, universal)
        if start is not None:
            engine.load(start, universal)
        return engine

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.trace.close()
        self.progress.close()

    def due(self, every: int, last: int) -> bool:
        """Returns whether training has passed a multiple of `every` samples, or its end, since `last` samples."""
        samples = self.state.samples
        return samples // every > last // every or samples >= self.config.samples > last

    def step(self, micro_batches: list[dict], stop: bool) -> Step:
        """Takes one optimizer step and adds its result to the state.

        Args:
            micro_batches: This rank's micro-batches from the task's stream, on the device.
            stop: Whether this rank was asked to stop.
        """
        config, state, engine = self.config, self.state, self.engine
        bad = [entry for batch in micro_batches for entry in batch.pop("bad", ())]
        journal.append(self.quarantine, *({"samples": state.samples} | entry for entry in bad))
        keys = [key for batch in micro_batches for key in batch.pop("key")]
        # Seed dropout by the position, so that a resumed training draws the same random numbers.
        torch.manual_seed(sample_seed(self.seed, state.samples) + self.topology.rank)
        step = engine.step(
            [self.task.finish(batch) for batch in micro_batches],
            lr=learning_rate(config.optim, state.samples, config.samples),
            flags={"stop": stop, "bad": len(bad)},
            decay=average_decay(config.engine.average, state.samples, config.batch),
            loss_limit=loss_limit(state.recent, config.health.spike),
        )
        after = self.task.after_step(self.module, step.statistics) if step.accepted else {}
        state.samples += config.batch
        if self.ledger:
            journal.append(self.ledger, {"samples": state.samples, "keys": keys})
        state.account(step, after)
        self.trace.step()
        return step

    def pass_over(self) -> None:
        """Counts the data of one step as seen, without training on them."""
        self.state.samples += self.config.batch
        self.progress.update(self.config.batch)

    def check(self) -> None:
        """Checks the run after a step, and shows the progress.

        Raises:
            Spike: Too many steps in a row were skipped.
            UserError: Too many samples cannot be read.
        """
        state, batch = self.state, self.config.batch
        if state.skipped >= self.config.health.max_skipped:
            reason = f"{state.skipped} steps in a row had a loss far above the usual, or a non-finite loss or gradient"
            raise Spike(reason, state.samples - state.skipped * batch, state.samples)
        self._check_bad()
        self.speed.count(batch)
        self.progress.update(batch)

    def _check_bad(self) -> None:
        state, limit = self.state, self.config.max_bad_fraction
        # Early on, take the share of a whole epoch (at least 1,000 samples): a bad sample among the first few says little.
        if state.bad > limit * max(state.samples, self.task.size, 1_000):
            raise UserError(
                f"{state.bad} of {state.samples} samples could not be read, above max_bad_fraction={limit}. They are listed in "
                "quarantine-<rank>.jsonl; `lesiongen verify` shows which shards are damaged."
            )

    def evaluate(self) -> None:
        """Measures the held-out metrics, exports the weights if they are the best so far, and checks patience.

        A checkpoint is saved first: an evaluation may take long or fail, and the best checkpoint is kept. A run that is killed
        during the evaluation resumes from it and evaluates again.
        """
        state, metric = self.state, self.task.metric
        state.evaluating = True
        if self.saved < state.samples and not state.skipped:
            self.save()
        limit = self.config.health.evaluation_minutes * 60
        with watchdog.phase("an evaluation", limit), self.speed.paused(), self.engine.evaluating():
            metrics, pictures = self.task.evaluate(self.engine)
            self._check_destroyed(metrics[metric])
            self._log_row({f"val/{name}": value for name, value in metrics.items()})
            if self.topology.leader:
                pictures = pictures | self.task.curves(metrics_log.read_metrics(self.folder))
            for name, png in pictures.items():
                self.log_file.image(name, state.samples, png)
            shown = getattr(self.task, "shown", metric)
            self.progress.set_postfix_str(f"val {shown} {metrics[shown]:.4g}")
            if not state.skipped and (state.best is None or metrics[metric] < state.best):
                state.best, state.best_at = metrics[metric], state.samples
                self.task.export(self.engine.weights, metrics)
        state.evaluated, state.evaluating = state.samples, False
        self._check_patience()
        if state.ended_length:  # record that patience has run out: a longer training must start a new patience
            self.save()

    def _check_destroyed(self, value: float) -> None:
        """Raises Spike if the held-out metric is above the task's `worst`."""
        if not value <= self.task.worst:  # also if it is not a number
            reason = f"the held-out {self.task.metric} is {value:.3g}, worse than that of any sound model"
            raise Spike(reason, self.state.samples - self.config.batch, self.state.samples)

    def _check_patience(self) -> None:
        state, patience = self.state, self.config.patience
        if patience and state.samples - max(state.best_at, state.patience_from) >= patience:
            state.ended_length = self.config.samples  # the same on all ranks, because the held-out metric is
            if self.topology.leader:
                print(
                    f"{self.what}: no better held-out {self.task.metric} since {state.best_at:,} samples (patience "
                    f"{patience:,}): training ends at {state.samples:,}, the export holds the best weights"
                )

    def save(self) -> None:
        """Saves a checkpoint. Collective."""
        state, batch, began = self.state, self.config.batch, time.monotonic()
        state.read_sums()
        with watchdog.phase("saving a checkpoint", self.config.health.save_minutes * 60), self.speed.paused():
            checkpoint.save(
                self.folder / "checkpoints",
                state.samples // batch,
                self.engine,
                asdict(state),
                self.config.keep,
                best=state.best_at // batch,
                wait_s=self.config.health.hang_minutes * 60,
            )
        self.saved, self.save_seconds = state.samples, time.monotonic() - began

    def log(self) -> None:
        """Logs the mean training metrics since the last log line, the speed, a slow rank, and the load of the machine."""
        state, rate = self.state, self.speed.rate()
        # The learning rate of the step that has just ended.
        lr = learning_rate(self.config.optim, state.samples - self.config.batch, self.config.samples)
        counters = {"lr": lr, "skipped_steps": state.skipped_total, "bad_samples": state.bad}
        counters |= {"epoch": state.samples / self.task.size, "images_per_second": rate}
        if self.save_seconds:
            counters["checkpoint_seconds"], self.save_seconds = self.save_seconds, 0.0
        counters |= flops.throughput(self.task, rate, self.topology.world_size, self.topology.device)
        counters |= self._find_straggler()
        state.read_sums()
        means = {f"train/{name}": total / state.count for name, total in state.sums.items()}
        self._log_row(means | counters | metrics_log.system_metrics())
        state.sums, state.count = {}, 0
        self.speed.restart()

    def _find_straggler(self) -> dict[str, float]:
        """Compares the ranks' own time. Names a slow rank on stderr, and returns the metrics that describe it. Collective."""
        forward = self.engine.forward.take() if self.config.engine.zero < 3 else 0.0
        times = dist.gather((self.speed.waited + forward, socket.gethostname()))
        late = self.stragglers.find([seconds for seconds, _ in times], self.speed.seconds())
        if late is None:
            return {}
        rank, ratio = late
        if self.topology.leader:
            seconds, host = times[rank]
            self.log_file.alarm(
                "straggler",
                f"{self.what}: rank {rank} on {host} is slow: it needs {ratio:.1f} × the median time of the ranks for its data "
                f"and forward passes ({seconds:.1f} s since the last log line)",
            )
        return {"straggler/rank": rank, "straggler/ratio": ratio}

    def _log_row(self, metrics: dict[str, float]) -> None:
        self.log_file.log(self.state.samples // self.config.batch, self.state.samples, metrics)
