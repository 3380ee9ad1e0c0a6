"""Seconds of work on the device that benchmarks run on: this machine's GPU where it has one."""

import contextlib
import time
from collections.abc import Callable

import torch
import torch.multiprocessing as multiprocessing

from hpc.dist import Topology
from hpc.train import allocator

DEVICE = Topology().device


def timed(work: Callable[[], object], number: int = 1) -> float:
    """Seconds of one of so many, until the device has ended it."""
    began = time.perf_counter()
    for _ in range(number):
        work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / number


class Apart:
    """A contender in a process of its own, as its users run it: neither shares the other's heap, threads or settings.
    It sleeps while others are timed.

    make(): its kinds of work, by name; picklable; keep: freed memory stays with the process, as this project has it"""

    def __init__(self, make: Callable[[], dict[str, Callable[[], object]]], keep: bool):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        context.Process(target=_serve, args=(other, make, keep), daemon=True).start()
        other.close()  # so that a contender that fails ends the benchmark

    def timed(self, kind: str, number: int = 1) -> float:
        self.pipe.send((kind, number))
        return self.pipe.recv()


def _serve(pipe, make: Callable, keep: bool) -> None:
    if keep:
        allocator.keep_pages(DEVICE)
    work = make()
    with contextlib.suppress(EOFError):  # the benchmark is over
        while True:
            kind, number = pipe.recv()
            if DEVICE.type == "cuda":
                work[kind]()
            pipe.send(timed(work[kind], number))
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()  # the others need the memory; the step that refills it is not timed
