"""Signals and the end of the allocation only set a flag; the loop agrees on it and stops everyone together."""

import os
import signal
import subprocess
import time

MARGIN_S = 120  # time kept for saving before a known end of the allocation


class Preemption:
    """Turns USR2, TERM, INT and the approaching SLURM_JOB_END_TIME into `requested`. A second INT kills as usual."""

    def __init__(self):
        self.reason: str | None = None
        end = os.environ.get("SLURM_JOB_END_TIME")
        self.deadline = float(end) if end else None

    def __enter__(self) -> "Preemption":
        self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        if number == signal.SIGINT and self.reason:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        if self.reason is None and self.deadline and time.time() > self.deadline - MARGIN_S:
            self.reason = "the end of the allocation"
        return self.reason is not None


def requeue() -> str | None:
    """Puts this Slurm job back into the queue; None on success, else the reason it could not be."""
    try:
        command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip()
