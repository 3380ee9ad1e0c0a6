"""The last line of a job's batch script: requeues a job whose ranks stopped early or failed, or ends the job.

This program runs outside the ranks, on the job's first node. So it also handles endings that no rank can report: a rank was
killed for lack of memory, crashed or hung. Slurm sees the job as running until this program ends, so the jobs that depend on
the job keep waiting.

The program reads srun's exit code, and the exit code of each rank from `endings.jsonl` in the job's directory. It lists
failures in `failures.jsonl` there, and ends the job after MAX_FAILURES failures without progress.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from hpc import errors
from hpc.run import journal

MAX_FAILURES = 3  # of one job without progress between them; preemptions are not counted
FINAL_CODES = (errors.USAGE, errors.DIVERGED)  # another attempt would end in the same way
# srun's exit codes if a signal killed a rank: while the rank was starting, or because the job's time was nearly up.
SIGNAL_CODES = tuple(128 + s for s in (signal.SIGUSR2, signal.SIGTERM, signal.SIGALRM))
ENDINGS, FAILURES = "endings.jsonl", "failures.jsonl"


def attempt_id() -> str:
    """Returns the id of this attempt of the job: "123.0", after a requeue "123.1"."""
    return f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"


def record_exit_code(folder: Path, code: int) -> None:
    """Records this rank's exit code for the batch script. srun reports only the greatest code of all ranks.

    Args:
        folder: The job's directory.
        code: The rank's exit code.
    """
    rank = int(os.environ.get("SLURM_PROCID", 0))
    journal.append(folder / ENDINGS, {"attempt": attempt_id(), "rank": rank, "code": code, "time": time.time()})


def requeue_unless_final(folder: Path, srun_code: int) -> int | None:
    """Requeues this job, unless another attempt would fail again or Slurm refuses. Prints the decision.

    Args:
        folder: The job's directory.
        srun_code: The exit code of srun.

    Returns:
        The exit code of the job. None if the job is in the queue again; Slurm then ends this attempt.
    """
    # Find out how the ranks ended: with a final error of any rank, otherwise with a stop of any rank, otherwise with a failure.
    codes = {e["code"] for e in journal.read(folder / ENDINGS) if e["attempt"] == attempt_id()}
    if not codes or srun_code in SIGNAL_CODES:  # a rank that was killed while it was starting has recorded nothing
        codes.add(srun_code)
    final = [code for code in FINAL_CODES if code in codes]
    # When one rank stops, other ranks may lose their connection to it and fail. The job still counts as stopped.
    stopped = not codes.isdisjoint((errors.RESUMABLE, *SIGNAL_CODES)) and not final
    code = final[0] if final else errors.RESUMABLE if stopped else max(codes)

    # Requeue the job or end it.
    failures = 0 if final or stopped else count_failures(folder, code)
    outcome = "stopped early" if stopped else f"failed with code {code}"
    if final or failures >= MAX_FAILURES:
        times = f", {failures} times without a new checkpoint" if failures else ""
        _print_line(f"{outcome}{times}; the reason is in its log")
        return code
    if refusal := requeue_job():
        _print_line(f"{outcome}; not requeued ({refusal}). Nothing that was saved is lost: submit again to resume")
        return code
    _print_line(f"{outcome}; back in the queue, to resume")
    return None


def count_failures(folder: Path, code: int) -> int:
    """Records a failure of this job and counts the job's failures since its last progress.

    Progress is a new checkpoint, or a new finished file of a stage without checkpoints.

    Args:
        folder: The job's directory.
        code: The exit code of this failure.

    Returns:
        The number of failures, this one included.
    """
    stage_dir = folder.parent.parent / folder.name
    checkpoints = (stage_dir / "checkpoints").glob("step-*/MANIFEST.json")
    progress = max((p.parent.name for p in checkpoints), key=lambda name: (len(name), name), default="start")
    if progress == "start":
        patterns = ("work/*.done", "*.safetensors", "images/*.png")  # files of pack, encode and sample
        progress = f"{sum(1 for pattern in patterns for _ in stage_dir.glob(pattern))} files"
    journal.append(folder / FAILURES, {"attempt": attempt_id(), "at": progress, "code": code, "time": time.time()})
    job = attempt_id().partition(".")[0] + "."
    return sum(1 for e in journal.read(folder / FAILURES) if e["at"] == progress and e["attempt"].startswith(job))


def requeue_job() -> str | None:
    """Asks Slurm to requeue this job. Returns None if the job is in the queue again, otherwise the reason why not."""
    job = os.environ["SLURM_JOB_ID"]
    try:
        match = re.search(r"JobState=(\S+)", _scontrol("show", "job", job, "-o").stdout)
        state = match[1] if match else "RUNNING"
        if state == "PENDING":  # Slurm has requeued the job itself
            return None
        if state != "RUNNING":  # for example, a user has cancelled the job: do not start it again
            return f"Slurm is ending it, its state is {state}"
        answer = _scontrol("requeue", job)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if answer.returncode == 0 else answer.stderr.strip().replace("\n", " ")


def _scontrol(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60)


def _print_line(text: str) -> None:
    print(f"lesiongen: job {attempt_id()} {text}.", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # The batch script made this process ignore TERM and USR2. But after a requeue, Slurm sends TERM to end this attempt. So
    # block TERM instead of ignoring it: a blocked signal waits until the decision is printed and then ends the process.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    exit_code = requeue_unless_final(Path(sys.argv[1]), int(sys.argv[2]))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if exit_code is None:
        time.sleep(600)  # Slurm ends this attempt meanwhile
    sys.exit(exit_code)
