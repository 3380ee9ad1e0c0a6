"""Checks that end a broken run or report a slow rank: hangs, non-finite steps, stragglers, orphaned processes.

The training loop calls them. exit_with_parent() also guards ranks and the worker processes of `pack`.
"""

import contextlib
import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc.config import volatile
from hpc.errors import HANG, Diverged

LONG_PHASE_FACTOR = 24  # an evaluation or a save may take 24 times as long as a step: two hours at 5 minutes per step


@dataclass(frozen=True)
class HealthConfig:
    """When a run counts as hung or diverged."""

    hang_minutes: float = volatile(5.0)  # a step is hung after this time or ten times the median step, whichever is longer
    max_skipped: int = volatile(20)  # training stops after this many non-finite steps in a row

    def __post_init__(self):
        if self.hang_minutes <= 0 or self.max_skipped < 1:
            raise ValueError("hang_minutes must be above 0 and max_skipped at least 1")


class Watchdog:
    """Ends a hung process. The training loop owns one on each rank and calls beat() after each step.

    If no beat comes within the limit, a thread writes the stacks of all threads to stacks-<rank>.txt and to stderr, and ends
    the process with exit code 76.
    """

    def __init__(self, folder: Path, rank: int, min_limit_s: float):
        """Starts the watching thread.

        Args:
            folder: The stage directory, for stacks-<rank>.txt.
            rank: This process's rank.
            min_limit_s: The shortest limit for a step, in seconds.
        """
        self.path, self.rank, self.min_limit_s = folder / f"stacks-{rank}.txt", rank, min_limit_s
        self.last_beat, self.factor = time.monotonic(), 1
        self.step_times: deque[float] = deque(maxlen=100)
        self.closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self) -> None:
        """Notes that a step has ended."""
        now = time.monotonic()
        self.step_times.append(now - self.last_beat)
        self.last_beat = now

    def limit(self) -> float:
        """Returns how many seconds may pass without a beat."""
        return self.factor * max(self.min_limit_s, 10 * statistics.median(self.step_times) if self.step_times else 0.0)

    @contextlib.contextmanager
    def allow_longer(self) -> Iterator[None]:
        """Raises the limit inside the block, for an evaluation or a save, and restarts the count after the block."""
        self.factor = LONG_PHASE_FACTOR
        try:
            yield
        finally:
            self.last_beat, self.factor = time.monotonic(), 1

    def close(self) -> None:
        """Stops the watching thread."""
        self.closed.set()

    def _watch(self) -> None:
        while not self.closed.wait(min(5.0, self.min_limit_s / 4)):
            elapsed = time.monotonic() - self.last_beat
            if elapsed > self.limit():
                message = (
                    f"rank {self.rank} on {socket.gethostname()} hung: no step finished for {elapsed:.0f} s. "
                    f"The stacks of its threads are in {self.path}"
                )
                print(message, file=sys.stderr, flush=True)
                with open(self.path, "w") as file:
                    file.write(message + "\n")
                    faulthandler.dump_traceback(file, all_threads=True)
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                os._exit(HANG)


def check_skipped(skipped_in_a_row: int, config: HealthConfig) -> None:
    """Ends training that only produces non-finite steps.

    Args:
        skipped_in_a_row: Steps since the last accepted one.
        config: Holds the limit.

    Raises:
        Diverged: The limit is reached.
    """
    if skipped_in_a_row >= config.max_skipped:
        raise Diverged(
            f"{skipped_in_a_row} steps in a row had a non-finite loss or gradient. Lower the learning rate, lengthen the "
            "warm-up, or use precision=fp32. The checkpoints saved so far are kept."
        )


def find_straggler(seconds: list[float], hosts: list[str]) -> dict[str, float | str] | None:
    """Finds the slowest rank, if it needs more than 1.5 times the median.

    Args:
        seconds: Each rank's time for work of its own, such as waiting for its data. Time spent waiting for other ranks must
            be left out: it makes all ranks look equally slow.
        hosts: Each rank's host name.

    Returns:
        {"rank", "host", "ratio" to the median}, or None.
    """
    median = statistics.median(seconds)
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    if len(seconds) > 1 and seconds[slowest] > 1.5 * median:
        return {"rank": slowest, "host": hosts[slowest], "ratio": seconds[slowest] / max(median, 1e-9)}
    return None


def exit_with_parent() -> None:
    """Starts a thread that ends this process soon after its parent process ends.

    Otherwise an orphaned rank would keep the stage's lock, and the stage could not be started again.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()
