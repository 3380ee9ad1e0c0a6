"""The memory of this process in phases: the high-water mark of its resident pages, and how much of a model it holds whole.

Linux only: the marks come from /proc. The C library must return freed memory (FREE_AT_ONCE in the environment of the process),
otherwise a phase would be charged for what the phase before it has freed.
"""

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

FREE_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "2"}
SAMPLE_S = 0.002  # how often the whole parameters are counted


def status_bytes(key: str) -> int:
    """Returns a line of /proc/self/status in bytes: VmRSS is what is resident now, VmHWM its high-water mark."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Sets the high-water mark to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


class Resident:
    """Measures phases of this process against its size when the object is made.

    Attributes:
        peaks: Phase → largest resident bytes above the size at the beginning.
        whole: Phase → largest number of bytes of parameters that were whole at one time.
    """

    def __init__(self):
        gc.collect()
        self.base = status_bytes("VmRSS")
        self.peaks: dict[str, int] = {}
        self.whole: dict[str, int] = {}
        self._parameters: list[weakref.ref] = []
        register_module_parameter_registration_hook(self._note)

    def _note(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            self._parameters.append(weakref.ref(parameter))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures the block. A second block of the same name raises its figures if they are larger."""
        reset_peak()
        ended, largest = threading.Event(), [0]

        def watch() -> None:
            while not ended.wait(SAMPLE_S):
                alive = (reference() for reference in self._parameters)
                largest[0] = max(largest[0], sum(p.data.numel() * p.element_size() for p in alive if p is not None))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            self.peaks[name] = max(self.peaks.get(name, 0), status_bytes("VmHWM") - self.base)
            self.whole[name] = max(self.whole.get(name, 0), largest[0])
