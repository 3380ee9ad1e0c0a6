"""The verbs `status`, `logs` and `cancel`: they read a run directory, and ask Slurm about its jobs.

Without Slurm, or when Slurm does not answer, the run directory alone is shown. Slurm's accounting is not needed.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

from hpc import errors
from hpc.errors import UserError
from hpc.run import journal, metrics_log, mlflow_address, rundir
from launch import requeue, slurm
from launch.pipeline import duration, held_out_metrics, stage_statuses
from lesiongen.experiment import Experiment
from lesiongen.stages.base import changed_images

WATCH_S, FOLLOW_S = 5.0, 1.0  # seconds between two looks of `status --watch`, of `logs -f`
RECENT = 20  # lines of a metrics log that tell a training's speed
LINE = 110  # characters of a log's line in the table
TAIL_BYTES = 100_000  # of a log are read


def format_status(config: Experiment) -> str:
    """Returns a table of the run's stages, and how to see the run in MLflow.

    A stage's line has its state, its progress, the time that it still needs, its held-out metrics, its job with what Slurm says
    of it, and how its last attempt ended. Below are, while it is unfinished, why it ended and the last line of its log, and its
    alarms, such as a collapsing codebook.
    """
    statuses = stage_statuses(config)
    last = {status.stage.name: slurm.last_job(config.directory, status.stage.name) for status in statuses}
    jobs = {name: job for name, job in last.items() if job}
    states = slurm.job_states(list(jobs.values()))
    lines = [f"{config.name}   {config.directory}"]
    for status in statuses:
        name, folder = status.stage.name, config.directory / status.stage.name
        bar = "█" * round(status.progress * 20)
        parts = [status.detail or held_out_metrics(config, name)]
        if status.state == "started":
            parts += [time_left(folder, status.stage.target), age_of_metrics(folder)]
        if name in jobs:
            parts.append(f"job {jobs[name]} {states[jobs[name]]}".strip())
        if name in jobs and status.state != "done":
            parts += [last_ending(config.directory / "jobs" / name)]
        lines.append(f"  {name:<14} {status.state:<8} {bar:<20} {status.progress:4.0%}  " + "  ".join(filter(None, parts)))
        if status.state == "started" and (ended := (rundir.read_stage_record(folder) or {}).get("ended")):
            lines.append(f"{'':17}{ended['how']}: {ended['reason'][:LINE]}")
        if status.state in ("started", "diverged") and (said := last_line(config, name)):
            lines.append(f"{'':17}{said}")
        lines += [f"{'':17}{entry['kind']}: {entry['text']}" for entry in metrics_log.read_alarms(folder)]
    lines += [f"  {line}" for line in other_jobs(config, [status.stage.name for status in statuses])]
    if news := changed_images(config):
        lines.append(f"  {news}")
    link = mlflow_address.run_link(config.directory, mlflow_address.default_uri(config.directory))
    lines.append(f"  MLflow: {link or f'nothing sent yet; to see the run: lesiongen ui --runs {config.directory.parent}'}")
    return "\n".join(lines)


def other_jobs(config: Experiment, stages: list[str]) -> list[str]:
    """Returns a line for each job that runs no stage: the checks of the nodes, and jobs that sample into other directories."""
    folders = sorted(path.parent.name for path in config.directory.glob(f"jobs/*/{slurm.SUBMITTED}"))
    jobs = {name: job for name in folders if name not in stages and (job := slurm.last_job(config.directory, name))}
    states, lines = slurm.job_states(list(jobs.values())), []
    for name, job in jobs.items():
        record = rundir.read_stage_record(config.directory / name) or {}
        images = sum(1 for _ in (config.directory / name / "images").rglob("*.png"))
        made = "done" if record.get("done") else f"{images:,} images" if images else ""
        lines.append(f"{name}  " + "  ".join(filter(None, (made, f"job {job} {states[job]}".strip()))))
    return lines


def watch(config: Experiment) -> None:
    """Prints the table again and again, until every stage is done or the user presses Ctrl-C."""
    clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else ""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            print(f"{clear}{time.strftime('%H:%M:%S')}  {format_status(config)}", flush=True)
            if all(status.state == "done" for status in stage_statuses(config)):
                return
            time.sleep(WATCH_S)


def time_left(folder: Path, target: int) -> str:
    """Returns how long a training still needs at its recent speed, such as "12 min left"; "" if that is not known."""
    rows = metrics_log.read_metrics(folder)[-RECENT:]
    if len(rows) < 2 or rows[-1]["samples"] <= rows[0]["samples"] or rows[-1].get("time", 0) <= rows[0].get("time", 0):
        return ""
    seconds = (rows[-1]["time"] - rows[0]["time"]) / (rows[-1]["samples"] - rows[0]["samples"]) * (target - rows[-1]["samples"])
    return f"{duration(seconds)} left" if seconds > 0 else ""


def age_of_metrics(folder: Path) -> str:
    """Returns how old the last line of a stage's metrics log is, as text; "" without a log."""
    path = folder / metrics_log.METRICS_FILE
    return f"(last metrics {duration(max(0.0, time.time() - path.stat().st_mtime))} ago)" if path.exists() else ""


def last_ending(folder: Path) -> str:
    """Returns how the last attempt of a stage's jobs ended, such as "last attempt: diverged (code 77)"; "" if none has ended.

    Args:
        folder: The stage's directory in jobs/.
    """
    attempts = journal.read(folder / requeue.ATTEMPTS, "attempt", "kind", "code")
    if not attempts:
        return ""
    code = attempts[-1]["code"]
    return f"last attempt: {errors.IN_WORDS.get(code, attempts[-1]['kind'])} (code {code})"


def last_line(config: Experiment, stage: str) -> str:
    """Returns the last line of a stage's newest log, cut to the width of a terminal; "" without a log."""
    files = log_files(config, stage)
    lines = tail(files[-1], 1) if files else []
    return lines[0][:LINE] if lines else ""


def log_files(config: Experiment, stage: str | None) -> list[Path]:
    """Returns the log files of a stage, or of every stage, that hold something, oldest first."""
    files = (path for path in (config.directory / "jobs").glob(f"{stage or '*'}/*") if path.suffix in (".out", ".err", ".log"))
    return sorted((path for path in files if path.stat().st_size), key=lambda path: path.stat().st_mtime)


def tail(path: Path, lines: int) -> list[str]:
    """Returns the last lines of a log, of which the end is read. A progress bar writes a line each time that it moves."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        text = file.read().decode(errors="replace").replace("\r", "\n")
    return [line for line in text.splitlines() if line.strip()][-lines:]


def newest_logs(config: Experiment, stage: str | None, lines: int = 40) -> str:
    """Returns the last lines of the two newest log files.

    Args:
        config: The run's config.
        stage: The stage whose logs to read. None for those of every stage.
        lines: Number of lines of each file.

    Raises:
        UserError: There is no log.
    """
    files = log_files(config, stage)[-2:]
    if not files:
        raise UserError(
            f"{config.directory / 'jobs'} holds no logs{f' of {stage}' if stage else ''} yet. A stage that runs in one process "
            "on this machine writes to the terminal."
        )
    return "\n\n".join(f"==> {os.path.relpath(path)} <==\n" + "\n".join(tail(path, lines)) for path in files)


def follow_logs(config: Experiment, stage: str | None) -> None:
    """Prints what is added to the log files, also to new ones, until the user presses Ctrl-C. Arguments as newest_logs()."""
    ends = {path: path.stat().st_size for path in log_files(config, stage)}
    shown = None
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            for path in log_files(config, stage):
                with open(path, "rb") as file:
                    file.seek(ends.get(path, 0))
                    added = file.read().decode(errors="replace")
                    ends[path] = file.tell()
                if added:
                    header = "" if path == shown else f"\n==> {os.path.relpath(path)} <==\n"
                    print(header + added.replace("\r", "\n"), end="", flush=True)
                    shown = path
            time.sleep(FOLLOW_S)


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
    active = [job for job in submitted if slurm.may_be_running(job)]
    if active:
        answer = slurm.run("scancel", *active)
        if answer.returncode:
            raise UserError(f"scancel failed: {answer.stderr.strip()}")
    return active
