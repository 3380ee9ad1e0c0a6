"""pack: a folder of images with its metadata → shards/."""

from pathlib import Path

from hpc.dist import Topology
from lesiongen.experiment import Experiment
from lesiongen.ingest.packing import pack
from lesiongen.stages.base import Stage, shards_identity


def stage(config: Experiment) -> Stage:
    """The stage that packs the images of `config.data`."""
    return Stage("shards", (), shards_identity(config), run)


def appending(config: Experiment, identity: dict) -> Stage:
    """The stage that adds new images to a finished set.

    Args:
        config: Where the new images are.
        identity: What the set was packed with, as its record says. It stays.
    """
    return Stage("shards", (), identity, run_append, appends=True)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    """Packs into `folder`. Returns the manifest's digest. Collective."""
    return pack(config.data, folder, topology)


def run_append(config: Experiment, topology: Topology, folder: Path) -> str:
    """Adds to the set in `folder`. Returns the manifest's new digest. Collective."""
    return pack(config.data, folder, topology, append=True)
