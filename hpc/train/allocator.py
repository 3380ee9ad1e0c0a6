"""The C library's allocator, as training on a CPU wants it."""

import contextlib
import ctypes

import torch

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # mallopt's names, malloc.h


def keep_pages(device: torch.device) -> None:
    """Where the device is a CPU, freed memory stays with the process. glibc would hand large tensors' pages back at each
    step and fetch them anew, a fault each: a tenth of a step of a VQ-VAE-2. The process then holds the most it ever held.
    Other C libraries stay as they are."""
    if device.type != "cpu":
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, -1)
