"""The last line of a job's batch script: requeues a job whose ranks stopped early or failed, or ends the job.

This program runs outside the ranks, on the job's first node. So it also handles endings that no rank can report: a rank was
killed for lack of memory, crashed or hung. Slurm sees the job as running until this program ends, so the jobs that depend on
the job keep waiting.

The program reads srun's exit code, and the exit code of each rank from the directory `endings` of the job's directory. It lists
the attempts in `attempts.jsonl` there, and ends the job after LIMITS attempts of one kind without progress. If Slurm refuses to
requeue the job, the program submits the job again, and the jobs that wait for it.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from hpc import errors, watchdog
from hpc.run import journal, rundir
from launch import slurm

# How an attempt ended → number of such attempts without progress between them after which the job ends. A preemption often
# comes at a bad moment, and a full disk is often noticed only on the next day.
LIMITS = {"failed": 3, "stopped": 10, "blocked": 10}
ADVICE = {
    "failed": "the reason is in its log",
    "stopped": "give the stage more minutes in the cluster file, or set a smaller save_every",
    "blocked": "free space on the disk, or end the process that uses the stage; then submit again to resume",
}
FINAL_CODES = (errors.USAGE, errors.DIVERGED)  # another attempt would end in the same way
# srun's exit codes if a signal killed a rank: while the rank was starting, or because the job's time was nearly up.
SIGNAL_CODES = tuple(128 + s for s in (signal.SIGUSR2, signal.SIGTERM, signal.SIGALRM))
ENDINGS, ATTEMPTS = "endings", "attempts.jsonl"
ASK_HOST = 98  # exit code that asks the batch script to requeue the job, because this program has no commands of Slurm
PATIENCE_S, POLL_S = 3600.0, 10.0  # how long, and how often, to ask a Slurm that does not answer


class Refused(Exception):
    """Slurm does not put the job back into the queue. The message is the reason."""


def attempt_id() -> str:
    """Returns the id of this attempt of the job: "123.0", after a requeue "123.1"."""
    return f"{_job()}.{_restarts()}"


def record_exit_code(folder: Path, code: int) -> None:
    """Records this rank's exit code for the batch script. srun reports only the greatest code of all ranks.

    Each rank writes a file of its own: lines that several nodes append to one file on a shared file system may be lost.

    Args:
        folder: The job's directory.
        code: The rank's exit code.
    """
    rank = int(os.environ.get("SLURM_PROCID", 0))
    entry = {"attempt": attempt_id(), "rank": rank, "code": code, "time": time.time()}
    try:
        rundir.atomic_write(folder / ENDINGS / f"{attempt_id()}-{rank}.json", json.dumps(entry).encode())
    except OSError as error:  # the disk is full; srun still reports the code
        _print_line(f"ended with code {code}, which is not recorded ({error.strerror})")


def requeue_unless_final(folder: Path, srun_code: int) -> int | None:
    """Requeues this job, unless another attempt would fail again or Slurm refuses. Prints the decision.

    Args:
        folder: The job's directory.
        srun_code: The exit code of srun.

    Returns:
        The exit code of the job. None if the job is in the queue again; Slurm then ends this attempt. ASK_HOST if the batch
        script must requeue the job.
    """
    # Find out how the ranks ended: with a final error of any rank, otherwise blocked, stopped, or with a failure. When one rank
    # stops or is blocked, other ranks may lose their connection to it and fail.
    endings = (folder / ENDINGS).glob(f"{attempt_id()}-*.json")
    codes = {srun_code} | {json.loads(path.read_text())["code"] for path in endings}
    if final := [code for code in FINAL_CODES if code in codes]:
        _print_line(f"failed with code {final[0]}; {ADVICE['failed']}")
        return final[0]
    if errors.BLOCKED in codes:
        kind, code, outcome = "blocked", errors.BLOCKED, "found the disk full or its stage in use"
    elif not codes.isdisjoint((errors.RESUMABLE, *SIGNAL_CODES)):
        kind, code, outcome = "stopped", errors.RESUMABLE, "stopped early"
    else:
        hung = max(codes) == errors.FAILED and watchdog.was_hung(folder.parent.parent / folder.name)
        code = errors.HANG if hung else max(codes)
        kind, outcome = "failed", f"failed with code {code}"

    # Requeue the job or end it. In a container the batch script, which runs outside, has to do it.
    number = count_attempts(folder, kind, code)
    if number >= LIMITS[kind]:
        _print_line(f"{outcome}, {number} times without a new checkpoint or file; {ADVICE[kind]}")
        return code
    delay = 2**number if kind == "blocked" else 0  # minutes: 2, 4, 8, … add up to 17 hours
    if not any(map(slurm.find_command, ("scontrol", "sbatch"))):
        _print_line(f"{outcome}; the batch script puts it back into the queue")
        return ASK_HOST
    try:
        requeued = requeue_job(folder, delay)
    except Refused as reason:
        _print_line(f"{outcome}; not requeued ({reason}). Nothing that was saved is lost: submit again to resume")
        return code
    _print_line(f"{outcome}; back in the queue, to resume" + (f" in {delay} minutes" if delay else ""))
    return None if requeued else code


def count_attempts(folder: Path, kind: str, code: int) -> int:
    """Records this attempt of the job, and counts the job's attempts of this kind since its last progress.

    Progress is a new checkpoint, or a new finished file of a stage without checkpoints. Lines of the metrics log are no
    progress: a resume removes those that are newer than its checkpoint.

    Args:
        folder: The job's directory.
        kind: How the attempt ended, a key of LIMITS.
        code: The exit code of this attempt.

    Returns:
        The number of attempts, this one included.
    """
    stage_dir = folder.parent.parent / folder.name
    checkpoints = (stage_dir / "checkpoints").glob("step-*/MANIFEST.json")
    progress = max((p.parent.name for p in checkpoints), key=lambda name: (len(name), name), default="start")
    if progress == "start":
        patterns = ("work/*.done", "**/*.safetensors", "images/*/*.png")  # files of pack, encode and sample
        progress = f"{sum(1 for pattern in patterns for _ in stage_dir.glob(pattern))} files"
    # Count the attempts of this job, and of the jobs that it replaces.
    chain = {_job()}
    for record in reversed(slurm.submitted_jobs(folder.parent.parent, folder.name)):
        if record["job"] in chain and "instead_of" in record:
            chain.add(record["instead_of"])
    entry = {"attempt": attempt_id(), "kind": kind, "at": progress, "code": code, "time": time.time()}
    attempts = [e for e in journal.read(folder / ATTEMPTS, "attempt", "kind", "at") if e["attempt"].partition(".")[0] in chain]
    try:
        journal.append(folder / ATTEMPTS, entry)
    except OSError:  # the disk is full: take the attempts that are not recorded for attempts like this one
        recorded = [int(e["attempt"].partition(".")[2]) for e in attempts if e["attempt"].startswith(_job() + ".")]
        attempts += [entry] * (_restarts() - max(recorded, default=-1) - 1)
    return 1 + sum(e["at"] == progress and e["kind"] == kind for e in attempts)


def requeue_job(folder: Path, delay: int = 0) -> bool:
    """Puts this job back into the queue. If Slurm refuses to requeue it, submits it again as a new job.

    Args:
        folder: The job's directory.
        delay: Minutes that the job must wait in the queue.

    Returns:
        True if this job is in the queue again, False if a new job replaces it.

    Raises:
        Refused: Slurm is ending the job, does not answer, or also refuses a new job.
    """
    job, deadline = _job(), time.monotonic() + PATIENCE_S
    while True:
        state = slurm.job_state(job, timeout_s=60)
        if state.startswith("PENDING"):  # Slurm has requeued the job itself, or an earlier request has arrived
            break
        if not state.startswith(("RUNNING", slurm.NO_ANSWER)):  # for example, a user has cancelled the job: do not revive it
            raise Refused(f"Slurm is ending it, its state is {state}")
        if state.startswith("RUNNING"):
            answer = slurm.run("scontrol", "requeue", job)
            if answer.returncode == 0:
                break
            if not slurm.unreachable(answer):
                submit_again(folder, delay, _one_line(answer.stderr))
                return False
        if time.monotonic() > deadline:
            raise Refused("Slurm does not answer")
        time.sleep(POLL_S)
    if delay:
        slurm.run("scontrol", "update", f"JobId={job}", f"StartTime=now+{delay}minutes")
    return True


def submit_again(folder: Path, delay: int, refusal: str) -> None:
    """Submits this job's batch script as a new job, and then the scripts of the jobs that wait for this job.

    The jobs that wait would be cancelled when this job ends: each is replaced by a job that waits for the new jobs.

    Args:
        folder: The job's directory.
        delay: Minutes that the new job must wait in the queue.
        refusal: Why this job cannot be requeued.

    Raises:
        Refused: Slurm refuses a new job.
    """
    run_dir, replaced = folder.parent.parent, {}
    folders = [path.parent for path in run_dir.glob(f"jobs/*/{slurm.SUBMITTED}")]
    newest = [(jobs[-1], path) for path in folders if (jobs := slurm.submitted_jobs(run_dir, path.name))]
    for record, waiting in sorted(newest, key=lambda item: item[0]["time"]):  # a job was submitted after those it waits for
        old, options = record["job"], []
        if old == _job():
            after, options = [], [f"--begin=now+{delay}minutes"]
        elif replaced.keys() & record["after"]:
            # Slurm refuses to wait for a job that it has forgotten. That job is done, or this one would be cancelled.
            after = [replaced.get(j, j) for j in record["after"] if j in replaced or slurm.job_state(j) != slurm.GONE]
            options = [f"--dependency=afterok:{':'.join(after)}"]
        else:
            continue
        script = (waiting / f"{old}_submission.sh").read_text()
        script = "".join(line for line in script.splitlines(keepends=True) if not line.startswith("#SBATCH --dependency"))
        answer = slurm.run("sbatch", "--parsable", *options, text=script)
        if answer.returncode:
            kept = f"; it is submitted again as job {replaced[_job()]}, without the jobs after it" if replaced else ""
            raise Refused(f"{refusal}; {_one_line(answer.stderr)}{kept}")
        new = replaced[old] = answer.stdout.strip().partition(";")[0]
        for file in ("submission.sh", "submitted.pkl"):  # a rank waits for the pickle for a minute
            (waiting / f"{new}_{file}").symlink_to(f"{old}_{file}")
        slurm.record_job(run_dir, waiting.name, new, after, instead_of=old)
    if not replaced:
        raise Refused(refusal)
    jobs = ", ".join(f"{old} as {new}" for old, new in replaced.items())
    _print_line(f"cannot be requeued ({refusal}); submitted again: {jobs}")


def _job() -> str:
    return os.environ["SLURM_JOB_ID"]


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _one_line(text: str) -> str:
    return text.strip().replace("\n", " ")


def _print_line(text: str) -> None:
    with contextlib.suppress(OSError):  # the log may be on a full disk
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
