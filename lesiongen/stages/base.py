"""The description of a stage, and the one function that executes stages.

A stage reads finished directories and writes one directory. The directory's stage.json records the settings and inputs that
the result is made from. A stage that was killed can be run again and resumes. If the directory was made from other settings or
inputs, the stage raises UserError.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from hpc import config as hpc_config
from hpc import dist, watchdog
from hpc.data import manifest
from hpc.data.codestore import CodeStore
from hpc.data.storage import is_remote
from hpc.dist import Topology
from hpc.errors import Diverged, Stopped, UserError
from hpc.run import rundir
from hpc.run.rundir import StageDir
from hpc.train.loop import ADJUSTABLE, TrainConfig
from lesiongen.data.packed import Packed
from lesiongen.experiment import Experiment
from lesiongen.ingest import contents
from lesiongen.ingest.folders import count_images
from lesiongen.priors.export import load_prior
from lesiongen.priors.prior import Prior
from lesiongen.tokenizers.export import load_tokenizer
from lesiongen.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: Name of the stage, which is also its directory in the run.
        needs: Names of the artefacts that the stage reads.
        identity: The settings that the result depends on, as plain data. They are stored in full, not as a digest, so that a
            message can name the setting that differs.
        run: run(config, topology, folder) makes the result in `folder` and returns its digest. Every rank calls it.
        target: Amount of work after which the stage is done, such as samples. A larger target continues a finished stage.
        trains: Whether the stage trains a model. Its progress is then counted in samples.
        parallel: Whether several ranks make the stage faster.
        as_requested: Recognises settings that differ only in their spelling, see StageDir.
        check: Raises UserError for settings with which the stage cannot run. Commands call it before they delete or queue
            anything, so it must be quick.
        adjustable: Dotted keys of the identity that may change when the stage has diverged.
        hints: For some of the artefacts, what else to tell a user who lacks it.
        appends: Whether the stage adds to a finished directory. The directory's record stays valid until the new digest is
            written.
        describe: Returns a few words on what the stage makes, such as "gpt 4×192 · 2.0 M", when its inputs are finished.
        make_part: Makes a rank's part of the result without the other ranks, as files that `run` reuses. None: not possible.
    """

    name: str
    needs: tuple[str, ...]
    identity: dict
    run: Callable[[Experiment, Topology, Path], str]
    target: int = 1
    trains: bool = False
    parallel: bool = True
    appends: bool = False
    as_requested: Callable[[Path, dict, dict], dict] | None = None
    adjustable: tuple[str, ...] = ()
    check: Callable[[Experiment], None] | None = None
    hints: dict[str, str] = field(default_factory=dict)
    describe: Callable[[Experiment], str] | None = None
    make_part: Callable[[Experiment, Topology, Path], None] | None = None


def beginning(config: Experiment) -> dict:
    """Returns the part of a training's identity that names the weights it begins with; {} for random weights."""
    return {"init_from": config.inputs.init_from} if config.inputs.init_from else {}


def initial_export(config: Experiment, stage: str) -> Path | None:
    """Returns the export that the training of a stage begins with; None for random weights.

    Raises:
        UserError: inputs.init_from holds no trained model.
    """
    if not config.inputs.init_from:
        return None
    exports = {path.parent.name: path for path in Path(config.inputs.init_from).glob("*/export")}
    if not exports:
        raise UserError(
            f"inputs.init_from: {config.inputs.init_from} holds no trained model. Name a run or a published folder."
        )
    return exports.get(stage)


def training(section: str, train: TrainConfig) -> dict:
    """Returns the arguments of Stage that all stages that train have in common.

    Args:
        section: Key of `train` in the stage's identity.
        train: The training.
    """
    return {"target": train.samples, "trains": True, "adjustable": tuple(f"{section}.{key}" for key in ADJUSTABLE)}


def artefact(config: Experiment, name: str) -> Path:
    """Returns the directory of a stage's result, in this run or in the run that `inputs` names. For shards see `packed`."""
    other_run = getattr(config.inputs, name, None)
    if not other_run:
        return config.directory / name
    path = Path(other_run)
    return path / name if (path / name).is_dir() else path


def packed_locations(config: Experiment) -> list[str | Path]:
    """Returns the locations of the shards: in this run, or in the runs, folders and URLs that `inputs.shards` names."""
    if not config.inputs.shards:
        return [config.directory / "shards"]
    return [p if is_remote(p) or not (Path(p) / "shards").is_dir() else Path(p) / "shards" for p in config.inputs.shards]


def packed(config: Experiment) -> Packed:
    """Opens the finished shards as one set. Raises UserError for sets that are unfinished or were packed differently."""
    return Packed(packed_locations(config), config.data.cache)


def shards_identity(config: Experiment) -> dict:
    """Returns the settings that this run's shards depend on."""
    return hpc_config.to_plain(config.data, volatile=False)


def shards_are_current(config: Experiment) -> bool:
    """Returns whether finished shards exist that fit the config. Shards that `inputs.shards` names always count as such."""
    if config.inputs.shards:
        return True
    shards = StageDir(config.directory / "shards", shards_identity(config), {}, as_requested=contents.as_requested)
    return shards.done() and not shards.differences()


def changed_images(config: Experiment) -> str:
    """Returns a sentence about images of the run that were added or changed since they were packed; "" if there are none."""
    return "" if config.inputs.shards else contents.news(config.directory / "shards", config.data)


def training_images(config: Experiment) -> int | None:
    """Returns the number of training images: of the packed shards, else about as many as the folder holds; None if unknown."""
    if config.inputs.shards or shards_are_current(config):
        return sum(packed(config).counts["train"].values())
    number = count_images(config.data.images)
    return round(number * (1 - config.data.val - config.data.test)) or None


def stage_dir_of(config: Experiment, stage: Stage) -> StageDir:
    """Returns the stage's directory in the run, with its settings and the digests of its inputs; None for a missing input."""
    inputs = {name: digest_of(config, name) for name in stage.needs}
    describe = partial(stage.describe, config) if stage.describe else None
    path, identity = config.directory / stage.name, stage.identity
    return StageDir(path, identity, inputs, stage.target, stage.as_requested, stage.adjustable, describe)


def size_of(build: Callable[[], nn.Module]) -> str:
    """Returns the size of a model as text, such as "2.0 M" parameters. Builds the model without memory for its weights."""
    with torch.device("meta"):
        number = sum(parameter.numel() for parameter in build().parameters())
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number / 1e3:.1f} k"


def digest_of(config: Experiment, name: str) -> str | None:
    """Returns the digest of an artefact, or None if it is not finished.

    Raises:
        UserError: `inputs.shards` names something else than shards, or a run that is not being made.
    """
    if name == "shards" and config.inputs.shards:
        return None if any(map(is_being_packed, packed_locations(config))) else packed(config).digest()
    record = rundir.read_stage_record(artefact(config, name))
    return record["digest"] if record and record["done"] else None


def is_being_packed(location: str | Path) -> bool:
    """Returns whether a location is a run of Slurm jobs, or its shards, and its shards are not finished yet."""
    if is_remote(location) or (Path(location) / manifest.NAME).exists():
        return False
    return any((path / "jobs" / "shards").is_dir() for path in (Path(location), Path(location).parent))


def require(config: Experiment, name: str, hint: str = "") -> Path:
    """Returns the directory of a finished artefact. Raises UserError, with the hint, if it is not finished."""
    path = artefact(config, name)
    if digest_of(config, name) is None:
        advice = "Run that stage first; `lesiongen run` runs all stages in order."
        raise UserError(f"{path} is not finished. {hint or advice}")
    return path


def decoder_stage(config: Experiment) -> str:
    """Returns the name of the stage whose decoder makes the images: polish if the run has it, otherwise tokenizer."""
    return "polish" if config.polish or config.inputs.polish else "tokenizer"


def model_stages(config: Experiment) -> tuple[str, ...]:
    """Returns the names of the stages whose models make samples: the tokenizer, its polished decoder, the priors."""
    return tuple(dict.fromkeys(("tokenizer", decoder_stage(config), *(f"prior-{level}" for level in config.levels))))


def load_decoder(config: Experiment, device: torch.device) -> tuple[Tokenizer, dict]:
    """Loads the tokenizer with the decoder that makes the images, as load_tokenizer() does.

    Raises:
        UserError: The decoder was polished for the codes of another tokenizer than the run's.
    """
    stage, tokenizer = decoder_stage(config), digest_of(config, "tokenizer")
    path = require(config, stage)
    net, about = load_tokenizer(path, device)
    if stage == "polish" and about.get("polished") != tokenizer:
        made_for = about.get("polished") or "none: it is no polished decoder"
        raise UserError(
            f"{path} decodes the codes of tokenizer {made_for}. This run's tokenizer is {tokenizer}. Polish again (--fresh "
            "polish), or set inputs.polish and inputs.tokenizer to a run that has polished its tokenizer."
        )
    return net.to(memory_format=torch.channels_last), about  # the fastest layout for convolutions


def load_priors(config: Experiment, device: torch.device) -> dict[str, tuple[Prior, dict]]:
    """Loads the prior of each level, coarse to fine, as load_prior() does.

    Raises:
        UserError: A prior was trained on the codes of another tokenizer than the run's.
    """
    priors, tokenizer = {}, digest_of(config, "tokenizer")
    for level in config.levels:
        priors[level] = load_prior(require(config, f"prior-{level}"), device)
        made_for = priors[level][1]["tokenizer"]
        if made_for != tokenizer:
            raise UserError(
                f"prior-{level} was trained on codes of tokenizer {made_for}, but this run's tokenizer is {tokenizer}. Train "
                "the prior on this tokenizer's codes, or set inputs.tokenizer."
            )
    return priors


def check_codes(config: Experiment, store: CodeStore) -> None:
    """Raises UserError if the codes were made by another tokenizer or from other shards than the run's, or have changed.

    Only the tokenizer that made the codes can decode them, and only the shards that they were made from tell which images are
    held out.
    """
    if hpc_config.digest(store.manifest) != digest_of(config, "codes"):
        raise UserError(f"{store.folder / manifest.NAME} has changed since the codes were made. Restore it, or encode again.")
    for name, made_from in (("tokenizer", store.manifest["tokenizer"]), ("shards", store.manifest["image_shards"])):
        present = digest_of(config, name)
        if present not in (made_from, None):
            raise UserError(
                f"The codes in {store.folder} were made from {name} {made_from}, but this run has {name} {present}. Encode "
                f"again (--fresh codes), or set inputs.{name} to the {name} that the codes were made from."
            )


def execute(
    config: Experiment,
    stage: Stage,
    topology: Topology,
    stage_dir: StageDir | None = None,
    lock_wait_s: float = rundir.QUIET_WAIT_S,
) -> None:
    """Runs a stage unless it is done. Collective.

    Rank 0 checks and locks the directory, records the settings before the work and the digest after it.

    Args:
        config: The run's config.
        stage: The stage to run.
        topology: This process among the ranks.
        stage_dir: Directory of a result outside the run. None for the stage's directory in the run.
        lock_wait_s: Seconds to wait for another process that works in the directory.

    Raises:
        UserError: An input is missing, or the directory was made from other settings.
        Busy: Another process works in the directory.
    """
    dist.init(topology, config.local.join_seconds)
    for name in stage.needs:
        if name == "shards" and config.inputs.shards:
            dist.run_on_leader(packed(config).refuse_leaks)
        else:
            dist.run_on_leader(require, config, name, stage.hints.get(name, ""))
    config_yaml = hpc_config.to_yaml(config) if stage_dir is None else None  # only a run's own directory gets a config.yaml
    stage_dir = stage_dir or stage_dir_of(config, stage)
    dist.run_on_leader(stage_dir.check)
    if not stage.appends and dist.run_on_leader(stage_dir.done):
        return
    with contextlib.ExitStack() as resources:
        dist.run_on_leader(_open, resources, stage_dir, stage, config_yaml, lock_wait_s)
        watched = watchdog.watch(stage_dir.path, topology.rank, config.local.hang_minutes * 60, stage.name)
        resources.enter_context(watched)
        try:
            digest = stage.run(config, topology, stage_dir.path)
        except BaseException as error:
            if topology.leader and not stage.appends:
                _record_ending(stage_dir, error)
            raise
        dist.run_on_leader(stage_dir.finish, digest)


def _record_ending(stage_dir: StageDir, error: BaseException) -> None:
    """Records in stage.json why a stage has ended before it was done."""
    if isinstance(error, Diverged):
        stage_dir.mark_diverged(str(error))
    how = "stopped" if isinstance(error, (Stopped, KeyboardInterrupt)) else "failed"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:500]
    with contextlib.suppress(OSError):  # the disk may be full
        stage_dir.mark_ended(how, reason)


def _open(
    resources: contextlib.ExitStack, stage_dir: StageDir, stage: Stage, config_yaml: str | None, lock_wait_s: float
) -> None:
    """Locks the directory until `resources` is closed, and records the stage's settings and inputs in stage.json."""
    resources.enter_context(rundir.lock(stage_dir.path, lock_wait_s))
    rundir.remove_leftovers(stage_dir.path)
    if not stage.appends:
        stage_dir.begin(config_yaml)
