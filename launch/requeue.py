"""The last line of a job's batch script: ranks that stopped early or failed go back into the queue, or the job ends.

It runs outside the ranks, on the job's first node, so it also sees the endings that no rank can report: killed for memory,
crashed, hung. The batch script outlives the ranks, so none of them has to wait for Slurm to end it, and the jobs that
depend on this one wait on.
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

MAX_FAILURES = 3  # of one job without a new checkpoint between them; preemptions are not counted
FINAL = (errors.USAGE, errors.DIVERGED)  # the same again would end the same
# srun's code for ranks that a signal from outside ended: before they listened, or because their time was nearly up.
SIGNALLED = tuple(128 + s for s in (signal.SIGUSR2, signal.SIGTERM, signal.SIGALRM))
ENDINGS, FAILURES = "endings.jsonl", "failures.jsonl"


def attempt() -> str:
    """This start of this job; "123.0", after a requeue "123.1"."""
    return f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"


def note_ending(folder: Path, code: int) -> None:
    """A rank leaves its code here; srun tells the batch script only the greatest of all."""
    rank = int(os.environ.get("SLURM_PROCID", 0))
    journal.append(folder / ENDINGS, {"attempt": attempt(), "rank": rank, "code": code, "time": time.time()})


def main(folder: Path, srun: int) -> int | None:
    """The job's exit code; None where it is in the queue again, and Slurm will end this start of it."""
    codes = {e["code"] for e in journal.read(folder / ENDINGS) if e["attempt"] == attempt()}
    if not codes or srun in SIGNALLED:  # a rank that a signal killed while it started has noted nothing
        codes.add(srun)
    final = [code for code in FINAL if code in codes]
    # Ranks that lose a stopped one fail.
    stopped = not codes.isdisjoint((errors.RESUMABLE, *SIGNALLED)) and not final
    code = final[0] if final else errors.RESUMABLE if stopped else max(codes)
    failures = 0 if final or stopped else count_failure(folder, code)
    what = "stopped early" if stopped else f"failed with code {code}"
    if final or failures >= MAX_FAILURES:
        say(f"{what}{f', {failures} times without a new checkpoint' if failures else ''}; its log says why")
        return code
    if refused := requeue_job():
        say(f"{what}; not requeued ({refused}). Nothing that was saved is lost: submit again to go on")
        return code
    say(f"{what}; back in the queue, to go on where it was")
    return None


def count_failure(folder: Path, code: int) -> int:
    """Writes down a failure; how many there were in this job since it last got on: a checkpoint, or a file it keeps."""
    stage = folder.parent.parent / folder.name
    checkpoints = (stage / "checkpoints").glob("step-*/MANIFEST.json")
    at = max((p.parent.name for p in checkpoints), key=lambda name: (len(name), name), default="start")
    if at == "start":
        kept = ("work/*.done", "*.safetensors", "images/*.png")  # of pack, encode and sample
        at = f"{sum(1 for pattern in kept for _ in stage.glob(pattern))} files"
    journal.append(folder / FAILURES, {"attempt": attempt(), "at": at, "code": code, "time": time.time()})
    job = attempt().partition(".")[0] + "."
    return sum(1 for e in journal.read(folder / FAILURES) if e["at"] == at and e["attempt"].startswith(job))


def requeue_job() -> str | None:
    """Requeues this job. None if it is in the queue again, else the reason it is not."""
    job = os.environ["SLURM_JOB_ID"]
    try:
        shown = re.search(r"JobState=(\S+)", _scontrol("show", "job", job, "-o").stdout)
        state = shown[1] if shown else "RUNNING"
        if state == "PENDING":  # Slurm itself was faster
            return None
        if state != "RUNNING":  # a requeue would revive a job that someone cancelled
            return f"Slurm is ending it, it is {state}"
        done = _scontrol("requeue", job)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip().replace("\n", " ")


def _scontrol(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60)


def say(text: str) -> None:
    print(f"lesiongen: job {attempt()} {text}.", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # The batch script made this process ignore TERM and USR2. Hold TERM back from here on instead of ignoring it: Slurm
    # ends a job that is requeued by TERM, which must wait until this process has said so, and must not be lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ended = main(Path(sys.argv[1]), int(sys.argv[2]))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if ended is None:
        time.sleep(600)
    sys.exit(ended)
