"""pack: a folder of images and their metadata → shards/. The work is done in lesiongen/ingest/packing.py."""

from pathlib import Path

from hpc.data.storage import is_remote
from hpc.dist import Topology
from hpc.errors import UserError
from lesiongen.experiment import Experiment
from lesiongen.ingest import contents
from lesiongen.ingest.packing import pack
from lesiongen.stages.base import Stage, shards_identity


def stage(config: Experiment) -> Stage:
    """Returns the stage that packs the images of `config.data`."""
    return Stage(
        "shards",
        (),
        shards_identity(config),
        run,
        as_requested=contents.as_requested,
        check=_check,
        describe=lambda config: f"{config.data.size} px",
    )


def _check(config: Experiment) -> None:
    """Raises UserError if a file or folder that the config names does not exist."""
    for key in ("images", "metadata", "splits"):
        path = getattr(config.data, key)
        if path and not is_remote(path) and not Path(path).exists():
            raise UserError(f"data.{key}: {path} does not exist. Correct data.{key}.")


def appending(identity: dict) -> Stage:
    """Returns the stage that adds new images to a finished set.

    Args:
        identity: The settings in the record of the finished set, which stay as they are.
    """
    return Stage("shards", (), identity, run_append, appends=True)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    """Packs the images into `folder` and returns the digest of the manifest. Collective."""
    return pack(config.data, folder, topology)


def run_append(config: Experiment, topology: Topology, folder: Path) -> str:
    """Adds new images to the set in `folder` and returns the new digest of the manifest. Collective."""
    return pack(config.data, folder, topology, append=True)
