"""The stages as a graph: how each stands, which are still to do, and running them on this machine."""

from dataclasses import dataclass, replace
from pathlib import Path

from hpc import config as hpc_config
from hpc import errors
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run import metrics_log, rundir
from launch import executors
from launch.rank import run_stage
from lesiongen.experiment import Experiment
from lesiongen.stages import pack, sample, stages
from lesiongen.stages.base import Stage, stage_dir_of


@dataclass(frozen=True)
class Standing:
    """How a stage stands.

    Attributes:
        stage: The stage.
        state: "done", "stale" (made from another config), "started", or "waiting".
        detail: Why, or how far, in words.
        progress: From 0 to 1.
    """

    stage: Stage
    state: str
    detail: str = ""
    progress: float = 0.0


def standings(config: Experiment, fresh: tuple[str, ...] = ()) -> list[Standing]:
    """How each stage stands, upstream first. Stages named in `fresh` count as if nothing were there."""
    found: list[Standing] = []
    unfinished: set[str] = set()
    for stage in stages(config).values():
        standing = _standing(config, stage, unfinished, stage.name in fresh)
        if standing.state != "done":
            unfinished.add(stage.name)
        found.append(standing)
    return found


def _standing(config: Experiment, stage: Stage, unfinished: set[str], fresh: bool) -> Standing:
    stage_dir = stage_dir_of(config, stage)
    if fresh or stage_dir.record is None:
        return Standing(stage, "waiting")
    samples = samples_seen(stage_dir.path)
    done = stage_dir.done()
    progress = 1.0 if done else min(1.0, samples / stage.target) if stage.trains else 0.0
    if awaited := unfinished & set(stage.needs):  # its inputs are still being made: whether it will be stale is not known
        return Standing(stage, "waiting", "for " + ", ".join(sorted(awaited)), progress)
    if changed := stage_dir.stale():
        return Standing(stage, "stale", "; ".join(changed[:3]), progress)
    if done:
        return Standing(stage, "done", "", progress)
    return Standing(stage, "started", f"{samples:,} of {stage.target:,} samples" if stage.trains else "", progress)


def samples_seen(folder: Path) -> int:
    """Samples that a training stage has seen, by its metrics log; 0 where there is none."""
    rows = metrics_log.read_metrics(folder)
    return rows[-1]["samples"] if rows else 0


def to_do(config: Experiment, fresh: tuple[str, ...] = (), only: tuple[str, ...] = ()) -> list[Stage]:
    """Lists the stages to run, upstream first. Changes nothing.

    Args:
        config: The run's config.
        fresh: Stages that are to be made again.
        only: Stages to consider; all by default.

    Raises:
        UserError: One of the stages is stale, or `fresh` names a stage that is not among them.
    """
    known = only or tuple(stages(config))
    for name in fresh:
        if name not in known:
            raise UserError(f"--fresh {name}: the stages here are {', '.join(known)}.")
    found = [one for one in standings(config, fresh) if one.stage.name in known]
    for one in found:
        if one.state == "stale":
            stage_dir_of(config, one.stage).check()
    return [one.stage for one in found if one.state != "done"]


def run_stages(config: Experiment, todo: list[Stage], fresh: tuple[str, ...] = ()) -> int:
    """Runs stages one after another on this machine, until one fails. Returns the exit code.

    Args:
        config: The run's config; it is written into the run directory first.
        todo: The stages to run, upstream first.
        fresh: Stages whose directories are deleted first.
    """
    clear(config, fresh)
    write_config(config)
    for stage in todo:
        if code := executors.EXECUTORS["local"](config, stage):
            return code
    return errors.DONE


def clear(config: Experiment, fresh: tuple[str, ...]) -> None:
    """Deletes the directories of stages that are to be made again. Call it when everything else has been checked."""
    for name in fresh:
        stage_dir_of(config, stages(config)[name]).clear()


def write_config(config: Experiment) -> None:
    """Writes the resolved config into the run directory."""
    rundir.atomic_write(config.directory / "config.yaml", hpc_config.to_yaml(config).encode())


def where_to_look(config: Experiment) -> str:
    """Lines that tell a person where the results of a finished run are."""
    here = config.directory
    return (
        f"\nreport:   {here / 'report' / 'report.html'}"
        f"\nsamples:  {here / 'samples' / 'contact.png'} and {here / 'samples' / 'images'}/"
        f"\nMLflow:   lesiongen ui --runs {here.parent}"
    )


def sample_into(config: Experiment, folder: Path, fresh: bool = False) -> None:
    """Samples with other settings than the run's own, into a directory outside the run's stages.

    Args:
        config: The run's config, with the settings wanted in `sample`.
        folder: Directory of the samples.
        fresh: Delete what is in the directory first.
    """
    stage = sample.stage(config)
    stage_dir = replace(stage_dir_of(config, stage), path=folder)
    if fresh:
        stage_dir.clear()
    run_stage(config, stage, Topology(), stage_dir)


def pack_into(config: Experiment, out: Path, fresh: list[str], append: bool = False) -> None:
    """Packs without a run around the shards.

    Args:
        config: The config; only `data` matters.
        out: Directory of the shards.
        fresh: ["shards"] to delete what is there first, or [].
        append: Add new images to the set in `out`.
    """
    if unknown := [name for name in fresh if name != "shards"]:
        raise UserError(f"--fresh {unknown[0]}: the only stage here is shards.")
    if append:
        append_to(config, out)
        return
    stage = pack.stage(config)
    stage_dir = replace(stage_dir_of(config, stage), path=out)
    if fresh:
        stage_dir.clear()
    stage_dir.check()
    if stage_dir.done():
        print(f"{out} is packed already; --append adds what is new")
        return
    run_stage(config, stage, Topology(), stage_dir)
    print(f"packed into {out}; train on it with inputs.shards={out}")


def packed_settings(out: Path) -> dict:
    """What a finished set was packed with. Raises UserError where there is none."""
    record = rundir.read_stage_record(out)
    if record is None or record["digest"] is None:
        raise UserError(f"{out} holds no finished shards to append to; pack without --append first.")
    return record["identity"]


def append_to(config: Experiment, out: Path) -> None:
    """Adds images that are new to a packed set. Images that are packed stay where they are.

    Raises UserError where settings differ that would make the new shards unlike the old ones.
    """
    identity = packed_settings(out)
    free = ("images", "metadata", "columns", "splits", "licences", "classes", "rename")
    before, now = ({k: v for k, v in of.items() if k not in free} for of in (identity, hpc_config.plain(config.data, False)))
    if changed := hpc_config.differences(before, now):
        raise UserError(f"{out} was packed with other settings: {'; '.join(changed)}. Append with the same.")
    record = rundir.read_stage_record(out)
    stage_dir = rundir.StageDir(out, identity, record["inputs"], record["target"])
    run_stage(config, pack.appending(config, identity), Topology(), stage_dir)
    print(f"appended to {out}; what was made from it before is stale now")
