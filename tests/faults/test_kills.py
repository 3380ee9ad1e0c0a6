"""After SIGKILL at any moment, the same command resumes, and the run ends with the results of an undisturbed run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc.run import journal, metrics_log
from tests.conftest import DEMO, tiny

ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV, start_new_session=True
    )


def finish(process: subprocess.Popen, expected: int = 0) -> str:
    out = process.communicate(timeout=200)[0]
    assert process.returncode == expected, out[-3000:]
    return out


def curve(folder: Path) -> list[tuple]:
    """Returns the logged training and held-out metrics by samples, without speed and system metrics."""
    prefixes = ("train/", "val/")
    return [(r["samples"], {k: v for k, v in r.items() if k.startswith(prefixes)}) for r in metrics_log.read_metrics(folder)]


def ledgers(run: Path, stage: str) -> list[list]:
    return [[e["keys"] for e in journal.read(p)] for p in sorted((run / stage).glob("ledger-*.jsonl"))]


def wait_for(path: Path, samples: int, process: subprocess.Popen) -> None:
    """Waits until the stage has logged this number of samples, or the process has ended."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        rows = metrics_log.read_metrics(path)
        if rows and rows[-1]["samples"] >= samples:
            return
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(status.parent.name)
            found += [child, *descendants(child)]
    return found


def overrides(packed: Path, runs: Path, ranks: int, **more) -> list[str]:
    settings = {"inputs.shards": packed, "local.ranks": ranks, "data.ledger": True, "data.workers": 1} | more
    return [f"{k}={v}" for k, v in settings.items()] + [f"runs={runs}"]


@pytest.fixture(scope="module")
def undisturbed(phantoms, packed, tmp_path_factory):
    runs = tmp_path_factory.mktemp("undisturbed")
    finish(start("train", "tokenizer", DEMO, *tiny(phantoms, runs), *overrides(packed, runs, 2)))
    return runs / "tiny"


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_killed_rank(phantoms, packed, undisturbed, tmp_path, victim):
    arguments = ["train", "tokenizer", DEMO, *tiny(phantoms, tmp_path), *overrides(packed, tmp_path, 2)]
    folder = tmp_path / "tiny" / "tokenizer"
    first = start(*arguments)
    wait_for(folder, 128, first)
    ranks = [
        pid
        for pid in descendants(first.pid)
        if f"RANK={victim}\0".encode() in (environ := Path(f"/proc/{pid}/environ").read_bytes())
        and b"LOCAL_RANK" in environ
        and b"rank" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(min(ranks), signal.SIGKILL)
    out = finish(first, expected=1)
    assert f"rank {victim} was killed by SIGKILL" in out
    assert metrics_log.read_metrics(folder)[-1]["samples"] < 320, "the training had already ended when the rank was killed"
    finish(start(*arguments))
    assert curve(folder) == curve(undisturbed / "tokenizer")
    assert ledgers(tmp_path / "tiny", "tokenizer") == ledgers(undisturbed, "tokenizer")


@pytest.mark.long
def test_a_signal_stops_all_ranks_together_and_resumes(phantoms, packed, undisturbed, tmp_path):
    arguments = ["train", "tokenizer", DEMO, *tiny(phantoms, tmp_path), *overrides(packed, tmp_path, 2)]
    folder = tmp_path / "tiny" / "tokenizer"
    first = start(*arguments)
    wait_for(folder, 64, first)
    first.send_signal(signal.SIGTERM)
    out = finish(first, expected=75)
    assert "stopped by SIGTERM" in out or "stopped by another rank" in out
    finish(start(*arguments))
    assert curve(folder) == curve(undisturbed / "tokenizer")


@pytest.mark.long
def test_the_whole_run_killed_three_times(phantoms, tmp_path):
    """Kills the run at three random moments. Its ledgers must list the samples of an undisturbed run, in the same order."""
    more = {"data.ledger": True, "data.workers": 1}
    finish(start("run", DEMO, *tiny(phantoms, tmp_path / "undisturbed", **more)))
    rng = random.Random(time.time_ns())
    arguments = ["run", DEMO, *tiny(phantoms, tmp_path / "killed", **more)]
    moments = [
        ("tokenizer", rng.randrange(16, 320)),
        ("prior-top", rng.randrange(16, 160)),
        ("prior-bottom", rng.randrange(16, 160)),
    ]
    print("kills at", moments)
    for stage, samples in moments:
        process = start(*arguments)
        wait_for(tmp_path / "killed" / "tiny" / stage, samples, process)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finish(start(*arguments))
    for stage in ("tokenizer", "prior-top", "prior-bottom"):
        assert ledgers(tmp_path / "killed" / "tiny", stage) == ledgers(tmp_path / "undisturbed" / "tiny", stage)
        assert curve(tmp_path / "killed" / "tiny" / stage) == curve(tmp_path / "undisturbed" / "tiny" / stage)
    for stage in ("shards", "tokenizer", "codes", "prior-top", "prior-bottom", "samples"):
        paths = [tmp_path / runs / "tiny" / stage / "stage.json" for runs in ("killed", "undisturbed")]
        records = [json.loads(path.read_text()) for path in paths]
        assert records[0]["digest"] == records[1]["digest"], stage


def test_a_stage_in_use_is_refused(phantoms, packed, tmp_path):
    arguments = ["train", "tokenizer", DEMO, *tiny(phantoms, tmp_path), *overrides(packed, tmp_path, 1)]
    first = start(*arguments)
    wait_for(tmp_path / "tiny" / "tokenizer", 16, first)
    first.send_signal(signal.SIGSTOP)  # the stopped process holds the lock until the second command has ended
    try:
        out = finish(start(*arguments), expected=2)
    finally:
        first.send_signal(signal.SIGCONT)
    assert "in use by another process" in out
    finish(first)
