"""No rank, data worker or packing process outlives a killed parent by more than 10 seconds, at whatever moment it is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from hpc.run import metrics_log
from tests.conftest import DEMO, tiny


class Command:
    """A running lesiongen command. Finds its processes by an environment variable, which they inherit."""

    def __init__(self, arguments: list[str], log: Path, **environment: str):
        self.mark = f"LEAK_TEST={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        command = [sys.executable, "-m", "launch", *arguments]
        with open(log, "wb") as file:
            env = os.environ | {"OMP_NUM_THREADS": "1", name: value} | environment
            self.process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)

    def alive(self) -> dict[int, str]:
        """Returns {process id: command line} of the processes that still run."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return found

    def kill(self, pid: int) -> None:
        """Kills a process, and fails if any other process of the command runs 10 seconds later."""
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while (left := self.alive()) and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.1)
        self.end()
        assert not left

    def end(self) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def wait(condition, command: Command, log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert command.process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)


@pytest.fixture
def train(phantoms, packed, tmp_path):
    """train(ranks) starts a training with two data workers for each rank."""
    commands = []

    def start(ranks: int, **environment: str) -> Command:
        own = {"inputs.shards": packed, "local.ranks": ranks, "data.workers": 2, "tokenizer.train.samples": 1_000_000}
        command = Command(["train", "tokenizer", DEMO, *tiny(phantoms, tmp_path, **own)], tmp_path / "log", **environment)
        commands.append(command)
        return command

    yield start
    for command in commands:
        command.end()


def has_logged(tmp_path: Path) -> bool:
    return len(metrics_log.read_metrics(tmp_path / "tiny" / "tokenizer")) > 2


# Number of processes of the command at which the launcher is killed, and seconds after that number is reached. Three: the
# launcher and two ranks, which import for seconds. More: data workers start.
MOMENTS = [
    (3, 0.0),
    (7, 0.0),
    *(pytest.param(*moment, marks=pytest.mark.long) for moment in [(3, 1.0), (3, 3.0), (7, 0.5), (7, 2.0)]),
]


@pytest.mark.parametrize(("processes", "delay"), MOMENTS)
def test_a_killed_launcher_leaves_nothing_at_any_moment_of_the_start(train, tmp_path, processes, delay):
    command = train(2)
    wait(lambda: len(command.alive()) >= processes, command, tmp_path / "log")
    time.sleep(delay)
    command.kill(command.process.pid)


# Python runs this file at the start of each process. It makes the data workers' imports take longer than they may live.
SLOW_IMPORTS = """
import sys, time

class Slow:
    def find_spec(name, path=None, target=None):
        time.sleep(60 if name == "torch" else 0)

if "--multiprocessing-fork" in sys.orig_argv:
    sys.meta_path.insert(0, Slow)
"""


def test_workers_whose_imports_take_long_do_not_outlive_a_killed_launcher(train, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORTS)
    command = train(2, PYTHONPATH=str(tmp_path))
    wait(lambda: sum("spawn_main" in line for line in command.alive().values()) == 4, command, tmp_path / "log")
    time.sleep(2)  # the workers' interpreters have started
    command.kill(command.process.pid)


@pytest.mark.long
@pytest.mark.parametrize("victim", ["launcher", "rank 0", "rank 1", "only rank"])
def test_a_process_killed_in_training_leaves_nothing(train, tmp_path, victim):
    command = train(1 if victim == "only rank" else 2)
    wait(lambda: has_logged(tmp_path), command, tmp_path / "log")
    pid = command.process.pid
    if victim.startswith("rank"):
        ranks = [p for p, line in command.alive().items() if "-m launch rank" in line]
        environments = {p: Path(f"/proc/{p}/environ").read_bytes() for p in ranks}
        pid = next(p for p in ranks if f"\0RANK={victim[-1]}\0".encode() in b"\0" + environments[p])
    command.kill(pid)


@pytest.mark.parametrize("delay", [0.0, pytest.param(1.0, marks=pytest.mark.long), pytest.param(3.0, marks=pytest.mark.long)])
def test_a_killed_pack_leaves_nothing(phantoms, tmp_path, delay):
    command = Command(["pack", DEMO, *tiny(phantoms, tmp_path), "data.processes=2"], tmp_path / "log")
    try:
        wait(lambda: len(command.alive()) >= 4, command, tmp_path / "log")  # with Python's resource tracker
        time.sleep(delay)
        command.kill(command.process.pid)
    finally:
        command.end()
