"""The verb `clean`: finds what a run can do without, and deletes it if the user asks for it.

Models, codes, shards, samples, logs and the report are never touched.
"""

import shutil
from pathlib import Path

from hpc.run import rundir
from launch.pipeline import stage_statuses
from lesiongen.evaluation.feature_cache import FEATURES_FOLDER
from lesiongen.experiment import Experiment

CHECKPOINTS = "checkpoints of a finished training; without them it cannot be trained for longer"
FEATURES = "features of images, and classifiers, which an evaluation makes again"


def removable(config: Experiment) -> dict[Path, str]:
    """Returns the folders that the run can do without, each with what it is."""
    found = {}
    for status in stage_statuses(config):
        if status.stage.trains and status.state == "done":
            found[config.directory / status.stage.name / "checkpoints"] = CHECKPOINTS
    for folder in (config.directory, config.directory / "shards", config.directory / "codes"):
        found[folder / FEATURES_FOLDER] = FEATURES
    return {path: what for path, what in found.items() if path.is_dir()}


def size_of(folder: Path) -> int:
    """Returns the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def clean(config: Experiment, delete: bool) -> str:
    """Lists what the run can do without, and deletes it if `delete` is true.

    Returns:
        Lines for the user: the size, path and meaning of each folder, and the sum.

    Raises:
        Busy: Another process works on one of the stages.
    """
    lines, total = [], 0
    for path, what in removable(config).items():
        size = size_of(path)
        total += size
        lines.append(f"  {size / 1e6:10,.1f} MB  {path}: {what}")
        if delete:
            with rundir.lock(path.parent, rundir.QUIET_WAIT_S):
                shutil.rmtree(path)
    if not lines:
        return "There is nothing to delete."
    ending = "deleted" if delete else "can be deleted; to do so, add --delete"
    return "\n".join([*lines, f"  {total / 1e6:10,.1f} MB  {ending}"])
