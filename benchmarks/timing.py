"""Seconds of work on the device that benchmarks run on: this machine's GPU where it has one."""

import time
from collections.abc import Callable

import torch

from hpc.dist import Topology

DEVICE = Topology().device


def timed(work: Callable[[], object], number: int = 1) -> float:
    """Seconds of one of so many, until the device has ended it."""
    began = time.perf_counter()
    for _ in range(number):
        work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / number
