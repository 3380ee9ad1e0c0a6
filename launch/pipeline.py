"""The stages of a run: which state each stage is in, which stages are left to do, and running stages on this machine.

The state is read from the stage directories (stage.json and metrics.jsonl) each time and is stored nowhere else. The verbs
of the command line call this module.
"""

import re
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from hpc import config as hpc_config
from hpc import errors
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run import metrics_log, rundir
from launch import executors
from launch.rank import run_stage
from launch.remaining import TrainingTime
from lesiongen.experiment import Experiment
from lesiongen.ingest import contents
from lesiongen.stages import pack, stages
from lesiongen.stages.base import Stage, artefact, digest_of, packed, stage_dir_of

# Settings of `data` that may differ when images are appended: they describe the new images, not the shards' format.
APPEND_MAY_CHANGE = ("images", "metadata", "columns", "splits", "licences", "classes", "rename")


@dataclass(frozen=True)
class StageStatus:
    """The state of a stage.

    Attributes:
        stage: The stage.
        state: "done", "started", "stale" (made from other settings or inputs), "diverged", or "waiting" (not started, or an
            input is not done).
        detail: The reason for the state, or the progress, as text.
        progress: Share of the work that is done, from 0 to 1.
    """

    stage: Stage
    state: str
    detail: str = ""
    progress: float = 0.0


def stage_statuses(config: Experiment, fresh: tuple[str, ...] = ()) -> list[StageStatus]:
    """Returns the state of each stage, upstream first. Changes nothing.

    Args:
        config: The run's config.
        fresh: Names of stages to treat as if their directories were empty.
    """
    statuses: list[StageStatus] = []
    unfinished: set[str] = set()
    for stage in stages(config).values():
        status = _status_of(config, stage, unfinished, stage.name in fresh)
        if status.state != "done":
            unfinished.add(stage.name)
        statuses.append(status)
    return statuses


def _status_of(config: Experiment, stage: Stage, unfinished: set[str], fresh: bool) -> StageStatus:
    """Returns the state of one stage.

    Args:
        config: The run's config.
        stage: The stage.
        unfinished: Names of the earlier stages that are not done.
        fresh: Whether to treat the stage's directory as empty.
    """
    stage_dir = stage_dir_of(config, stage)
    if fresh or stage_dir.record is None:
        return StageStatus(stage, "waiting")
    samples = metrics_log.samples_seen(stage_dir.path)
    done = stage_dir.done()
    progress = 1.0 if done else min(1.0, samples / stage.target) if stage.trains else 0.0
    # The digest of an unfinished input is unknown, so the record cannot be compared with this input yet.
    if missing := unfinished & set(stage.needs):
        return StageStatus(stage, "waiting", "for " + ", ".join(sorted(missing)), progress)
    if reason := stage_dir.record.get("diverged"):
        return StageStatus(stage, "diverged", reason, progress)
    if changed := stage_dir.differences():
        return StageStatus(stage, "stale", "; ".join(changed[:3]), progress)
    if done:
        return StageStatus(stage, "done", "", progress)
    return StageStatus(stage, "started", f"{samples:,} of {stage.target:,} samples" if stage.trains else "", progress)


def stages_to_do(
    config: Experiment, fresh: tuple[str, ...] = (), only: tuple[str, ...] = (), awaited: Collection[str] = ()
) -> list[Stage]:
    """Returns the stages to run, upstream first. Changes nothing.

    Args:
        config: The run's config.
        fresh: Names of stages to run again, even if they are done.
        only: Names of the stages to consider. Empty for all.
        awaited: Names of results of other runs that need not be finished yet.

    Raises:
        UserError: A result of another run is missing, a stage is stale or cannot run with its settings, or `fresh` names a
            stage that is not considered.
    """
    considered = only or tuple(stages(config))
    for name in fresh:
        if name not in considered:
            raise UserError(f"--fresh {name}: there is no such stage here. The stages are {', '.join(considered)}.")
    statuses = [status for status in stage_statuses(config, fresh) if status.stage.name in considered]
    for status in statuses:
        if status.state == "stale":
            stage_dir_of(config, status.stage).check()  # raises the UserError that names the difference
    todo = [status.stage for status in statuses if status.state != "done"]
    for stage in todo:
        for name in stage.needs:
            if (other := getattr(config.inputs, name, None)) and name not in awaited and digest_of(config, name) is None:
                where = ", ".join(other) if name == "shards" else artefact(config, name)
                raise UserError(
                    f"inputs.{name}: {where} is not finished, or is no directory of that result. {stage.name} needs it."
                )
        if stage.check:
            stage.check(config)
    return todo


def run_stages(config: Experiment, todo: list[Stage], fresh: tuple[str, ...] = ()) -> int:
    """Runs stages one after another on this machine, until a stage fails.

    Args:
        config: The run's config. Written into the run directory before the first stage runs.
        todo: The stages to run, upstream first.
        fresh: Names of stages whose directories are deleted first.

    Returns:
        The exit code of the stage that failed, or 0.
    """
    if not todo:  # a finished run may be read-only
        return errors.DONE
    refuse_busy(config, todo)
    clear_stages(config, fresh)
    write_config(config)
    names = [stage.name for stage in todo]
    training_time = TrainingTime(config)
    for number, stage in enumerate(todo, 1):
        left = training_time.left(names[number - 1 :])
        more = f"; about {duration(left)} of training left" if left else ""
        print(f"stage {number} of {len(todo)}: {stage.name}{more}", flush=True)
        began = time.monotonic()
        if code := executors.run_local(config, stage):
            return code
        result = "  ".join(filter(None, (result_of(config, stage), str(config.directory / stage.name))))
        print(f"{stage.name} took {duration(time.monotonic() - began)}: {result}", flush=True)
    return errors.DONE


def result_of(config: Experiment, stage: Stage) -> str:
    """Returns what a finished stage has made, in a few words: held-out metrics, or numbers of images."""
    if stage.name == "shards":
        counts = {split: sum(by_class.values()) for split, by_class in packed(config).counts.items()}
        return ", ".join(f"{number:,} {split}" for split, number in counts.items()) + " images"
    if stage.name == "samples":
        with open(config.directory / "samples" / "metadata.csv", encoding="utf-8") as file:
            return f"{sum(1 for _ in file) - 1:,} samples"
    return held_out_metrics(config, stage.name)


def held_out_metrics(config: Experiment, stage: str) -> str:
    """Returns the latest values of a stage's main held-out metrics, at most four, as text.

    Args:
        config: The run's config.
        stage: The stage's name.
    """
    _, latest = metrics_log.read_held_out(config.directory / stage)
    main = r"loss|psnr|usage/[^/]+|bits_per_token|bigram_bits|kid|recall|recognised|trained_on_samples"
    return "  ".join([f"{name} {value:.3g}" for name, value in latest.items() if re.fullmatch(main, name)][:4])


def duration(seconds: float) -> str:
    """Returns a time in its two largest units, such as "40 s", "12 min" or "3 h 5 min"."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def refuse_busy(config: Experiment, todo: list[Stage]) -> None:
    """Raises Busy if another process works on one of the stages, before anything is changed."""
    for stage in todo:
        folder = config.directory / stage.name
        if folder.exists():
            with rundir.lock(folder, rundir.QUIET_WAIT_S):
                pass


def clear_stages(config: Experiment, fresh: tuple[str, ...]) -> None:
    """Deletes the directories of stages. Call this only after all other checks, because it cannot be undone.

    Args:
        config: The run's config.
        fresh: Names of the stages.
    """
    for name in fresh:
        stage_dir_of(config, stages(config)[name]).delete()


def write_config(config: Experiment) -> None:
    """Writes the resolved config into the run directory."""
    rundir.atomic_write(config.directory / "config.yaml", hpc_config.to_yaml(config).encode())


def result_locations(config: Experiment) -> str:
    """Returns lines for the user that name the results of a finished run."""
    run_dir = config.directory
    return (
        f"\nreport:   {run_dir / 'report' / 'report.html'}"
        f"\nsamples:  {run_dir / 'samples' / 'contact.png'} and {run_dir / 'samples' / 'images'}/"
        f"\nMLflow:   lesiongen ui --runs {run_dir.parent}"
    )


def pack_into(config: Experiment, out: Path, fresh: list[str], append: bool = False) -> None:
    """Packs images into a directory that belongs to no run.

    Args:
        config: The config; only `data` matters.
        out: Directory of the shards.
        fresh: ["shards"] to delete the directory first, or [].
        append: Add new images to the finished shards in `out`.

    Raises:
        UserError: `fresh` names another stage, or `out` was packed with other settings.
    """
    if unknown := [name for name in fresh if name != "shards"]:
        raise UserError(f"--fresh {unknown[0]}: there is no such stage here. The only stage is shards.")
    if append:
        append_to(config, out)
        return
    stage = pack.stage(config)
    stage_dir = replace(stage_dir_of(config, stage), path=out)
    if fresh:
        stage_dir.delete()
    stage_dir.check()
    if stage_dir.done():
        print(f"{out} is packed already. {contents.news(out, config.data) or 'Use --append to add new images.'}")
        return
    run_stage(config, stage, Topology(), stage_dir)
    print(f"Packed into {out}. To train on it, set inputs.shards={out}")


def packed_settings(out: Path) -> dict:
    """Returns the settings with which the shards in `out` were packed. Raises UserError if `out` has no finished shards."""
    record = rundir.read_stage_record(out)
    if record is None or record["digest"] is None:
        raise UserError(f"{out} holds no finished shards to append to. Pack without --append first.")
    return record["identity"]


def append_to(config: Experiment, out: Path) -> None:
    """Adds new images to finished shards. Images that are already packed keep their shard and their split.

    Args:
        config: The config; `data` names the new images.
        out: Directory of the shards.

    Raises:
        UserError: A setting differs that changes the format of shards, so new and old shards would not fit together.
    """
    identity = packed_settings(out)
    before, now = (
        {key: value for key, value in settings.items() if key not in APPEND_MAY_CHANGE}
        for settings in (identity, hpc_config.to_plain(config.data, False))
    )
    if changed := hpc_config.differences(before, now):
        raise UserError(f"{out} was packed with other settings: {'; '.join(changed)}. Append with the same settings.")
    record = rundir.read_stage_record(out)
    stage_dir = rundir.StageDir(out, identity, record["inputs"], record["target"])
    run_stage(config, pack.appending(identity), Topology(), stage_dir)
    print(f"Appended to {out}. Stages that were made from the shards before are stale now.")
