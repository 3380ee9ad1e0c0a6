"""Samples in a directory that is no stage of the run: made on this machine, or by Slurm jobs."""

import math
from dataclasses import replace
from pathlib import Path

from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run import rundir
from hpc.run.rundir import StageDir
from launch.before_queue import check_before_queue, refuse_queued
from launch.cluster import ClusterConfig
from launch.executors import Submission
from launch.rank import run_stage
from lesiongen.experiment import Experiment
from lesiongen.stages import sample
from lesiongen.stages.base import require, stage_dir_of


def sample_into(config: Experiment, folder: Path, fresh: bool = False) -> None:
    """Samples on this machine.

    Args:
        config: The run's config, in which `sample` holds the settings to use.
        folder: Directory of the samples.
        fresh: Delete the directory first.
    """
    if fresh:
        _directory(config, folder).delete()
    run_stage(config, sample.stage(config), Topology(), _directory(config, folder))


def submit_samples(config: Experiment, folder: Path, cluster: ClusterConfig, tasks: int = 0, fresh: bool = False) -> None:
    """Submits Slurm jobs that sample, and prints their ids. The images do not depend on the number of ranks or tasks.

    Args:
        config: The run's config, in which `sample` holds the settings to use.
        folder: Directory of the samples, in the run.
        cluster: The cluster file's content.
        tasks: Tasks of an array that makes parts of the samples before the job that finishes them; at most one for each batch.
        fresh: Delete the directory first.

    Raises:
        UserError: Something that the jobs need is missing, or jobs already work on the directory.
    """
    if folder.absolute().parent != config.directory.absolute():
        raise UserError(f"--out {folder} is not in the run {config.directory}, where jobs write. Leave --out out.")
    stage = sample.stage(config)
    for name in stage.needs:
        require(config, name, stage.hints.get(name, ""))
    check_before_queue(config, [stage], cluster)
    refuse_queued(config, [folder.name, f"{folder.name}-parts"])
    if fresh:
        _directory(config, folder).delete()
    # A batch is not divided, so more tasks would have nothing to do.
    tasks = min(tasks, math.ceil(config.sample.number / config.sample.batch / cluster.resources(stage).ranks))
    if tasks > 1:
        begin_directory(config, folder)
    for name, job in Submission(config, cluster).samples(stage, folder, tasks).items():
        print(f"{name} job {job}" + (f", {tasks} tasks" if name != folder.name else ""))
    print(f"watch: lesiongen status {config.directory}")


def begin_directory(config: Experiment, folder: Path) -> None:
    """Records what will be sampled into a directory, before several jobs make parts of it.

    Raises:
        UserError: The directory holds other samples, or is finished.
    """
    with rundir.lock(folder):
        if _directory(config, folder).done():
            raise UserError(f"{folder} holds these samples already. To make them again, add --fresh samples.")
        _directory(config, folder).begin()


def _directory(config: Experiment, folder: Path) -> StageDir:
    """Returns the directory with what its samples must be made from."""
    return replace(stage_dir_of(config, sample.stage(config)), path=folder)
