"""Measures the speed of a training, and finds a rank that is slower than the others.

A rank's own time is the time in which it waits for no other rank: for its data, and in the forward pass. The backward pass and
the optimizer's step contain collectives, in which all ranks take as long as the slowest. Under ZeRO 3 the forward pass contains
collectives too, so there only the time for the data counts.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator

import torch

RATIO = 1.5  # a straggler's own time is above this many times the median of all ranks,
SHARE = 0.1  # and the difference is above this share of the time of training,
IN_A_ROW = 3  # in this many log intervals one after another


class Stopwatch:
    """Sums the time that a device spends in a block. Never waits for the device, except in take().

    Args:
        device: The device that runs the block.
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Adds the time of the block."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - began
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self.events.append((start, end))

    def take(self) -> float:
        """Returns the seconds since the last call."""
        if self.events:
            self.events[-1][1].synchronize()
        seconds = self.seconds + sum(start.elapsed_time(end) for start, end in self.events) / 1000
        self.seconds, self.events = 0.0, []
        return seconds


class Speed:
    """Measures images per second and seconds spent waiting for data, since the last log line."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Starts a new interval."""
        self.began, self.images, self.waited = time.monotonic(), 0, 0.0

    def count(self, images: int) -> None:
        """Adds the images of a step that has ended."""
        self.images += images

    def seconds(self) -> float:
        """Returns the time of training in the interval."""
        return max(time.monotonic() - self.began, 1e-9)

    def rate(self) -> float:
        """Returns images per second over all ranks."""
        return self.images / self.seconds()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out of the interval."""
        began = time.monotonic()
        yield
        self.began += time.monotonic() - began

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting for data."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began


class Stragglers:
    """Finds a rank that stays slower than the others. The training loop calls find() after each log interval."""

    def __init__(self):
        self.rank, self.intervals = -1, 0  # the slowest rank, and for how many intervals it has been slow

    def find(self, own: list[float], interval: float) -> tuple[int, float] | None:
        """Returns (rank, ratio of its own time to the median) of a straggler, or None.

        One slow interval is common on a shared machine, so a rank must be slow IN_A_ROW times.

        Args:
            own: Each rank's own time in the interval, in seconds.
            interval: Time of training in the interval, in seconds.
        """
        # The lower median: of two ranks it is the time of the faster one.
        median, slowest = statistics.median_low(own), max(range(len(own)), key=own.__getitem__)
        slow = len(own) > 1 and own[slowest] > RATIO * median and own[slowest] - median > SHARE * interval
        self.intervals = (self.intervals + 1 if slowest == self.rank else 1) if slow else 0
        self.rank = slowest
        return (slowest, own[slowest] / max(median, 1e-9)) if self.intervals >= IN_A_ROW else None
