"""The metrics log of a stage: metrics.jsonl, pictures in images/, and alarms in alarms.jsonl.

metrics.jsonl is the complete record of a training; MLflow only shows a copy (see mlflow_sync.py). A resume removes the lines
and pictures that are newer than its checkpoint, so no step is logged twice. The training loop and the evaluate stage write
the log. `lesiongen status`, the report and mlflow_sync.py read the log.
"""

import contextlib
import math
import re
import sys
import time
from pathlib import Path

from hpc.run import journal
from hpc.run.rundir import atomic_write

METRICS_FILE, ALARMS_FILE = "metrics.jsonl", "alarms.jsonl"
_MLFLOW_NAME = re.compile(r"(?=.{1,250}$)[\w\-.: ]+(/[\w\-.: ]+)*")  # a metric name that MLflow accepts


def metric_name(name: str) -> str:
    """Makes one part of a metric's name from any text: "Melanoma, NOS" gives "Melanoma_ NOS"."""
    return re.sub(r"[^\w\-.: ]", "_", name)[:100] or "none"


class MetricsLog:
    """Writes metrics.jsonl and images/ of one stage. No file stays open between calls.

    Args:
        stage_dir: The stage's directory.
        enabled: True on rank 0 only. If False, every method does nothing.

    Attributes:
        stage_dir: The stage's directory.
        enabled: Whether the methods write.
    """

    def __init__(self, stage_dir: Path, enabled: bool = True):
        self.stage_dir, self.enabled = Path(stage_dir), enabled

    def resume(self, samples: int, evaluated: int | None = None) -> None:
        """Removes the lines and pictures that are newer than a checkpoint, and incomplete lines.

        Args:
            samples: Samples seen at the checkpoint; 0 for a training from scratch, -1 to remove everything.
            evaluated: Samples seen at the last evaluation that the checkpoint knows of. Lines of later evaluations are removed,
                because the resumed run evaluates again. None for a log without evaluations.
        """
        if not self.enabled:
            return

        def is_known(row: dict) -> bool:
            limit = evaluated if evaluated is not None and any(name.startswith("val/") for name in row) else samples
            return row["samples"] <= limit

        journal.cut_back(self.stage_dir / METRICS_FILE, is_known)
        for picture in self.stage_dir.glob("images/*.png"):
            if picture_name(picture)[1] > samples:
                picture.unlink()

    def log(self, step: int, samples: int, metrics: dict[str, float]) -> None:
        """Appends the line {"step", "samples", "time" (Unix time in seconds), "<metric>": value, …}.

        Other processes can read the line when the method returns. JSON has no NaN and no infinity, so these are written as
        the strings "nan", "inf" and "-inf"; read_metrics converts them back.

        Args:
            step: Optimizer steps so far.
            samples: Samples seen so far.
            metrics: Values by name. The names must be valid in MLflow.
        """
        if not self.enabled:
            return
        row = {"step": int(step), "samples": int(samples), "time": round(time.time(), 3)}
        for name, value in metrics.items():
            assert name not in row, f"the metric name {name!r} is used by the log itself"
            assert _MLFLOW_NAME.fullmatch(name), f"MLflow does not accept the metric name {name!r}"
            row[name] = float(value) if math.isfinite(value) else str(float(value))
        self.stage_dir.mkdir(parents=True, exist_ok=True)
        journal.append(self.stage_dir / METRICS_FILE, row)

    def image(self, name: str, samples: int, png: bytes) -> None:
        """Writes images/<name>-<samples>.png atomically.

        Args:
            name: What the picture shows.
            samples: Samples seen so far.
            png: The encoded picture.
        """
        if self.enabled:
            atomic_write(self.stage_dir / "images" / f"{name}-{samples:09d}.png", png)

    def alarm(self, kind: str, text: str) -> None:
        """Warns the user of something that a result may suffer from: prints it, and adds it to alarms.jsonl.

        `lesiongen status` and MLflow show the newest alarm of each kind. A resume keeps alarms: they tell what has happened.

        Args:
            kind: One word, such as "spike".
            text: What has happened, and what to do.
        """
        if self.enabled:
            print(f"warning: {text}", file=sys.stderr, flush=True)
            self.stage_dir.mkdir(parents=True, exist_ok=True)
            journal.append(self.stage_dir / ALARMS_FILE, {"kind": kind, "text": text, "time": round(time.time(), 3)})


def picture_name(path: Path) -> tuple[str, int]:
    """Returns what a picture in images/ shows, and the samples seen when it was made; 0 if its name has no number."""
    name, _, samples = path.stem.rpartition("-")
    return (name, int(samples)) if name and samples.isdecimal() else (path.stem, 0)


def read_alarms(stage_dir: Path) -> list[dict]:
    """Returns the newest alarm of each kind of a stage, oldest first: dicts with "kind", "text" and "time"."""
    newest = {entry["kind"]: entry for entry in journal.read(Path(stage_dir) / ALARMS_FILE, "kind", "text", "time")}
    return sorted(newest.values(), key=lambda entry: entry["time"])


def read_held_out(stage_dir: Path) -> tuple[int, dict[str, float]]:
    """Returns the samples of a stage's newest held-out metrics, and the latest value of each; (0, {}) without any.

    These are the metrics val/… of a training, and the metrics headline/… of an evaluation, without the first word.
    """
    samples, latest = 0, {}
    for row in read_metrics(stage_dir):
        if new := {name.partition("/")[2]: value for name, value in row.items() if name.startswith(("val/", "headline/"))}:
            samples, latest = row["samples"], latest | new
    return samples, latest


def read_metrics(stage_dir: Path) -> list[dict]:
    """Reads all lines of a stage's metrics.jsonl that are whole, or [] if there is no file."""
    return [values for row in journal.read(Path(stage_dir) / METRICS_FILE) if (values := numbers(row))]


def samples_seen(stage_dir: Path) -> int:
    """Returns how many samples a training stage has seen, from its metrics log; 0 without a log."""
    rows = read_metrics(stage_dir)
    return rows[-1]["samples"] if rows else 0


def numbers(row: dict) -> dict[str, float]:
    """Returns a line of the log with its values as numbers. Returns {} if the line is damaged or has no samples."""
    try:
        row = {name: float(value) if isinstance(value, str) else value for name, value in row.items()}
    except ValueError:
        return {}
    whole = all(isinstance(value, (int, float)) for value in row.values())
    return row if whole and isinstance(row.get("samples"), int) else {}


def system_metrics() -> dict[str, float]:
    """Measures the load of this machine and process, in percent and in GB of 1e9 bytes.

    The CPU percentage is an average since the previous call, and 0 at the first call.
    """
    import psutil

    metrics = {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_resident_gb": psutil.Process().memory_info().rss / 1e9,
        "system/memory_available_gb": psutil.virtual_memory().available / 1e9,
    }
    torch = sys.modules.get("torch")  # no import: a process that has not loaded torch uses no GPU
    if torch is not None and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        metrics["system/gpu_memory_gb"] = (total - free) / 1e9  # memory of all processes on the GPU
        metrics["system/gpu_memory_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9  # memory of this process only
        with contextlib.suppress(Exception):  # fails without nvidia-ml-py, or if the driver does not report the load
            metrics["system/gpu_percent"] = float(torch.cuda.utilization())
    return metrics
