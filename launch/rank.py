"""Runs one stage in this process, which is one rank of the stage.

`rank_main` and `run_stage` are collective: every rank of the stage calls them. Executors (launch/executors.py, launch/job.py)
call `rank_main`, which turns every outcome into an exit code. Code that runs a stage outside a run calls `run_stage`.
"""

from dataclasses import replace
from pathlib import Path

from hpc import dist, errors, watchdog
from hpc.dist import Topology
from hpc.run import mlflow_address, rundir
from hpc.run.mlflow_follower import Follower
from hpc.run.rundir import StageDir
from hpc.train import allocator, math_modes, preempt
from launch import slurm
from launch.endings import exit_code_of, print_error
from lesiongen.experiment import Experiment
from lesiongen.stages import stages
from lesiongen.stages.base import Stage, execute, stage_dir_of

# A job waits longer for a stage's lock: the lock of a node that has died is freed when the file system gives that node up.
JOB_LOCK_WAIT_S = 300.0


def run_stage(config: Experiment, stage: Stage, topology: Topology, stage_dir: StageDir | None = None) -> None:
    """Runs a stage on this rank, while a thread of rank 0 sends the run's metrics to MLflow. Collective.

    Args:
        config: The run's config.
        stage: The stage to run.
        topology: This process among the ranks.
        stage_dir: Directory for a result outside the run; nothing is sent to MLflow then. None for the stage's
            directory in the run.

    Raises:
        Exception: Whatever the stage raises.
    """
    _prepare(config, topology)
    uri = mlflow_address.default_uri(config.directory)
    # MLflow's default store is a SQLite file, and SQLite breaks on the parallel file systems of clusters. A Slurm job
    # therefore sends to an MLflow server only; without a server, `lesiongen ui` reads metrics.jsonl instead.
    sends_to_mlflow = stage_dir is None and topology.leader and (uri.startswith("http") or not slurm.inside_job())
    follower = Follower(config.directory, uri) if sends_to_mlflow else None
    try:
        execute(config, stage, topology, stage_dir, JOB_LOCK_WAIT_S if slurm.inside_job() else rundir.QUIET_WAIT_S)
    finally:
        if follower:
            follower.close()


def make_part(config: Experiment, stage: Stage, topology: Topology, stage_dir: StageDir) -> None:
    """Makes this rank's part of a stage's result, without the other ranks. The submitting process has written stage.json.

    Args:
        config: The run's config.
        stage: The stage.
        topology: This process among the ranks that divide the work.
        stage_dir: Directory of the result.

    Raises:
        UserError: The directory is for other settings or models.
        Busy: Another process makes or deletes the whole result.
    """
    _prepare(config, topology)
    dist.init(Topology(local_rank=topology.local_rank))  # a group of this process alone
    watched = watchdog.watch(stage_dir.path, topology.rank, config.local.hang_minutes * 60, stage.name)
    with rundir.lock(stage_dir.path, JOB_LOCK_WAIT_S, shared=True), watched:
        stage_dir.check_begun()
        stage.make_part(config, topology, stage_dir.path)


def _prepare(config: Experiment, topology: Topology) -> None:
    """Sets up this process for computing on its device."""
    if config.local.device == "cpu":
        dist.hide_gpus()
    allocator.keep_freed_memory(topology.device)
    math_modes.allow_tf32(topology.device)


def rank_main(config: Experiment, name: str, topology: Topology, out: Path | None = None, alone: bool = False) -> int:
    """Runs a stage as a rank that an executor started. Errors are printed, not raised.

    Args:
        config: The run's config.
        name: The stage's name.
        topology: This process among the ranks.
        out: Directory of the result; None for the stage's directory in the run.
        alone: Whether this rank makes its part of the result in `out` without the other ranks.

    Returns:
        The exit code.
    """
    with preempt.Interruptible() as interruptible:
        try:
            stage = stages(config)[name]
            stage_dir = replace(stage_dir_of(config, stage), path=out) if out else None
            if alone:
                make_part(config, stage, topology, stage_dir)
            else:
                run_stage(config, stage, topology, stage_dir)
            dist.leave()
            return errors.DONE
        except BaseException as error:
            # A signal during a library's import can surface as any other error, such as ImportError.
            cause = KeyboardInterrupt() if interruptible.signalled else error
            print_error(cause)  # on every rank, because each rank has its own log
            return exit_code_of(cause)
