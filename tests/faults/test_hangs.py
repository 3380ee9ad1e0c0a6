"""A process that makes no progress ends with its own code and the stacks of its threads; a missing rank is named."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc import dist, errors, watchdog
from hpc.train import checkpoint
from tests.conftest import DEMO, tiny
from tests.faults.test_kills import descendants, finish, overrides, start, wait_for

SCRIPT = """
import ctypes, math, threading, time
from pathlib import Path
from hpc import watchdog
from hpc.run.progress import progress_bar

def stuck_here():
    {stuck}

with watchdog.watch(Path({folder!r}), 3, 0.3, "packing"):
    with progress_bar(10, "work", shown=False) as progress:
        for _ in range(10):  # longer than the limit in all, but with progress
            time.sleep(0.1)
            progress.update(1)
    {before}
    stuck_here()
"""


def run(folder: Path, stuck: str, before: str = "pass") -> subprocess.CompletedProcess:
    code = SCRIPT.format(folder=str(folder), stuck=stuck, before=before)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_hang_ends_with_stacks_and_its_own_code(tmp_path):
    done = run(tmp_path, "time.sleep(60)")
    assert done.returncode == errors.HANG
    assert "rank 3 on" in done.stderr and "hung in packing: no progress for" in done.stderr
    assert "stuck_here" in done.stderr and "stuck_here" in (tmp_path / "stacks-3.txt").read_text()
    assert watchdog.was_hung(tmp_path, 3)


def test_a_native_call_that_holds_the_interpreter_lock(tmp_path):
    """PyDLL calls without releasing the lock, so that no Python thread runs."""
    done = run(tmp_path, "ctypes.PyDLL(None).sleep(60)", "watchdog.NATIVE_MARGIN_S = 1; time.sleep(0.2); watchdog.beat()")
    assert done.returncode == errors.FAILED
    assert "stuck_here" in (tmp_path / "stacks-3.txt").read_text()
    assert watchdog.was_hung(tmp_path, 3)


def test_a_phase_has_its_own_limit_and_a_waiting_rank_none(tmp_path):
    """Both last longer than the limit of the work around them."""
    longer = "with watchdog.phase('saving', 20): time.sleep(1)"
    assert run(tmp_path, "pass", f"{longer}\n    with watchdog.paused(): time.sleep(1)").returncode == 0
    assert not watchdog.was_hung(tmp_path, 3)
    done = run(tmp_path, "time.sleep(60)", "with watchdog.phase('saving', 0.5): stuck_here()")
    assert done.returncode == errors.HANG
    assert "hung in saving" in done.stderr


@pytest.mark.long
def test_one_rank_stands_still(phantoms, packed, tmp_path):
    """The other rank waits for it in the step's collective. The run ends with the code of a hang."""
    more = {"tokenizer.train.health.hang_minutes": 0.05, "tokenizer.train.samples": 10**6}
    arguments = ["train", "tokenizer", DEMO, *tiny(phantoms, tmp_path, **more), *overrides(packed, tmp_path, 2)]
    process = start(*arguments)
    folder = tmp_path / "tiny" / "tokenizer"
    wait_for(folder, 128, process)
    ranks = [p for p in descendants(process.pid) if b"\0RANK=1\0" in Path(f"/proc/{p}/environ").read_bytes()]
    began = time.monotonic()
    os.kill(min(ranks), signal.SIGSTOP)  # its own watchdog stands still too
    out = finish(process, expected=errors.HANG)
    assert time.monotonic() - began < 60
    assert "rank 0 on" in out and "hung in a step" in out
    assert watchdog.was_hung(folder, 0)


def _save_alone(topology, folder: str) -> str:
    """Only rank 0 saves."""
    if topology.rank:
        return ""
    try:
        checkpoint.save(Path(folder), 1, None, {}, wait_s=1)
    except TimeoutError as error:
        return str(error)
    return "saved"


def _meet_again(topology) -> int:
    if topology.rank:
        dist._meetings += 1  # the meeting that this rank has missed
    dist.meet("a test", 30)
    return topology.rank


def test_a_save_that_one_rank_alone_calls_names_the_others(pools, tmp_path):
    message = pools(2).run(_save_alone, str(tmp_path))[0]
    assert "for saving step 1. These ranks of 2 did not come: 1." in message
    assert pools(2).run(_meet_again) == [0, 1]
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_stage_without_training_is_watched(phantoms, tmp_path):
    """The worker processes of pack stand still."""
    more = {"local.hang_minutes": 0.05, "data.shard_samples": 5, "data.processes": 2}
    process = start("pack", DEMO, *tiny(phantoms, tmp_path, **more))
    stopped: set[int] = set()
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        for pid in set(descendants(process.pid)) - stopped:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGSTOP)
                    stopped.add(pid)
        time.sleep(0.05)
    for pid in stopped:
        os.kill(pid, signal.SIGKILL)  # they hold the pipe of the output
    assert "hung in shards" in finish(process, expected=errors.HANG)
