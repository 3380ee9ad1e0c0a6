"""status, logs, cancel: read the run directory; ask Slurm where it answers."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from hpc.errors import UserError
from hpc.run import journal, metrics_log, mlflow_sync
from launch.executors import SUBMITTED
from launch.pipeline import standings
from lesiongen.experiment import Experiment, load

SILENT = "(Slurm does not answer)"


def load_run(run: str) -> Experiment:
    """A run by its directory, or by its config's path. Raises UserError for neither."""
    path = Path(run)
    if path.is_file():
        return load(run)
    if not (path / "config.yaml").exists():
        raise UserError(f"{run} is no run directory (it has no config.yaml). Give runs/NAME, or the config's path.")
    return load(str(path / "config.yaml"), [f"runs={path.resolve().parent}"])


def show(config: Experiment) -> str:
    """A table of stages: state, progress, held-out figures, jobs; and where MLflow shows it."""
    lines = [f"{config.name}   {config.directory}"]
    for one in standings(config):
        bar = "█" * round(one.progress * 20)
        job = last_job(config.directory, one.stage.name)
        text = f"  {one.stage.name:<14} {one.state:<8} {bar:<20} {one.progress:4.0%}  "
        text += one.detail or figures(config, one.stage.name)
        lines.append(text + (f"  job {job['job']} {job_state(job['job'])}" if job else ""))
        if one.state == "started" and (age := seconds_since_last_line(config.directory / one.stage.name)) is not None:
            lines[-1] += f"  (last line {age:.0f} s ago)"
    seen = mlflow_sync.link(config.directory, mlflow_sync.default_uri(config.directory))
    lines.append(f"  MLflow: {seen or f'nothing sent yet; see it with: lesiongen ui --runs {config.directory.parent}'}")
    return "\n".join(lines)


def figures(config: Experiment, stage: str) -> str:
    latest: dict[str, float] = {}
    for row in metrics_log.read_metrics(config.directory / stage):
        latest |= {k: v for k, v in row.items() if k.startswith("val/")}
    shown = [f"{k[4:]} {v:.3g}" for k, v in latest.items() if re.match(r"val/(psnr|usage|bits_per_token|bigram)", k)]
    return "  ".join(shown[:4])


def seconds_since_last_line(folder: Path) -> float | None:
    path = folder / metrics_log.METRICS
    return time.time() - path.stat().st_mtime if path.exists() else None


def last_job(run: Path, stage: str) -> dict | None:
    jobs = journal.read(run / "jobs" / stage / SUBMITTED)
    return jobs[-1] if jobs else None


def job_state(job: str) -> str:
    """Slurm's word for a job's state, without accounting; "" where there is no Slurm, "gone" for one it has forgotten."""
    if not shutil.which("scontrol"):
        return ""
    try:
        done = subprocess.run(["scontrol", "show", "job", job, "-o"], capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return SILENT
    state = re.search(r"JobState=(\S+)", done.stdout)
    reason = re.search(r"Reason=(\S+)", done.stdout)
    if not state:
        return "gone from the queue"
    return state[1] + (f" ({reason[1]})" if state[1] == "PENDING" and reason else "")


def may_be_running(job: str) -> bool:
    """Whether it may still run; a Slurm that does not answer may have it."""
    return job_state(job).startswith(("PENDING", "RUNNING", "REQUEUE", "SUSPENDED", "COMPLETING", "CONFIGURING", SILENT))


def logs(config: Experiment, stage: str | None, lines: int = 40) -> str:
    """The ends of the newest log files of a stage, or of the stage that wrote last."""
    folder = config.directory / "jobs"
    files = [p for p in folder.glob(f"{stage or '*'}/*") if p.suffix in (".out", ".err", ".log")]
    files = sorted((p for p in files if p.stat().st_size), key=lambda p: p.stat().st_mtime)[-2:]
    if not files:
        raise UserError(f"{folder} holds no logs{f' of {stage}' if stage else ''} yet; inline runs speak to the terminal.")
    parts = []
    for path in files:
        text = path.read_text(errors="replace").replace("\r", "\n").splitlines()[-lines:]
        parts.append(f"==> {os.path.relpath(path)} <==\n" + "\n".join(text))
    return "\n\n".join(parts)


def cancel(config: Experiment) -> list[str]:
    """Cancels the run's jobs that Slurm still has; returns their ids."""
    ids = [j["job"] for p in (config.directory / "jobs").glob(f"*/{SUBMITTED}") for j in journal.read(p)]
    living = [i for i in ids if may_be_running(i)]
    if living:
        done = subprocess.run(["scancel", *living], capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise UserError(f"scancel failed: {done.stderr.strip()}")
    return living
