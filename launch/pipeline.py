"""The stages as a graph: what is done, what is stale, what is still to do."""

from dataclasses import dataclass, replace
from pathlib import Path

from hpc import config as hpc_config
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run import metrics_log, rundir
from hpc.train import allocator
from lesiongen.experiment import Experiment
from lesiongen.stages import pack, sample, stages
from lesiongen.stages.base import Stage, digest_of, directory


@dataclass(frozen=True)
class Standing:
    """A stage and how it stands: "done", "stale", "started", "waiting"; progress in 0 … 1."""

    stage: Stage
    state: str
    detail: str = ""
    progress: float = 0.0


def standings(config: Experiment, fresh: tuple[str, ...] = ()) -> list[Standing]:
    """How each stage stands; those named in `fresh` as if nothing were there."""
    found, remade = [], set()
    for stage in stages(config).values():
        place = directory(config, stage)
        record = None if stage.name in fresh else place.record
        seen = samples_seen(place.path)
        progress = 1.0 if record and place.done() else min(1.0, seen / stage.target) if stage.trains else 0.0
        if record is None:
            state, detail = "waiting", ""
        elif remade & set(stage.needs):
            # Its inputs are still being made, so nothing can be said of it yet.
            state, detail = "waiting", "for " + ", ".join(sorted(remade & set(stage.needs)))
        elif changed := place.stale():
            state, detail = "stale", "; ".join(changed[:3])
        elif place.done():
            state, detail = "done", ""
        else:
            state, detail = "started", f"{seen:,} of {stage.target:,} samples" if stage.trains else ""
        if state != "done":
            remade.add(stage.name)
        found.append(Standing(stage, state, detail, progress))
    return found


def samples_seen(folder: Path) -> int:
    rows = metrics_log.read_metrics(folder)
    return rows[-1]["samples"] if rows else 0


def to_do(config: Experiment, fresh: tuple[str, ...] = (), only: tuple[str, ...] = ()) -> list[Stage]:
    """Stages of `only` (all by default) that are not done or are to be made anew, upstream first. Changes nothing.
    Raises UserError for a stale one, or a name in `fresh` that is no stage of these."""
    known = only or tuple(stages(config))
    for name in fresh:
        if name not in known:
            raise UserError(f"--fresh {name}: the stages here are {', '.join(known)}.")
    standing = [one for one in standings(config, fresh) if one.stage.name in known]
    for one in standing:
        if one.state == "stale":
            directory(config, one.stage).check()
    return [one.stage for one in standing if one.state != "done"]


def clear(config: Experiment, fresh: tuple[str, ...]) -> None:
    """--fresh, once everything else has been checked."""
    for name in fresh:
        directory(config, stages(config)[name]).clear()


def sample_into(config: Experiment, folder: Path, fresh: bool = False) -> None:
    """Samples with other settings than the run's own, into a directory of their own."""
    stage = sample.stage(config)
    if missing := [name for name in stage.needs if digest_of(config, name) is None]:
        raise UserError(f"{config.directory / missing[0]} is not finished; train it first.")
    place = replace(directory(config, stage), path=folder)
    if fresh:
        place.clear()
    topology = Topology()
    allocator.keep_pages(topology.device)
    with rundir.lock(folder):
        place.begin()
        place.finish(sample.run(config, topology, folder))


def pack_into(config: Experiment, out: Path, fresh: list[str], append: bool = False) -> None:
    """Packs without a run around it: `out` is the shards' directory itself."""
    place = replace(directory(config, pack.stage(config)), path=out)
    if unknown := [name for name in fresh if name != "shards"]:
        raise UserError(f"--fresh {unknown[0]}: the only stage here is shards.")
    if append:
        add_to(config, out)
        return
    if fresh:
        place.clear()
    place.check()
    if place.done():
        print(f"{out} is packed already; --append adds what is new")
        return
    with rundir.lock(out):
        place.begin()
        place.finish(pack.pack(config.data, out))
    print(f"packed into {out}; train on it with inputs.shards={out}")


def packed_settings(out: Path) -> dict:
    """What a finished set was packed with. Raises UserError where there is none."""
    record = rundir.read_record(out)
    if record is None or record["digest"] is None:
        raise UserError(f"{out} holds no finished shards to append to; pack without --append first.")
    return record["identity"]


def add_to(config: Experiment, out: Path) -> None:
    """Adds the images that are new to a packed set; what is there stays where it is, so most settings must stay too."""
    there = packed_settings(out)
    free = ("images", "metadata", "columns", "splits", "licences", "classes", "rename")
    before, now = ({k: v for k, v in of.items() if k not in free} for of in (there, hpc_config.plain(config.data, False)))
    if changed := hpc_config.differences(before, now):
        raise UserError(f"{out} was packed with other settings: {'; '.join(changed)}. Append with the same.")
    with rundir.lock(out):
        record = rundir.read_record(out)
        digest = pack.pack(config.data, out, append=True)
        rundir.StageDir(out, there, record["inputs"], record["target"]).finish(digest)
    print(f"appended to {out}; what was made from it before is stale now")


def snapshot(config: Experiment) -> None:
    rundir.atomic_write(config.directory / "config.yaml", hpc_config.to_yaml(config).encode())
