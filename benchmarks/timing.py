"""Timing for the benchmarks, on this machine's GPU if there is one, else on the CPU."""

import contextlib
import time
from collections.abc import Callable

import torch
import torch.multiprocessing as multiprocessing

from hpc.dist import Topology
from hpc.train import allocator

DEVICE = Topology().device


def timed(work: Callable[[], object], number: int = 1) -> float:
    """Measures the mean seconds of a call, until the device has finished.

    Args:
        work: The function to time.
        number: Calls over which to take the mean.
    """
    began = time.perf_counter()
    for _ in range(number):
        work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / number


class Apart:
    """A contender that runs in a process of its own, as its users run it.

    So contenders do not share a heap, threads or settings. The process sleeps while other contenders are timed.
    """

    def __init__(self, make: Callable[[], dict[str, Callable[[], object]]], keep: bool):
        """Starts the process.

        Args:
            make: Called in the process; returns {name: function to time}. Must be picklable.
            keep: Keep freed memory in the process, as this project's trainers do (hpc/train/allocator.py).
        """
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        context.Process(target=_serve, args=(other, make, keep), daemon=True).start()
        other.close()  # otherwise recv() would wait for ever after the contender's process has failed

    def timed(self, kind: str, number: int = 1) -> float:
        """Measures, in the contender's process, the mean seconds of `number` calls of the function called `kind`."""
        self.pipe.send((kind, number))
        return self.pipe.recv()


def warm_up(contenders: dict[str, Apart], kind: str) -> None:
    """Calls the function called `kind` three times in each process: the first calls allocate, tune and compile.

    Contenders that are compiled, as their names say, do so at the same time, because compiling takes minutes of one core.
    """
    compiled = [each for name, each in contenders.items() if "compiled" in name]
    for each in compiled:
        each.pipe.send((kind, 3))
    for each in compiled:
        each.pipe.recv()
    for name, each in contenders.items():
        if "compiled" not in name:
            each.timed(kind, 3)


def _serve(pipe, make: Callable, keep: bool) -> None:
    """Runs in the contender's process: answers each (kind, number) with the seconds measured."""
    if keep:
        allocator.keep_freed_memory(DEVICE)
    work = make()
    with contextlib.suppress(EOFError):  # raised when the benchmark has ended
        while True:
            kind, number = pipe.recv()
            if DEVICE.type == "cuda":
                work[kind]()  # not timed: allocates the memory again that was freed below
            pipe.send(timed(work[kind], number))
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()  # the other contenders need the memory
