"""Signals and the end of the allocation. In the training loop they set a flag, on which all ranks agree before they save
and stop together; everywhere else they interrupt: what is done there can be done again."""

import os
import signal
import time

MARGIN_S = 120  # time kept for saving before a known end of the allocation; a tenth of what is left where that is less


class Preemption:
    """Turns USR2, TERM, INT and the approaching SLURM_JOB_END_TIME into `requested`. A second INT kills as usual."""

    def __init__(self):
        self.reason: str | None = None
        end = os.environ.get("SLURM_JOB_END_TIME")
        self.deadline = float(end) if end else None
        self.margin = min(MARGIN_S, max(0.0, self.deadline - time.time()) / 10) if self.deadline else 0.0

    def __enter__(self) -> "Preemption":
        self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)}
        if self.deadline and not signal.getitimer(signal.ITIMER_REAL)[0]:  # else Interruptible is about to end the process
            # An evaluation may last longer than the margin. Killed now, the job goes on from its last checkpoint; killed
            # by Slurm for its time limit, it and the jobs that wait for it are lost.
            signal.setitimer(signal.ITIMER_REAL, max(1.0, self.deadline - self.margin / 6 - time.time()))
        return self

    def __exit__(self, *_) -> None:
        if self.deadline:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        if number == signal.SIGINT and self.reason:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        if self.reason is None and self.deadline and time.time() > self.deadline - self.margin:
            self.reason = "the end of the allocation"
        return self.reason is not None


class Interruptible:
    """Within it USR2 and TERM raise KeyboardInterrupt, as INT does. For code whose work can be done again.

    A library may swallow the KeyboardInterrupt, for example in a bare `except:` around an optional import. So a signal also
    starts a timer: SIGALRM kills a process that has not left the block GRACE_S seconds later.

    Attributes:
        signalled: USR2 or TERM has arrived.
    """

    GRACE_S = 30

    def __init__(self):
        self.signalled = False

    def __enter__(self) -> "Interruptible":
        self.previous = {s: signal.signal(s, self._interrupt) for s in (signal.SIGUSR2, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        if self.signalled:
            signal.alarm(0)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _interrupt(self, _number, _frame) -> None:
        if not self.signalled:  # a second signal must not interrupt the handling of the first
            self.signalled = True
            signal.alarm(self.GRACE_S)
            raise KeyboardInterrupt
