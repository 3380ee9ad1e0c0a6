"""Reactions to the signals USR2, TERM and INT, and to the end of a Slurm allocation.

In the training loop (Preemption) a signal only sets a flag. The ranks agree on the flag at each step, then save and stop
together. Elsewhere (Interruptible) a signal raises KeyboardInterrupt, because that work can be repeated after a restart.
"""

import os
import signal
import time
from types import FrameType

MARGIN_S = 120  # seconds reserved for saving before the allocation ends; at most a tenth of the time left at the start


class Preemption:
    """Records requests to stop. The training loop runs inside its context and reads `requested` at each step.

    USR2, TERM, INT and the approaching SLURM_JOB_END_TIME request a stop. An INT after another signal raises
    KeyboardInterrupt.

    Attributes:
        reason: What requested the stop, or None: the signal's name or "the end of the allocation".
        deadline: When the allocation ends, by time.monotonic(), which no change of the clock affects; None if unknown.
        margin: How many seconds before the deadline a stop is requested.
    """

    def __init__(self):
        self.reason: str | None = None
        end = os.environ.get("SLURM_JOB_END_TIME")
        left = float(end) - time.time() if end else None
        self.deadline = time.monotonic() + left if left is not None else None
        self.margin = min(MARGIN_S, max(0.0, left) / 10) if left is not None else 0.0

    def __enter__(self) -> "Preemption":
        self.previous = {s: signal.signal(s, self._request_stop) for s in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)}
        # Let SIGALRM kill this process shortly before the allocation ends. An evaluation may last longer than the margin, so
        # the loop may read `requested` too late. After SIGALRM the batch script requeues the job, which resumes from its
        # last checkpoint. If Slurm ended the job at its time limit, the job and the jobs that depend on it would be lost.
        # Do not replace a timer that runs: Interruptible has started it to kill the process.
        self.timer_started = self.deadline is not None and not signal.getitimer(signal.ITIMER_REAL)[0]
        if self.timer_started:
            signal.setitimer(signal.ITIMER_REAL, max(1.0, self.deadline - self.margin / 6 - time.monotonic()))
        return self

    def __exit__(self, *_: object) -> None:
        if self.timer_started:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request_stop(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        """Whether this rank should stop."""
        if self.reason is None and self.deadline and time.monotonic() > self.deadline - self.margin:
            self.reason = "the end of the allocation"
        return self.reason is not None


class Interruptible:
    """Makes USR2 and TERM raise KeyboardInterrupt inside its context, as INT does. Every rank runs a stage inside one.

    A library may swallow the KeyboardInterrupt, for example in a bare `except:` around an optional import. So a signal also
    starts a timer: SIGALRM kills a process that has not left the block GRACE_S seconds later.

    Attributes:
        signalled: Whether USR2 or TERM has arrived.
    """

    GRACE_S = 30

    def __init__(self):
        self.signalled = False

    def __enter__(self) -> "Interruptible":
        self.previous = {s: signal.signal(s, self._interrupt) for s in (signal.SIGUSR2, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        if self.signalled:
            signal.alarm(0)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if not self.signalled:  # otherwise a second signal would interrupt the handling of the first
            self.signalled = True
            signal.alarm(self.GRACE_S)
            raise KeyboardInterrupt
