"""What a stage writes of itself: metrics.jsonl, the truth that MLflow follows, and pictures beside it."""

import contextlib
import math
import re
import sys
import time
from pathlib import Path

from hpc.run import journal
from hpc.run.rundir import atomic_write

METRICS = "metrics.jsonl"
NAME = re.compile(r"(?=.{1,250}$)[\w\-.: ]+(/[\w\-.: ]+)*")  # what MLflow takes as a metric's name


def metric_name(name: str) -> str:
    """One part of a metric's name, whatever people call a thing: "Melanoma, NOS" → "Melanoma_ NOS"."""
    return re.sub(r"[^\w\-.: ]", "_", name)[:100] or "none"


class MetricsLog:
    """Writes one stage's metrics.jsonl and images/. For rank 0: with enabled=False every method does nothing."""

    def __init__(self, stage_dir: Path, enabled: bool = True):
        self.stage_dir, self.enabled = Path(stage_dir), enabled

    def resume(self, samples: int) -> None:
        """Goes back to a checkpoint's `samples`: later lines, later pictures and torn lines are removed."""
        if self.enabled:
            journal.cut_back(self.stage_dir / METRICS, samples)
        for picture in self.stage_dir.glob("images/*.png") if self.enabled else ():
            count = picture.stem.rpartition("-")[2]
            if count.isdecimal() and int(count) > samples:
                picture.unlink()

    def log(self, step: int, samples: int, metrics: dict[str, float]) -> None:
        """Appends {"step", "samples", "time" (unix seconds), "<metric>": value}; readers see the line on return.

        JSON has no NaN and no infinity: they are written as strings, "nan", "inf", "-inf" (read_metrics undoes that).
        """
        if not self.enabled:
            return
        row = {"step": int(step), "samples": int(samples), "time": round(time.time(), 3)}
        for name, value in metrics.items():
            assert name not in row, f"a metric may not be called {name!r}"
            assert NAME.fullmatch(name), f"MLflow takes no metric called {name!r}"
            row[name] = float(value) if math.isfinite(value) else str(float(value))
        self.stage_dir.mkdir(parents=True, exist_ok=True)
        journal.append(self.stage_dir / METRICS, row)

    def image(self, name: str, samples: int, png: bytes) -> None:
        """Writes images/<name>-<samples>.png, whole or not at all."""
        if self.enabled:
            atomic_write(self.stage_dir / "images" / f"{name}-{samples:09d}.png", png)

    def close(self) -> None:
        """Nothing is held open; here for whoever closes all resources alike."""


def read_metrics(stage_dir: Path) -> list[dict]:
    """All lines of a stage's metrics.jsonl, [] where there is none; torn ones are passed over."""
    rows = journal.read(Path(stage_dir) / METRICS)
    return [{name: float(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows]


def system_metrics() -> dict[str, float]:
    """Load of this machine and process, in percent and GB (1e9 bytes). The first call's CPU percentage is 0."""
    import psutil

    found = {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_resident_gb": psutil.Process().memory_info().rss / 1e9,
        "system/memory_available_gb": psutil.virtual_memory().available / 1e9,
    }
    torch = sys.modules.get("torch")  # a process without torch holds no GPU
    if torch is not None and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["system/gpu_memory_gb"] = (total - free) / 1e9
        found["system/gpu_memory_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9  # of this process
        with contextlib.suppress(Exception):  # needs nvidia-ml-py, and a driver that tells
            found["system/gpu_percent"] = float(torch.cuda.utilization())
    return found
