"""Ends a process that makes no progress.

A stage runs inside `watch`. Whatever makes progress calls `beat`: every progress bar, which training updates after each step,
and the loops over held-out batches and sampled tokens. If no beat comes within the limit, the stacks of all threads go to
stderr and to stacks-<rank>.txt in the stage's directory, and the process ends with exit code 76 (HANG). A native call that
holds the interpreter's lock stops this module's thread too; a timer of faulthandler, which needs no lock, then does the same,
except that the exit code is 1. `was_hung` tells the launcher.
"""

import contextlib
import faulthandler
import math
import os
import socket
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path

from hpc.errors import HANG

SLOWER = 10  # a beat may take this many times the median beat of its phase, if that is longer than the limit
NATIVE_MARGIN_S = 10.0  # the timer of faulthandler ends a process that the thread should have ended so long before

_current: "_Watchdog | None" = None


@contextlib.contextmanager
def watch(folder: Path, rank: int, limit_s: float, what: str) -> Iterator[None]:
    """Watches this process inside the block.

    Args:
        folder: The stage's directory, for stacks-<rank>.txt.
        rank: This process's rank.
        limit_s: Seconds that may pass without a beat.
        what: Name of the work in messages.
    """
    global _current
    _current = _Watchdog(stacks_path(folder, rank), rank, limit_s, what)
    try:
        yield
    finally:
        _current.close()
        _current = None


def beat() -> None:
    """Notes that the process has made progress. Does nothing outside watch()."""
    if _current:
        _current.beat()


@contextlib.contextmanager
def phase(name: str, limit_s: float) -> Iterator[None]:
    """Sets the limit inside the block; the time before and after the block does not count. Does nothing outside watch().

    Args:
        name: Name of the work, for the message.
        limit_s: Seconds that may pass without a beat inside the block.
    """
    if _current is None:
        yield
        return
    outer = _current.phase
    _current.enter(name, limit_s)
    try:
        yield
    finally:
        _current.enter(*outer)


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Stops watching inside the block, while another process, which is watched itself, does the work."""
    with phase("waiting", math.inf):
        yield


def stacks_path(folder: Path, rank: int | str) -> Path:
    """Returns the file in which a hung rank leaves the stacks of its threads."""
    return folder / f"stacks-{rank}.txt"


def was_hung(folder: Path, rank: int | str = "*") -> bool:
    """Returns whether the watchdog has ended the last process of a rank, or of any rank, in a stage's directory."""
    return any(path.stat().st_size for path in folder.glob(stacks_path(folder, rank).name))


class _Watchdog:
    """The watching thread of this process, and the timer that watches the thread."""

    def __init__(self, path: Path, rank: int, limit_s: float, what: str):
        self.path, self.rank, self.phase = path, rank, (what, limit_s)
        self.last_beat = time.monotonic()
        self.beats: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=100))  # seconds between beats, by phase
        self.closed = threading.Event()
        self.file = open(path, "w")  # noqa: SIM115 — faulthandler writes into the open file
        self._set_timer()
        self.thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self.thread.start()

    def beat(self) -> None:
        """Notes progress in the present phase."""
        now = time.monotonic()
        self.beats[self.phase[0]].append(now - self.last_beat)
        self.last_beat = now

    def enter(self, name: str, limit_s: float) -> None:
        """Begins a phase."""
        self.phase, self.last_beat = (name, limit_s), time.monotonic()
        self._set_timer()

    def close(self) -> None:
        """Stops watching."""
        self.closed.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()
        self.file.close()
        self.path.unlink(missing_ok=True)

    def limit(self) -> float:
        """Returns how many seconds may pass without a beat now."""
        name, limit_s = self.phase
        return max(limit_s, SLOWER * statistics.median(self.beats[name]) if self.beats[name] else 0.0)

    def _set_timer(self) -> None:
        """Starts the timer again, as this thread has the interpreter's lock now."""
        if self.limit() == math.inf:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(self.limit() + NATIVE_MARGIN_S, exit=True, file=self.file)

    def _watch(self) -> None:
        while not self.closed.wait(min(5.0, self.phase[1] / 4)):
            elapsed = time.monotonic() - self.last_beat
            if elapsed > self.limit():
                self._end_process(elapsed)
            self._set_timer()

    def _end_process(self, elapsed: float) -> None:
        message = (
            f"rank {self.rank} on {socket.gethostname()} hung in {self.phase[0]}: no progress for {elapsed:.0f} s. "
            f"The stacks of its threads are in {self.path}"
        )
        print(message, file=sys.stderr, flush=True)
        self.file.write(message + "\n")
        self.file.flush()
        faulthandler.dump_traceback(self.file, all_threads=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        os._exit(HANG)
