"""Checks before jobs are queued, for mistakes that would otherwise appear only after hours in the queue."""

import contextlib
import shutil

from hpc.errors import UserError
from hpc.run import metrics_log
from launch import cost, slurm
from launch.cluster import ClusterConfig
from lesiongen.experiment import Experiment, check_ranks
from lesiongen.stages.base import Stage


def check_before_queue(config: Experiment, todo: list[Stage], cluster: ClusterConfig, dry: bool = False) -> None:
    """Checks for mistakes that would otherwise appear only after hours in the queue.

    Args:
        config: The run's config.
        todo: The stages that are about to be submitted.
        cluster: The cluster file's content.
        dry: Whether the batch scripts are only printed, so that Slurm need not be installed.

    Raises:
        UserError: Slurm is not installed here, or the batch of a training does not divide among its ranks.
    """
    if not dry and not shutil.which("sbatch"):
        raise UserError("There is no sbatch on this machine. Submit from a login node of the cluster, or print with --dry.")
    for stage in todo:
        if stage.trains:
            section, train = config.trainings[stage.name]
            check_ranks(train, cluster.resources(stage).ranks, section)
    if not dry:
        for line in warn_of_short_signals(config, todo, cluster.signal_seconds):
            print(line)


def refuse_queued(config: Experiment, names: list[str]) -> None:
    """Raises UserError while jobs of these names may still run: only one job at a time may write a directory."""
    if busy := slurm.active_jobs(config.directory, names):
        jobs = ", ".join(f"{name} (job {job})" for name, job in busy.items())
        raise UserError(
            f"Jobs of this run are still in the queue, or Slurm does not answer: {jobs}. Wait for them, or run "
            "`lesiongen cancel` first."
        )


def warn_of_short_signals(config: Experiment, todo: list[Stage], signal_seconds: int) -> list[str]:
    """Returns a warning for each training that may need longer to save than the time between the signal and the limit.

    A save is expected to take as long as the slowest that an earlier job has logged; before the first, as long as the plan
    computes (launch/cost.py).

    Args:
        config: The run's config.
        todo: The stages that are about to be submitted.
        signal_seconds: That time in seconds.
    """
    plans: dict[str, cost.Training] = {}
    with contextlib.suppress(UserError):  # without the plan, the general minimum holds
        plans = {training.name: training for training in cost.trainings(config)}
    lines = []
    for stage in (stage for stage in todo if stage.trains):
        rows = metrics_log.read_metrics(config.directory / stage.name)
        saves = [row["checkpoint_seconds"] for row in rows if "checkpoint_seconds" in row]
        _, train = config.trainings[stage.name]
        step = max((train.batch / row["images_per_second"] for row in rows if row.get("images_per_second")), default=0.0)
        if not saves and stage.name in plans:
            saves = [cost.checkpoint_bytes(plans[stage.name]) / config.hardware.disk_gb_per_s / 1e9]
        needed = max(120.0, 3 * max(saves, default=0.0) + step)
        if signal_seconds < needed:
            lines.append(
                f"WARNING: {stage.name}: a step and a save may need more than signal_seconds={signal_seconds}. Set at least "
                f"{needed:.0f} in the cluster file, or the job may be killed before it has saved."
            )
    return lines
