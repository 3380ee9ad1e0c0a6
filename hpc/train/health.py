"""Guards of a long run: hang watchdog, limit on non-finite steps, report of stragglers."""

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

PATIENCE = 24  # two hours where a step may take five minutes


@dataclass(frozen=True)
class HealthConfig:
    hang_minutes: float = volatile(5.0)  # a step may take this long, or ten times the median, whichever is more
    max_skipped: int = volatile(20)  # non-finite steps in a row before giving up

    def __post_init__(self):
        if self.hang_minutes <= 0 or self.max_skipped < 1:
            raise ValueError("hang_minutes and max_skipped must be above 0")


class Watchdog:
    """Ends the process with exit code 76 and every thread's stack when no beat comes in time."""

    def __init__(self, folder: Path, rank: int, floor_s: float):
        self.path, self.floor_s = folder / f"stacks-{rank}.txt", floor_s
        self.last, self.times, self.patience = time.monotonic(), deque(maxlen=100), 1
        self.closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self) -> None:
        """A step has ended."""
        now = time.monotonic()
        self.times.append(now - self.last)
        self.last = now

    def limit(self) -> float:
        return self.patience * max(self.floor_s, 10 * statistics.median(self.times) if self.times else 0.0)

    @contextlib.contextmanager
    def allow_longer(self) -> Iterator[None]:
        """Around an evaluation or a save, which may take as long as many steps."""
        self.patience = PATIENCE
        try:
            yield
        finally:
            self.last, self.patience = time.monotonic(), 1

    def close(self) -> None:
        self.closed.set()

    def _watch(self) -> None:
        while not self.closed.wait(min(5.0, self.floor_s / 4)):
            waited = time.monotonic() - self.last
            if waited > self.limit():
                message = f"rank hung on {socket.gethostname()}: no step for {waited:.0f} s; stacks in {self.path}"
                print(message, file=sys.stderr, flush=True)
                with open(self.path, "w") as file:
                    file.write(message + "\n")
                    faulthandler.dump_traceback(file, all_threads=True)
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                os._exit(HANG)


def check_skipped(skipped_in_a_row: int, config: HealthConfig) -> None:
    if skipped_in_a_row >= config.max_skipped:
        raise Diverged(
            f"{skipped_in_a_row} steps in a row had a non-finite loss or gradient. Lower the learning rate, lengthen the "
            "warm-up, or use precision=fp32; the last good checkpoint is kept."
        )


def find_straggler(step_seconds: list[float], hosts: list[str]) -> dict[str, float] | None:
    """How far the slowest rank's own work (without waiting) is above the median; None below 1.5 ×."""
    median = statistics.median(step_seconds)
    worst = max(range(len(step_seconds)), key=step_seconds.__getitem__)
    if len(step_seconds) > 1 and step_seconds[worst] > 1.5 * median:
        return {"rank": worst, "host": hosts[worst], "ratio": step_seconds[worst] / max(median, 1e-9)}
    return None


def exit_with_parent() -> None:
    """A rank must not outlive the process that started it: an orphan would hold the stage's lock."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()
