"""A clock that steps by hours, backwards and forwards, while a tokenizer is trained: the result and the end are the same."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpc.run import journal
from hpc.run.metrics_log import read_metrics
from tests.conftest import DEMO, tiny

pytestmark = pytest.mark.long
HOURS = (0, 5, -7, 24, -24)
# Python imports a module of this name by itself. Each reading of the clock is another of HOURS away from the time.
HOOK = f"""
import itertools, time
now, now_ns, hours = time.time, time.time_ns, itertools.cycle({HOURS})
time.time = lambda: now() + 3600 * next(hours)
time.time_ns = lambda: now_ns() + 3600 * 10**9 * next(hours)
"""
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


def train(phantoms: Path, packed: Path, runs: Path, **environment: str) -> dict:
    """Trains a tokenizer in a process of its own. Returns what the result and the log hold, without times."""
    command = ["train", "tokenizer", DEMO, *tiny(phantoms, runs), f"inputs.shards=[{packed / 'shards'}]", "data.ledger=true"]
    command += ["tokenizer.train.health.hang_minutes=1"]
    process = [sys.executable, "-m", "launch", *command]
    done = subprocess.run(process, env=os.environ | environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    stage = runs / "tiny" / "tokenizer"
    record = json.loads((stage / "stage.json").read_text())
    rows = [{k: v for k, v in row.items() if k.startswith(("val/", "train/loss", "samples"))} for row in read_metrics(stage)]
    assert record["done"]
    return {"digest": record["digest"], "rows": rows, "ledger": journal.read(stage / "ledger-0.jsonl")}


@pytest.fixture(scope="module")
def undisturbed(phantoms, packed, tmp_path_factory) -> dict:
    return train(phantoms, packed, tmp_path_factory.mktemp("undisturbed"))


def test_a_clock_that_steps_has_no_effect(phantoms, packed, tmp_path, undisturbed):
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    assert train(phantoms, packed, tmp_path, PYTHONPATH=path) == undisturbed
    times = [row["time"] for row in read_metrics(tmp_path / "tiny" / "tokenizer")]
    assert max(times) - min(times) > 20 * 3600, "the hook has changed nothing"


@pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime")
def test_a_system_clock_that_steps_has_no_effect(phantoms, packed, tmp_path, undisturbed):
    """The same for libraries that are not written in Python: libfaketime changes what the C library answers."""
    offset, stop = tmp_path / "offset", threading.Event()

    def step() -> None:
        while not stop.is_set():
            for hours in HOURS:
                (tmp_path / "next").write_text(f"{hours:+d}h")
                (tmp_path / "next").replace(offset)
                time.sleep(0.7)

    stepping = threading.Thread(target=step)
    stepping.start()
    try:
        preload = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_CACHE_DURATION": "1"}
        result = train(phantoms, packed, tmp_path, FAKETIME_DONT_FAKE_MONOTONIC="1", **preload)
    finally:
        stop.set()
        stepping.join()
    assert result == undisturbed
    times = [row["time"] for row in read_metrics(tmp_path / "tiny" / "tokenizer")]
    assert max(times) - min(times) > 3600, "libfaketime has changed nothing"
