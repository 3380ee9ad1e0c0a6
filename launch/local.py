"""Runs a stage as several ranks on this machine, one process per rank.

Invariant: `run_ranks` returns only when every rank has ended, because a rank that still runs would hold the stage's lock.
Each rank is `python -m launch rank CONFIG STAGE PID` (launch/commands.py), and ends soon after the process PID, this one.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from hpc import config as hpc_config
from hpc import errors, watchdog
from hpc.run import rundir
from lesiongen.experiment import Experiment
from lesiongen.stages.base import Stage

POLL_S = 0.05  # seconds between two checks of the ranks
SETTLE_S = 0.5  # seconds to wait, after the first failure, for ranks that fail at about the same time
STOP_S = 15.0  # seconds in which the other ranks may stop by themselves before they are killed


def run_ranks(config: Experiment, stage: Stage) -> int:
    """Runs a stage as config.local.ranks processes on this machine. If one rank fails, the other ranks are ended.

    Args:
        config: The run's config.
        stage: The stage to run.

    Returns:
        The exit code: 0 if every rank succeeded, otherwise the exit code of the rank that failed.
    """
    ranks = config.local.ranks
    folder = config.directory / "jobs" / stage.name
    rundir.atomic_write(folder / "config.yaml", hpc_config.to_yaml(config).encode())
    common = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _free_port(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // ranks)),
    }
    processes = []
    for rank in range(ranks):
        env = os.environ | {k: str(v) for k, v in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        command = [sys.executable, "-m", "launch", "rank", str(folder / "config.yaml"), stage.name, str(os.getpid())]
        # Rank 0 writes to the terminal, every other rank to a file. Each rank has its own session, so that Ctrl-C reaches
        # only this process, which forwards it.
        out = None if rank == 0 else open(_log_path(folder, rank), "ab")  # noqa: SIM115
        processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True))
        if out:
            out.close()
    return _watch(processes, folder, config.directory / stage.name)


def _watch(processes: list[subprocess.Popen], folder: Path, stage_dir: Path) -> int:
    """Waits until every rank has ended. If a rank failed, prints why. Returns the exit code."""
    with _SignalForwarder(processes) as forwarder:
        try:
            failure = _wait_for_failure(processes)
            if failure is None:
                return errors.DONE
            _wait_for_other_ranks(processes, failure[1])
        finally:
            _kill(processes)
    rank, code = failure
    if code == errors.FAILED and watchdog.was_hung(stage_dir, rank):
        code = errors.HANG
    return _explain_failure(rank, code, forwarder.forwarded, folder)


class _SignalForwarder:
    """Context manager that forwards the signals INT (as TERM), TERM and USR2 from this process to the ranks that still run.

    Attributes:
        forwarded: The signals that were sent to the ranks.
    """

    def __init__(self, processes: list[subprocess.Popen]):
        self.processes = processes
        self.forwarded: set[int] = set()

    def __enter__(self) -> "_SignalForwarder":
        self.previous = {s: signal.signal(s, self._forward) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        number = signal.SIGTERM if number == signal.SIGINT else number
        self.forwarded.add(number)
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


def _wait_for_failure(processes: list[subprocess.Popen]) -> tuple[int, int] | None:
    """Waits until a rank fails or all succeed.

    Returns:
        Rank and exit code of the rank with the most specific failure; the code is -N if signal N killed the rank. None
        if every rank succeeded.
    """
    while not any(p.poll() for p in processes):
        if all(p.poll() == 0 for p in processes):
            return None
        time.sleep(POLL_S)
    # When one rank fails, the other ranks lose their connection to it and fail too, with code 1 or SIGABRT. Wait for them, and
    # prefer a failure with any other code: that code tells why the first rank failed.
    time.sleep(SETTLE_S)
    failures = [(rank, code) for rank, process in enumerate(processes) if (code := process.poll())]
    return min(failures, key=lambda failure: failure[1] in (errors.FAILED, -signal.SIGABRT))


def _wait_for_other_ranks(processes: list[subprocess.Popen], code: int) -> None:
    """Waits until every rank has ended, for STOP_S at most. Ranks that stop together need this time to end by themselves.

    Returns at once if a signal killed the failed rank (code < 0): the other ranks may wait for it in a collective.
    """
    deadline = time.monotonic() + STOP_S
    while code > 0 and time.monotonic() < deadline and any(p.poll() is None for p in processes):
        time.sleep(0.1)


def _kill(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def _explain_failure(rank: int, code: int, forwarded: set[int], folder: Path) -> int:
    """Prints why a rank failed, unless rank 0 has printed the reason to the terminal. Returns the exit code of the stage."""
    log = _log_path(folder, rank)
    if -code in forwarded:  # a forwarded signal killed the rank before the rank had installed its handlers
        print("lesiongen: interrupted; run the same command again to resume", file=sys.stderr)
        return errors.RESUMABLE
    if code < 0:
        name, output = signal.Signals(-code).name, f"log is {log}" if rank else "output is above"
        print(
            f"lesiongen: rank {rank} was killed by {name}; its {output}. Run the same command again to resume.", file=sys.stderr
        )
        return errors.FAILED
    if rank:
        last_line = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        print(f"lesiongen: rank {rank} ended with code {code}; the last line of {log} is: {last_line}", file=sys.stderr)
    return code


def _log_path(folder: Path, rank: int) -> Path:
    """Returns the log file of a rank. Rank 0 has none: it writes to the terminal."""
    return folder / f"rank-{rank}.log"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
