"""Tests of `status`, `logs` and `cancel` on run directories and commands of Slurm that the tests write."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import slurm, status
from launch.pipeline import duration
from tests.conftest import DEMO, tiny
from tests.slurm.conftest import lesiongen, wait

CLUSTERS = Path(DEMO).parent / "cluster"


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory) -> Path:
    """A run whose tokenizer has trained for 320 samples, with a log as if 16 samples had taken 3 seconds."""
    runs = tmp_path_factory.mktemp("runs")
    lesiongen("pack", DEMO, *tiny(phantoms, runs))
    lesiongen("train", "tokenizer", DEMO, *tiny(phantoms, runs))
    log = runs / "tiny" / "tokenizer" / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(row | {"time": 1.7e9 + row["samples"] * 3 / 16}) + "\n" for row in rows))
    return runs / "tiny"


@pytest.fixture
def run(trained, phantoms, tmp_path, command) -> Path:
    """The run with a longer training, whose stages from the tokenizer on are jobs 41, 42, …"""
    shutil.copytree(trained, tmp_path / "tiny", symlinks=True)
    command("sbatch", "echo x >> calls; echo Submitted batch job 4$(wc -l < calls)")
    longer = tiny(phantoms, tmp_path, **{"tokenizer.train.samples": 3520})
    lesiongen("submit", DEMO, "--cluster", CLUSTERS / "local.yaml", *longer)
    return tmp_path / "tiny"


def line_of(run: Path, stage: str) -> str:
    return next(line for line in lesiongen("status", run).splitlines() if line.strip().startswith(stage))


def test_a_line_says_what_a_stage_does_and_needs(run, command):
    command("scontrol", "echo JobState=RUNNING Reason=None NodeList=n[1-2]")
    line = line_of(run, "tokenizer")
    assert " started  ██                     9%  320 of 3,520 samples  10 min left  (last metrics " in line
    assert "job 41 RUNNING on n[1-2]" in line and "last attempt" not in line
    command("scontrol", "echo JobState=PENDING Reason=Resources 'NodeList=(null)'")
    assert line_of(run, "codes").endswith("job 42 PENDING (Resources)")
    assert "job" not in line_of(run, "shards")


@pytest.mark.parametrize(("code", "words"), [(77, "diverged"), (75, "stopped early"), (137, "failed")])
def test_a_line_says_how_the_last_attempt_ended(run, command, code, words):
    command("scontrol", "echo JobState=TIMEOUT")
    jobs = run / "jobs" / "tokenizer"
    entry = {"attempt": "41.0", "kind": "failed", "at": "start", "code": code, "time": 0}
    (jobs / "attempts.jsonl").write_text(json.dumps(entry) + "\n")
    (jobs / "41_0_log.err").write_text("first\nrank 3: the reason\rrank 3: the last reason\n\n")
    shown = lesiongen("status", run).splitlines()
    [at] = [i for i, line in enumerate(shown) if line.strip().startswith("tokenizer")]
    assert shown[at].endswith(f"job 41 TIMEOUT  last attempt: {words} (code {code})")
    assert shown[at + 1].strip() == "rank 3: the last reason"


def test_a_stage_that_diverged_is_not_called_started(run, command):
    command("scontrol", "exit 1")
    path = run / "tokenizer" / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"done": False, "diverged": "loss is NaN at 320 samples"}))
    assert " diverged " in line_of(run, "tokenizer") and "loss is NaN at 320 samples" in line_of(run, "tokenizer")


def test_a_slurm_that_hangs_is_waited_for_once(run, command, monkeypatch):
    monkeypatch.setattr(slurm.job_state, "__defaults__", (2.0,))
    command("scontrol", "echo x >> asked; exec sleep 60")
    began = time.monotonic()
    assert lesiongen("status", run).count("(Slurm does not answer)") == 6
    assert time.monotonic() - began < 10, "each job was waited for by itself"  # 6 jobs of 2 s
    assert (run.parent / "asked").read_text().count("x") == 6


def test_watch_ends_when_all_is_done_or_at_ctrl_c(run, command, monkeypatch):
    command("scontrol", "echo JobState=RUNNING")
    monkeypatch.setattr(status, "WATCH_S", 0.01)
    table, looks = status.format_status, []

    def interrupted(config) -> str:
        looks.append(config)
        if len(looks) == 4:
            raise KeyboardInterrupt
        return table(config)

    monkeypatch.setattr(status, "format_status", interrupted)
    shown = lesiongen("status", run, "--watch")
    assert shown.count(f"tiny   {run}") == 3
    monkeypatch.setattr(status, "stage_statuses", lambda config: [])
    looks.clear()
    assert lesiongen("status", run, "--watch").count(f"tiny   {run}") == 1


def test_logs_follow_what_is_added_also_to_new_files(run, tmp_path):
    jobs = run / "jobs"
    (jobs / "tokenizer" / "41_0_log.out").write_text("old line\n")
    output = tmp_path / "output"

    def heed_ctrl_c() -> None:  # the tests may run in the background of a shell, where it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with open(output, "w") as file:
        command = [sys.executable, "-m", "launch", "logs", run, "-f"]
        process = subprocess.Popen(command, stdout=file, preexec_fn=heed_ctrl_c)
        try:
            wait(lambda: "old line" in output.read_text(), 60, "the last lines")
            time.sleep(0.5)  # until it has noted the ends of the files
            with open(jobs / "tokenizer" / "41_0_log.out", "a") as log:
                log.write("new line\n")
            (jobs / "codes" / "42_0_log.err").write_text("another file\n")
            wait(lambda: "new line" in output.read_text() and "another file" in output.read_text(), 30, "new lines")
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
    assert output.read_text().count("old line") == 1 and output.read_text().count("==> ") == 3


@pytest.mark.parametrize(("seconds", "text"), [(3, "3 s"), (59, "59 s"), (725, "12 min"), (11_100, "3 h 5 min")])
def test_durations_in_words(seconds, text):
    assert duration(seconds) == text


def test_status_and_cancel_go_by_the_directory(phantoms, tmp_path, command):
    """A renamed run keeps its jobs. A copy has none, although it holds the records of the original's jobs."""
    command("sbatch", "echo x >> calls; echo Submitted batch job 4$(wc -l < calls)")
    command("scontrol", "echo JobState=RUNNING")
    command("scancel", "echo $@ >> cancelled")
    lesiongen("submit", DEMO, "--cluster", CLUSTERS / "local.yaml", *tiny(phantoms, tmp_path))
    (tmp_path / "tiny").rename(tmp_path / "007")
    shutil.copytree(tmp_path / "007", tmp_path / "copy" / "tiny", symlinks=True)
    for run, has_jobs in (("007", True), ("copy/tiny", False)):
        shown = lesiongen("status", tmp_path / run)
        assert shown.startswith(f"{Path(run).name}   {tmp_path / run}\n")
        assert ("job 41 RUNNING" in shown) == has_jobs
    (tmp_path / "007" / "jobs" / "shards" / "41_0_log.out").write_text("the original")
    assert "no logs" in lesiongen("logs", tmp_path / "copy" / "tiny", code=2)
    assert "the original" in lesiongen("logs", tmp_path / "007")
    assert "no jobs to cancel" in lesiongen("cancel", tmp_path / "copy" / "tiny")
    assert not (tmp_path / "cancelled").exists()
    lesiongen("cancel", tmp_path / "007")
    assert set((tmp_path / "cancelled").read_text().split()) == {f"4{n}" for n in range(1, 8)}
