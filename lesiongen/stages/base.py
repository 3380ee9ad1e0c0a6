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
    """One stage of a run.

    Attributes:
        name: The stage's directory in the run.
        needs: Names of the artefacts that it reads.
        identity: Plain data that make its result another thing: the fingerprint, readable so that a difference is named.
        run: run(config, topology, folder) → digest of the result. Every rank calls it.
        target: Amount of work that makes the stage done, such as samples; a larger target continues.
        trains: The stage is a training, whose progress is counted in samples.
        parallel: Several ranks make the stage faster.
        appends: The stage adds to a finished directory, whose record stays valid until the new digest is written.
    """

    name: str
    needs: tuple[str, ...]
    identity: dict
    run: Callable[[Experiment, Topology, Path], str]
    target: int = 1
    trains: bool = False
    parallel: bool = True
    appends: bool = False


def artefact(config: Experiment, name: str) -> Path:
    """Directory of a stage's result: in this run, or in the run that `inputs` names. For shards see `packed`."""
    given = getattr(config.inputs, name, None)
    if not given:
        return config.directory / name
    path = Path(given)
    return path / name if (path / name).is_dir() else path


def packed_locations(config: Experiment) -> list[str | Path]:
    """Where the shards lie: in this run, or in each of the runs, folders and URLs that `inputs.shards` names."""
    if not config.inputs.shards:
        return [config.directory / "shards"]
    return [p if is_remote(p) or not (Path(p) / "shards").is_dir() else Path(p) / "shards" for p in config.inputs.shards]


def packed(config: Experiment) -> Packed:
    """The finished shards, as one set. Raises UserError for sets that are not finished or do not go together."""
    return Packed(packed_locations(config), config.data.cache)


def shards_identity(config: Experiment) -> dict:
    """What this run's shards are packed from."""
    return hpc_config.plain(config.data, volatile=False)


def shards_are_current(config: Experiment) -> bool:
    """Whether there are finished shards that fit the config."""
    if config.inputs.shards:
        return True
    shards = StageDir(config.directory / "shards", shards_identity(config), {})
    return shards.done() and not shards.stale()


def stage_dir_of(config: Experiment, stage: Stage) -> StageDir:
    """The stage's directory in the run, with what it must have been made from, as far as its inputs exist."""
    inputs = {name: digest_of(config, name) for name in stage.needs}
    return StageDir(config.directory / stage.name, stage.identity, inputs, stage.target)


def digest_of(config: Experiment, name: str) -> str | None:
    """Digest of a finished artefact; None where it is not finished."""
    if name == "shards" and config.inputs.shards:
        return packed(config).digest()
    record = rundir.read_stage_record(artefact(config, name))
    return record["digest"] if record and record["done"] else None


def require(config: Experiment, name: str) -> Path:
    """Directory of a finished artefact. Raises UserError that says which stage is missing."""
    path = artefact(config, name)
    if digest_of(config, name) is None:
        raise UserError(f"{path} is not finished; run that stage first (`lesiongen run` takes them in order).")
    return path


def execute(config: Experiment, stage: Stage, topology: Topology, stage_dir: StageDir | None = None) -> None:
    """Runs a stage unless it is done: locked, checked against what is there, recorded. Collective.

    Args:
        config: The run's config.
        stage: The stage to run.
        topology: This process among the ranks.
        stage_dir: A directory of the stage's own, for a result outside the run. None for the stage's directory in the run.

    Raises:
        UserError: An input is missing, or the directory was made from another config, or another process uses it.
    """
    dist.init(topology, config.local.join_seconds)
    for name in stage.needs:
        if name == "shards" and config.inputs.shards:
            dist.run_on_leader(packed(config).refuse_leaks)
        else:
            dist.run_on_leader(require, config, name)
    config_yaml = hpc_config.to_yaml(config) if stage_dir is None else None  # outside a run the config says too much
    stage_dir = stage_dir or stage_dir_of(config, stage)
    dist.run_on_leader(stage_dir.check)
    if not stage.appends and dist.run_on_leader(stage_dir.done):
        return
    with contextlib.ExitStack() as held:
        dist.run_on_leader(_open, held, stage_dir, stage, config_yaml)
        digest = stage.run(config, topology, stage_dir.path)
        dist.run_on_leader(stage_dir.finish, digest)


def _open(held: contextlib.ExitStack, stage_dir: StageDir, stage: Stage, config_yaml: str | None) -> None:
    """Locks the directory for as long as `held` is open, and records what the stage is made from."""
    held.enter_context(rundir.lock(stage_dir.path, wait_s=5))  # the ranks of a killed predecessor take a moment to end
    if not stage.appends:
        stage_dir.begin(config_yaml)
