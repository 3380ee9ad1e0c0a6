"""The verbs `status`, `logs` and `cancel`: they read a run directory, and ask Slurm about its jobs.

Without Slurm, or when Slurm does not answer, the run directory alone is shown. Slurm's accounting is not needed.
"""

import os
import re
import time
from pathlib import Path

from hpc.errors import UserError
from hpc.run import metrics_log, mlflow_sync
from launch import slurm
from launch.pipeline import stage_statuses
from lesiongen.experiment import Experiment
from lesiongen.stages.base import changed_images


def format_status(config: Experiment) -> str:
    """Returns a table of the run's stages with state, progress, held-out metrics and job, and how to see it in MLflow."""
    lines = [f"{config.name}   {config.directory}"]
    for status in stage_statuses(config):
        name = status.stage.name
        bar = "█" * round(status.progress * 20)
        line = f"  {name:<14} {status.state:<8} {bar:<20} {status.progress:4.0%}  "
        line += status.detail or held_out_metrics(config, name)
        if job := last_job(config.directory, name):
            line += f"  job {job['job']} {slurm.job_state(job['job'])}"
        if status.state == "started" and (age := seconds_since_last_metrics(config.directory / name)) is not None:
            line += f"  (last metrics {age:.0f} s ago)"
        lines.append(line)
    if news := changed_images(config):
        lines.append(f"  {news}")
    link = mlflow_sync.run_link(config.directory, mlflow_sync.default_uri(config.directory))
    lines.append(f"  MLflow: {link or f'nothing sent yet; to see the run: lesiongen ui --runs {config.directory.parent}'}")
    return "\n".join(lines)


def held_out_metrics(config: Experiment, stage: str) -> str:
    """Returns the latest values of a stage's main held-out metrics, at most four, as text.

    Args:
        config: The run's config.
        stage: The stage's name.
    """
    latest: dict[str, float] = {}
    for row in metrics_log.read_metrics(config.directory / stage):
        latest |= {k: v for k, v in row.items() if k.startswith("val/")}
    shown = [f"{k[4:]} {v:.3g}" for k, v in latest.items() if re.match(r"val/(loss|psnr|usage|bits_per_token|bigram)", k)]
    return "  ".join(shown[:4])


def seconds_since_last_metrics(folder: Path) -> float | None:
    """Returns the age of the last line in a stage's metrics log, None without a log."""
    path = folder / metrics_log.METRICS_FILE
    return max(0.0, time.time() - path.stat().st_mtime) if path.exists() else None


def last_job(run_dir: Path, stage: str) -> dict | None:
    """Returns the record of the last job that was submitted for a stage: {"job": id, …}. None without a job.

    Args:
        run_dir: The run directory.
        stage: The stage's name.
    """
    jobs = slurm.submitted_jobs(run_dir, stage)
    return jobs[-1] if jobs else None


def may_be_running(job: str) -> bool:
    """Returns whether a job is queued or running, or could be because Slurm does not answer."""
    active = ("PENDING", "RUNNING", "REQUEUE", "SUSPENDED", "COMPLETING", "CONFIGURING", slurm.NO_ANSWER)
    return slurm.job_state(job).startswith(active)


def newest_logs(config: Experiment, stage: str | None, lines: int = 40) -> str:
    """Returns the last lines of the two newest log files.

    Args:
        config: The run's config.
        stage: The stage whose logs to read. None for those of every stage.
        lines: Number of lines of each file.

    Raises:
        UserError: There is no log.
    """
    folder = config.directory / "jobs"
    files = [path for path in folder.glob(f"{stage or '*'}/*") if path.suffix in (".out", ".err", ".log")]
    files = sorted((path for path in files if path.stat().st_size), key=lambda path: path.stat().st_mtime)[-2:]
    if not files:
        raise UserError(
            f"{folder} holds no logs{f' of {stage}' if stage else ''} yet. A stage that runs in one process on this machine "
            "writes to the terminal."
        )
    parts = []
    for path in files:
        text = path.read_text(errors="replace").replace("\r", "\n").splitlines()[-lines:]
        parts.append(f"==> {os.path.relpath(path)} <==\n" + "\n".join(text))
    return "\n\n".join(parts)


def cancel(config: Experiment) -> list[str]:
    """Cancels the run's jobs that are queued or running.

    Args:
        config: The run's config.

    Returns:
        The ids of the cancelled jobs.

    Raises:
        UserError: scancel fails.
    """
    folders = [path.parent.name for path in config.directory.glob(f"jobs/*/{slurm.SUBMITTED}")]
    submitted = [record["job"] for stage in folders for record in slurm.submitted_jobs(config.directory, stage)]
    active = [job for job in submitted if may_be_running(job)]
    if active:
        answer = slurm.run("scancel", *active)
        if answer.returncode:
            raise UserError(f"scancel failed: {answer.stderr.strip()}")
    return active
