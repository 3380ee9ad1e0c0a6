"""Tests of the decision to requeue a job, and of signals, that need no Slurm."""

import errno
import signal
from pathlib import Path

import pytest

from hpc import errors
from hpc.train.preempt import Interruptible, Preemption
from launch import requeue, slurm
from launch.endings import exit_code_of


@pytest.fixture
def job(tmp_path, monkeypatch, command):
    """Returns the directory of job 7, which is running and whose ranks have ended.

    If the file `refusal` exists, the stand-in for scontrol refuses a requeue and prints the text of the file.
    """
    refuse = "[ ! -e refusal ] || { cat refusal >&2; exit 1; }"
    command("scontrol", f"[ $1 = show ] && exec cat state; [ $1 = update ] && echo $3 >> updates; {refuse}")
    (tmp_path / "state").write_text("JobId=7 JobState=RUNNING Reason=None")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    folder = tmp_path / "jobs" / "tokenizer"
    folder.mkdir(parents=True)
    return folder


def save_checkpoint(job: Path, number: int) -> None:
    manifest = job.parent.parent / "tokenizer" / "checkpoints" / f"step-{number:06}" / "MANIFEST.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")


@pytest.mark.parametrize("codes", [[75, 75], [75, 1, 1], [128 + signal.SIGUSR2], [128 + signal.SIGTERM]])
def test_a_stop_is_requeued_however_often_if_there_is_progress(job, codes, monkeypatch, capsys):
    if codes[0] < 128:
        for rank, code in enumerate(codes):
            monkeypatch.setenv("SLURM_PROCID", str(rank))
            requeue.record_exit_code(job, code)
        assert len(list((job / requeue.ENDINGS).iterdir())) == len(codes)
    for number in range(2 * requeue.LIMITS["stopped"]):
        save_checkpoint(job, number)
        assert requeue.requeue_unless_final(job, max(codes)) is None
    for _ in range(requeue.LIMITS["stopped"] - 2):
        assert requeue.requeue_unless_final(job, max(codes)) is None
    assert requeue.requeue_unless_final(job, max(codes)) == errors.RESUMABLE
    last = capsys.readouterr().err.splitlines()[-1]
    assert "10 times without a new checkpoint or file; give the stage more minutes in the cluster file" in last
    assert requeue.requeue_unless_final(job, errors.FAILED if codes[0] > 128 else 1) is (None if codes[0] > 128 else 75)


def test_in_a_container_without_slurm_the_batch_script_is_asked(job, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert requeue.requeue_unless_final(job, errors.RESUMABLE) == requeue.ASK_HOST
    assert "stopped early; the batch script puts it back into the queue" in capsys.readouterr().err
    assert requeue.requeue_unless_final(job, errors.USAGE) == errors.USAGE


def test_a_blocked_job_waits_longer_each_time(job, monkeypatch, capsys):
    """The disk is full, first so much that not even the attempt can be recorded."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(requeue.rundir, "atomic_write", refuse)
    requeue.record_exit_code(job, errors.BLOCKED)  # raises nothing
    assert requeue.requeue_unless_final(job, errors.BLOCKED) is None
    monkeypatch.setattr(requeue.journal, "append", refuse)
    for restart in range(1, requeue.LIMITS["blocked"] - 1):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        assert requeue.requeue_unless_final(job, errors.BLOCKED) is None
    assert (job.parent.parent / "updates").read_text().split() == [f"StartTime=now+{2**n}minutes" for n in range(1, 10)]
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart + 1))
    assert requeue.requeue_unless_final(job, errors.BLOCKED) == errors.BLOCKED
    assert "free space on the disk" in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_or_a_busy_stage_ends_a_command_but_not_a_job(monkeypatch):
    blocked = (OSError(errno.ENOSPC, "No space left on device"), errors.Busy("in use"))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert [exit_code_of(error) for error in blocked] == [errors.USAGE] * 2
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert [exit_code_of(error) for error in blocked] == [errors.BLOCKED] * 2


@pytest.fixture
def submitted(job, monkeypatch):
    """Submits, on paper, the pipeline of which job 7 is a part: 6 is done and forgotten, 8 and 9 wait."""
    run_dir = job.parent.parent
    for number, (stage, after) in enumerate(
        {"shards": [], "tokenizer": ["6"], "codes": ["7"], "samples": ["8", "6"]}.items(), 6
    ):
        folder = run_dir / "jobs" / stage
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}_submission.sh").write_text(f"#SBATCH --dependency=afterok:{':'.join(after)}\n# {stage}\n")
        (folder / f"{number}_submitted.pkl").write_text(stage)
        slurm.record_job(run_dir, stage, str(number), after)
    return run_dir


@pytest.mark.parametrize("why", ["no scontrol", "requeueing is denied"])
def test_a_job_that_cannot_be_requeued_is_submitted_again_with_those_after_it(
    submitted, job, command, monkeypatch, capsys, why
):
    monkeypatch.setenv("PATH", str(submitted / "bin"))
    forgotten = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    command("squeue", f"[ $5 != 6 ] || {{ {forgotten}; }}; cat state")
    if why == "no scontrol":
        (submitted / "bin" / "scontrol").unlink()
    else:
        command("scontrol", f"[ $1 = show ] || {{ echo disabled >&2; exit 1; }}; [ $3 != 6 ] || {{ {forgotten}; }}; cat state")
    command("sbatch", 'cat > script; echo x >> calls; echo "$* $(cat script)" >> sent; echo 1$(wc -l < calls)')
    for _ in range(2):  # the new job counts the attempts of the old one
        assert requeue.requeue_unless_final(job, errors.FAILED) == errors.FAILED
        monkeypatch.setenv("SLURM_JOB_ID", "11")
    said = capsys.readouterr().err
    assert "submitted again: 7 as 11, 8 as 12, 9 as 13." in said
    assert "submitted again: 11 as 14, 12 as 15, 13 as 16." in said
    lines = (submitted / "sent").read_text().splitlines()
    assert lines[:3] == [
        "--parsable --begin=now+0minutes # tokenizer",
        "--parsable --dependency=afterok:11 # codes",
        "--parsable --dependency=afterok:12 # samples",
    ]
    assert (job / "14_submitted.pkl").read_text() == "tokenizer"
    assert [r["job"] for r in slurm.submitted_jobs(submitted, "codes")] == ["8", "12", "15"]
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    assert requeue.requeue_unless_final(job, errors.FAILED) == errors.FAILED
    assert "3 times without a new checkpoint" in capsys.readouterr().err


def test_a_slurm_that_does_not_answer_is_asked_again(job, command, monkeypatch, capsys):
    monkeypatch.setattr(requeue, "POLL_S", 0)
    silent = "[ $(wc -l < calls) -gt 3 ] || { echo 'Unable to contact slurm controller' >&2; exit 1; }"
    command("scontrol", f"echo $1 >> calls; {silent}; [ $1 != show ] || cat state")
    assert requeue.requeue_unless_final(job, errors.RESUMABLE) is None
    assert (job.parent.parent / "calls").read_text().split() == ["show"] * 4 + ["requeue"]
    monkeypatch.setattr(requeue, "PATIENCE_S", -1)
    command("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert requeue.requeue_unless_final(job, errors.RESUMABLE) == errors.RESUMABLE
    assert "not requeued (Slurm does not answer)" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errors.FAILED, errors.HANG, 128 + signal.SIGKILL, 128 + signal.SIGSEGV])
def test_failures_are_limited_unless_a_checkpoint_lies_between(job, code, monkeypatch, capsys):
    for start in range(requeue.LIMITS["failed"] - 1):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        assert requeue.requeue_unless_final(job, code) is None
    save_checkpoint(job, 5)
    for _ in range(requeue.LIMITS["failed"] - 1):
        assert requeue.requeue_unless_final(job, code) is None
    assert requeue.requeue_unless_final(job, code) == code
    assert "3 times without a new checkpoint" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # the user has submitted the stage again
    assert requeue.requeue_unless_final(job, code) is None


@pytest.mark.parametrize("code", requeue.FINAL_CODES)
def test_what_would_end_the_same_is_not_started_again(job, code, monkeypatch):
    for rank, own in enumerate((errors.FAILED, code, errors.RESUMABLE)):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        requeue.record_exit_code(job, own)
    assert requeue.requeue_unless_final(job, 137) == code


def test_a_job_that_slurm_is_ending_is_not_revived(job, capsys):
    (job.parent.parent / "state").write_text("JobState=COMPLETING")
    assert requeue.requeue_unless_final(job, errors.RESUMABLE) == errors.RESUMABLE
    assert "Slurm is ending it" in capsys.readouterr().err


def test_a_refusal_is_told(job, command, capsys):
    (job.parent.parent / "refusal").write_text("Requested operation is presently disabled")
    slurm.record_job(job.parent.parent, "tokenizer", "7", [])
    (job / "7_submission.sh").write_text("")
    command("sbatch", "echo 'not from compute nodes' >&2; exit 1")
    assert requeue.requeue_unless_final(job, errors.RESUMABLE) == errors.RESUMABLE
    assert "not requeued (Requested operation is presently disabled; not from compute nodes)" in capsys.readouterr().err


def test_signals_set_a_flag_in_the_loop_and_interrupt_elsewhere():
    before = signal.getsignal(signal.SIGUSR2)
    with Interruptible() as interruptible:
        with Preemption() as preemption:
            assert not preemption.requested
            signal.raise_signal(signal.SIGUSR2)
            assert preemption.requested
            assert preemption.reason == "SIGUSR2"
        assert not interruptible.signalled
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert interruptible.signalled
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0, "a library may swallow the KeyboardInterrupt, so a timer must run"
        signal.raise_signal(signal.SIGUSR2)  # must not raise a second KeyboardInterrupt
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGUSR2) == before
