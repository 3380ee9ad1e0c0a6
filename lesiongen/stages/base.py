"""What a stage is: it reads finished directories, writes one finished directory, and can be killed and run again."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpc import config as hpc_config
from hpc import dist
from hpc.data.storage import is_remote
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run import rundir
from hpc.run.rundir import StageDir
from lesiongen.data.packed import Packed
from lesiongen.experiment import Experiment


@dataclass(frozen=True)
class Stage:
    """name: its directory in the run; needs: artefacts upstream; run(config, topology, folder) → digest of the result,
    on every rank; target: amount of work that makes it done."""

    name: str
    needs: tuple[str, ...]
    identity: dict
    run: Callable[[Experiment, Topology, Path], str]
    target: int = 1
    trains: bool = False
    parallel: bool = True  # gains from several ranks


def artefact(config: Experiment, name: str) -> Path:
    """Where a stage's result lies: in this run, or in the one that inputs names. Packed sets: see packed()."""
    given = getattr(config.inputs, name, None)
    if not given:
        return config.directory / name
    path = Path(given)
    return path / name if (path / name).is_dir() else path


def packed_places(config: Experiment) -> list[str | Path]:
    """Where the shards lie: this run's, or each of the runs, folders and URLs that inputs names."""
    if not config.inputs.shards:
        return [config.directory / "shards"]
    return [p if is_remote(p) or not (Path(p) / "shards").is_dir() else Path(p) / "shards" for p in config.inputs.shards]


def packed(config: Experiment) -> Packed:
    """The finished shards, as one. Raises UserError for sets that are not finished or do not go together."""
    return Packed(packed_places(config), config.data.cache)


def directory(config: Experiment, stage: Stage) -> StageDir:
    """The stage's directory with what it must have been made from, as far as its inputs exist."""
    inputs = {name: digest_of(config, name) for name in stage.needs}
    return StageDir(config.directory / stage.name, stage.identity, inputs, stage.target)


def digest_of(config: Experiment, name: str) -> str | None:
    if name == "shards" and config.inputs.shards:
        return packed(config).digest()
    record = rundir.read_record(artefact(config, name))
    return record["digest"] if record and record["done"] else None


def require(config: Experiment, name: str) -> Path:
    """The finished artefact, or a UserError that says which stage is missing."""
    path = artefact(config, name)
    if digest_of(config, name) is None:
        raise UserError(f"{path} is not finished; run that stage first (`lesiongen run` takes them in order).")
    return path


def execute(config: Experiment, stage: Stage, topology: Topology) -> None:
    """Runs a stage unless it is done: locked, checked against what is there, recorded. Collective."""
    dist.init(topology, config.local.join_seconds)
    for name in stage.needs:
        if name == "shards" and config.inputs.shards:
            dist.leader_does(packed(config).refuse_leaks)
        else:
            dist.leader_does(require, config, name)
    place = directory(config, stage)
    dist.leader_does(place.check)
    if dist.leader_does(place.done):
        return
    with contextlib.ExitStack() as held:
        dist.leader_does(_open, held, place, config)
        digest = stage.run(config, topology, place.path)
        dist.leader_does(place.finish, digest)


def _open(held: contextlib.ExitStack, place: StageDir, config: Experiment) -> None:
    held.enter_context(rundir.lock(place.path, wait_s=5))  # a killed predecessor's ranks take a moment to go
    place.begin(hpc_config.to_yaml(config))
