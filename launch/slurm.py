"""What the run asks of Slurm by its commands, and the jobs that were submitted for a run.

Works without Slurm's accounting, and where not every command is on PATH. Silence is no answer: a command that times out or
cannot reach Slurm never counts as "there is no such job".
"""

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hpc.run import journal
from hpc.run.rundir import location, was_copied

SUBMITTED = "submitted.jsonl"  # file in jobs/<stage>: one line per submitted job
NO_ANSWER = "(Slurm does not answer)"
GONE = "gone from the queue"
ACTIVE = ("PENDING", "RUNNING", "REQUEUE", "SUSPENDED", "COMPLETING", "CONFIGURING")  # states of a job that is not over
NOT_FOUND = 127  # exit code of a command that is not installed, as in a shell
UNREACHABLE = re.compile(r"unable to contact|timed out|connection refused|not responding", re.IGNORECASE)


def inside_job() -> bool:
    """Returns whether this process is a task of a Slurm job."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_PROCID" in os.environ


@contextlib.contextmanager
def without_allocation() -> Iterator[None]:
    """Removes Slurm's variables from the environment inside the block, except SLURM_CONF.

    A shell inside an allocation has them, and sbatch hands them to the new job, where they contradict its own request.
    """
    inherited = {k: v for k, v in os.environ.items() if k.startswith(("SLURM_", "SLURMD_", "SBATCH_", "SRUN_"))}
    removed = {k: v for k, v in inherited.items() if k != "SLURM_CONF"}
    for name in removed:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ |= removed


def find_command(name: str) -> str | None:
    """Returns the path of a Slurm command: from PATH, otherwise beside the real file of srun or sbatch. None if not found."""
    beside = (os.path.dirname(os.path.realpath(path)) for path in map(shutil.which, ("srun", "sbatch")) if path)
    return shutil.which(name) or next((found for folder in beside if (found := shutil.which(name, path=folder))), None)


def run(name: str, *arguments: str, timeout_s: float = 60, text: str | None = None) -> subprocess.CompletedProcess:
    """Runs a Slurm command. Never raises: if the command is missing or hangs, stderr of the result says so.

    Args:
        name: The command, such as "scontrol".
        *arguments: Its arguments.
        timeout_s: Seconds after which the command is stopped.
        text: Text for the command's input.
    """
    path = find_command(name)
    if path is None:
        return subprocess.CompletedProcess(name, NOT_FOUND, "", f"{name} is not installed here")
    try:
        with without_allocation():
            return subprocess.run([path, *arguments], input=text, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(name, 124, "", f"{name} timed out after {timeout_s:.0f} s")
    except OSError as error:
        return subprocess.CompletedProcess(name, 126, "", f"{name}: {error.strerror}")


def unreachable(answer: subprocess.CompletedProcess) -> bool:
    """Returns whether a command got no answer from Slurm, as opposed to a refusal."""
    return bool(answer.returncode and re.search(UNREACHABLE, answer.stderr))


def job_state(job: str, timeout_s: float = 10) -> str:
    """Asks Slurm for the state of a job, by scontrol, otherwise by squeue. An array runs as long as one of its tasks does.

    Args:
        job: The job's id.
        timeout_s: Seconds to wait for each of the commands.

    Returns:
        Slurm's word, such as "RUNNING on node1", "PENDING (Dependency)" or "TIMEOUT"; GONE if Slurm no longer knows the job;
        NO_ANSWER if Slurm does not answer; "" if Slurm is not installed here.
    """
    if not any(map(find_command, ("scontrol", "squeue", "sbatch"))):
        return ""
    questions = (
        ("scontrol", "show", "job", job, "-o"),
        ("squeue", "-h", "-t", "all", "-j", job, "-o", "JobState=%T Reason=%r NodeList=%N"),
    )
    for question in questions:
        answer = run(*question, timeout_s=timeout_s)
        if states := [state for line in answer.stdout.splitlines() if (state := _state_in(line))]:
            return min(states, key=lambda state: (state[:7] != "RUNNING", not state.startswith(ACTIVE), state == "COMPLETED"))
        if answer.returncode == 0 or "Invalid job id" in answer.stderr:
            return GONE
        if answer.returncode != NOT_FOUND:
            break
    return NO_ANSWER


def _state_in(line: str) -> str:
    """Returns the state of a job from a line of Slurm's answer; "" if the line has none."""
    state, reason, nodes = (re.search(rf"\b{key}=(\S+)", line) for key in ("JobState", "Reason", "NodeList"))
    if not state:
        return ""
    waiting = f" ({reason[1]})" if state[1] == "PENDING" and reason else ""
    return state[1] + waiting + (f" on {nodes[1]}" if state[1] == "RUNNING" and nodes else "")


def job_states(jobs: list[str]) -> dict[str, str]:
    """Asks Slurm for the state of several jobs at once, so that a slow Slurm is waited for only once.

    Returns:
        For each job what job_state() returns.
    """
    with ThreadPoolExecutor(max(1, len(jobs))) as threads:
        return dict(zip(jobs, threads.map(job_state, jobs), strict=True))


def record_job(run_dir: Path, stage: str, job: str, after: list[str], instead_of: str | None = None) -> None:
    """Records a submitted job, with the run directory that it works on.

    Args:
        run_dir: The run directory.
        stage: The stage's name.
        job: The job's id.
        after: Ids of the jobs that it waits for.
        instead_of: Id of the job that it replaces, if any.
    """
    entry = {"job": job, "after": after, "time": time.time(), "directory": location(run_dir)}
    journal.append(run_dir / "jobs" / stage / SUBMITTED, entry | ({"instead_of": instead_of} if instead_of else {}))


def submitted_jobs(run_dir: Path, stage: str) -> list[dict]:
    """Returns the records of the jobs that were submitted for a stage of this directory, oldest first.

    A copy of a run directory also holds the records of the original's jobs. They are left out.

    Args:
        run_dir: The run directory.
        stage: The stage's name.
    """
    records = journal.read(run_dir / "jobs" / stage / SUBMITTED, "job")
    return [record for record in records if "directory" not in record or not was_copied(run_dir, record["directory"])]


def last_job(run_dir: Path, stage: str) -> str | None:
    """Returns the id of the last job that was submitted for a stage of this directory; None without a job."""
    jobs = submitted_jobs(run_dir, stage)
    return jobs[-1]["job"] if jobs else None


def active_jobs(run_dir: Path, stages: Iterable[str]) -> dict[str, str]:
    """Returns the last job of each of these stages that may still be queued or running: {stage: job id}."""
    last = {stage: last_job(run_dir, stage) for stage in stages}
    return {stage: job for stage, job in last.items() if job and may_be_running(job)}


def may_be_running(job: str) -> bool:
    """Returns whether a job is queued or running, or could be because Slurm does not answer."""
    return job_state(job).startswith((*ACTIVE, NO_ANSWER))
