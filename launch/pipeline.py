"""The stages as a graph: what is done, what is stale, what is still to do."""

from dataclasses import dataclass
from pathlib import Path

from hpc import config as hpc_config
from hpc import record, rundir
from hpc.errors import UserError
from lesiongen.experiment import Experiment
from lesiongen.stages import stages
from lesiongen.stages.base import Stage, digest_of, directory


@dataclass(frozen=True)
class Standing:
    """A stage and how it stands: "done", "stale", "started", "waiting"; progress in 0 … 1."""

    stage: Stage
    state: str
    detail: str = ""
    progress: float = 0.0


def standings(config: Experiment) -> list[Standing]:
    found, remade = [], set()
    for stage in stages(config).values():
        place = directory(config, stage)
        record = place.record
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
    rows = record.read_metrics(folder)
    return rows[-1]["samples"] if rows else 0


def to_do(config: Experiment, fresh: tuple[str, ...] = (), only: tuple[str, ...] = ()) -> list[Stage]:
    """Stages that are not done, upstream first. Stages named in `fresh` are cleared. Raises UserError for a stale one
    among `only` (all by default)."""
    known = stages(config)
    for name in fresh:
        if name not in known:
            raise UserError(f"--fresh {name}: this run's stages are {', '.join(known)}.")
        directory(config, known[name]).clear()
    standing = standings(config)
    for one in standing:
        if one.state == "stale" and (not only or one.stage.name in only):
            directory(config, one.stage).check()
    return [one.stage for one in standing if one.state != "done"]


def sample_into(config: Experiment, folder: Path) -> int:
    """Samples with other settings than the run's own, into a directory of their own."""
    from hpc import errors
    from hpc.dist import Topology
    from lesiongen.stages import sample

    if missing := [name for name in sample.stage(config).needs if digest_of(config, name) is None]:
        raise UserError(f"{config.directory / missing[0]} is not finished; train it first.")
    with rundir.lock(folder):
        sample.run(config, Topology(), folder)
    return errors.DONE


def pack_into(config: Experiment, out: Path, fresh: list[str]) -> int:
    """Packs without a run around it: `out` is the shards' directory itself."""
    from dataclasses import replace

    from hpc import errors
    from lesiongen.stages import pack

    place = replace(directory(config, pack.stage(config)), path=out)
    if fresh:
        place.clear()
    place.check()
    if place.done():
        print(f"{out} is packed already")
        return errors.DONE
    with rundir.lock(out):
        place.begin()
        place.finish(pack.pack(config.data, out))
    print(f"packed into {out}; train on it with inputs.shards={out}")
    return errors.DONE


def snapshot(config: Experiment) -> None:
    rundir.atomic_write(config.directory / "config.yaml", hpc_config.to_yaml(config).encode())
