"""One stage on this rank: run it, follow it in MLflow, and turn every kind of ending into its exit code."""

import os

from hpc import dist, errors
from hpc.dist import Topology
from hpc.run import mlflow_sync
from hpc.run.rundir import StageDir
from hpc.train import allocator, preempt
from launch.endings import code_of, explain
from lesiongen.experiment import Experiment
from lesiongen.stages import stages
from lesiongen.stages.base import Stage, execute


def run_stage(config: Experiment, stage: Stage, topology: Topology, stage_dir: StageDir | None = None) -> None:
    """Runs a stage on this rank; rank 0 follows the run in MLflow meanwhile. Raises what the stage raises. Collective.

    Args:
        config: The run's config.
        stage: The stage to run.
        topology: This process among the ranks.
        stage_dir: A directory outside the run for the result; nothing is sent to MLflow then.
    """
    allocator.keep_pages(topology.device)
    uri = mlflow_sync.default_uri(config.directory)
    # SQLite breaks on the parallel file systems of clusters. There `lesiongen ui` reads metrics.jsonl instead.
    follows = stage_dir is None and topology.leader and (uri.startswith("http") or not on_slurm())
    follower = mlflow_sync.Follower(config.directory, uri) if follows else None
    try:
        execute(config, stage, topology, stage_dir)
    finally:
        if follower:
            follower.close()


def on_slurm() -> bool:
    """Whether this process is a task of a Slurm job."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_PROCID" in os.environ


def rank_main(config: Experiment, name: str, topology: Topology) -> int:
    """Runs a stage as a rank that an executor started. Returns the exit code.

    Args:
        config: The run's config.
        name: The stage's name.
        topology: This process among the ranks.
    """
    with preempt.Interruptible() as interruptible:
        try:
            run_stage(config, stages(config)[name], topology)
            dist.leave()
            return errors.DONE
        except BaseException as error:
            # A signal that arrived inside a library's import may come out as any other error, such as ImportError.
            cause = KeyboardInterrupt() if interruptible.signalled else error
            explain(cause)  # on every rank, as each has its own log
            return code_of(cause)
