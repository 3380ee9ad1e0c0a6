"""JSONL is the truth, MLflow follows.

A stage writes metrics.jsonl and images/ and waits for nobody. `sync` sends what is new to MLflow, from whichever process
has time: a thread beside the training (Follower) or the page's own process (serve). A server that is away, hangs or loses
an answer costs nothing, because the file stays, and because what was sent is known by asking the server. A (metric,
samples) pair is sent once, so that a line which is trained again after a resume does not double a point.

MLflow's step is `samples`: steps mean something else after a change of batch size, samples never do.
This is the only file that imports mlflow, and it does so where there is something to send: the import takes seconds.
"""

import contextlib
import functools
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from hpc.errors import UserError
from hpc.rundir import atomic_write, lock

METRICS = "metrics.jsonl"
NAME = re.compile(r"[\w\-.: ]+(/[\w\-.: ]+)*")  # what MLflow takes as a metric's name
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the default of 7 blocks for 247 s when the server is gone
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a clinic's machine calls nobody
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 8 processes of 160 MB each, unused here
}
_checked: set[tuple[Path, str, str]] = set()  # (run, uri, stage) whose state on the server this process has asked for


class TrackError(RuntimeError):
    """MLflow did not take what was sent. Nothing is lost: the next sync sends it."""


@dataclass
class SyncResult:
    """What a sync sent. busy: another process is syncing this run at this moment, so this one did nothing."""

    metrics: int = 0
    images: int = 0
    busy: bool = False


class Tracker:
    """Writes one stage's metrics.jsonl and images/. For rank 0: with enabled=False every method does nothing."""

    def __init__(self, stage_dir: Path, enabled: bool = True):
        self.stage_dir, self.enabled, self._file = Path(stage_dir), enabled, None

    def resume(self, samples: int) -> None:
        """Goes back to a checkpoint's `samples`: later lines, later pictures and torn lines are removed."""
        self.close()
        path = self.stage_dir / METRICS
        if self.enabled and path.exists():
            with open(path, "rb") as file:
                lines = list(file)
            kept = [line for line in lines if (row := _parse(line)) and row["samples"] <= samples]
            if len(kept) < len(lines):
                atomic_write(path, b"".join(kept))
        for picture in _pictures(self.stage_dir) if self.enabled else ():
            if _picture_key(picture)[1] > samples:
                picture.unlink()

    def log(self, step: int, samples: int, metrics: dict[str, float]) -> None:
        """Appends {"step", "samples", "time" (unix seconds), "<metric>": value}; readers see the line on return.

        JSON has no NaN and no infinity: they are written as the strings "nan", "inf", "-inf" (read_metrics undoes that).
        """
        if not self.enabled:
            return
        row = {"step": int(step), "samples": int(samples), "time": round(time.time(), 3)}
        for name, value in metrics.items():
            assert NAME.fullmatch(name) and len(name) <= 250 and name not in row, f"not a metric's name: {name!r}"
            row[name] = float(value) if math.isfinite(value) else str(float(value))
        if self._file is None:
            self.stage_dir.mkdir(parents=True, exist_ok=True)
            self._file = open(self.stage_dir / METRICS, "ab")  # noqa: SIM115
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def image(self, name: str, samples: int, png: bytes) -> None:
        """Writes images/<name>-<samples>.png, whole or not at all."""
        if self.enabled:
            atomic_write(self.stage_dir / "images" / f"{name}-{samples:09d}.png", png)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _parse(line: bytes) -> dict | None:
    """A line's content, non-finite values restored; None for a torn one."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else {}
        assert row["samples"] >= 0 and row["time"] >= 0
    except (ValueError, LookupError, TypeError, AssertionError):
        return None
    return {name: float(value) if value in ("nan", "inf", "-inf") else value for name, value in row.items()}


def read_metrics(stage_dir: Path) -> list[dict]:
    """All whole lines of a stage's metrics.jsonl, [] where there is none; torn lines are passed over."""
    try:
        with open(Path(stage_dir) / METRICS, "rb") as file:
            return [row for line in file if (row := _parse(line))]
    except FileNotFoundError:
        return []


def _pictures(stage_dir: Path) -> list[Path]:
    return sorted((stage_dir / "images").glob("*.png"), key=_picture_key)


def _picture_key(picture: Path) -> tuple[str, int]:
    name, _, samples = picture.stem.rpartition("-")
    return (name, int(samples)) if samples.isdecimal() else (picture.stem, 0)


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


def default_uri(run_dir: Path) -> str:
    """MLFLOW_TRACKING_URI, else the sqlite file beside the run directories."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(run_dir).absolute().parent}/mlflow.db"


def link(run_dir: Path, uri: str) -> str | None:
    """Where a person can look: a run's address on a server, the command for sqlite, None before the first sync."""
    store = _json(Path(run_dir) / "mlflow.json").get("stores", {}).get(_public(uri), {})
    if uri.startswith("sqlite:") or "id" not in store.get("parent", {}):
        return "lesiongen ui" if uri.startswith("sqlite:") else None
    return f"{_public(uri).rstrip('/')}/#/experiments/{store['experiment']}/runs/{store['parent']['id']}"


def _public(text: object) -> str:
    """Without the user and password a URI may carry: run directories and logs are shared."""
    return re.sub(r"://[^@/\s]*@", "://", str(text))


def _json(path: Path) -> dict:
    return json.loads(path.read_bytes()) if path.exists() else {}


@functools.cache
def _client(uri: str):
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # the first use of a sqlite file tells of every migration
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def sync(run_dir: Path, uri: str) -> SyncResult:
    """Sends what is new in all stage directories of a run, nothing twice, also after a crash between any two lines.

    One experiment per config name, one parent run per run directory, one child run per stage. Raises TrackError.
    """
    run_dir = Path(run_dir).absolute()
    stages = sorted(p.parent for p in run_dir.glob(f"*/{METRICS}") if not p.parent.name.startswith("."))
    if not stages and not (run_dir / "report" / "report.html").exists():
        return SyncResult()
    with contextlib.ExitStack() as stack:
        try:
            try:
                stack.enter_context(lock(run_dir / ".mlflow"))
            except UserError:
                return SyncResult(busy=True)
            try:
                return _Sync(run_dir, uri).run(stages)
            except Exception as error:
                if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                    raise
            return _Sync(run_dir, uri, forget=True).run(stages)  # the store was emptied; what it has is found by its tag
        except Exception as error:
            reason = (_public(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise TrackError(f"MLflow at {_public(uri)}: {reason}") from error


class _Sync:
    """One sync of one run, under its lock.

    mlflow.json is {"uid", "stores": {uri: {"experiment", "parent": entry, "stages": {name: entry}}}}; an entry has the
    run's "id", the stamps of its files when all was sent ("seen"), and for a stage "offset", "tail", "last", "images".
    """

    def __init__(self, run_dir: Path, uri: str, forget: bool = False):
        self.run_dir, self.uri, self.sent = run_dir, uri, SyncResult()
        self.state = _json(run_dir / "mlflow.json") or {"uid": uuid.uuid4().hex, "stores": {}}
        if forget:
            self.state["stores"].pop(_public(uri), None)
        self.store = self.state["stores"].setdefault(_public(uri), {"parent": {}, "stages": {}})
        path = run_dir / "config.yaml"
        self.config = (yaml.safe_load(path.read_bytes()) if path.exists() else None) or {}

    def run(self, stages: list[Path]) -> SyncResult:
        before = json.dumps(self.state)
        try:
            if self._parent():
                for stage in stages:
                    self._stage(stage)
                self._parent()  # the stages may have finished
        finally:
            if json.dumps(self.state) != before:
                self._save()
        return self.sent

    def _save(self) -> None:
        atomic_write(self.run_dir / "mlflow.json", json.dumps(self.state, indent=1).encode() + b"\n")

    def _experiment(self) -> str:
        client, name = _client(self.uri), str(self.config.get("name", self.run_dir.name))
        if client.get_experiment_by_name(name) is None:
            artifacts = (self.run_dir.parent / "mlartifacts" / name).as_uri() if self.uri.startswith("sqlite:") else None
            with contextlib.suppress(Exception):  # another run of this name may be faster; if not, the next line tells
                client.create_experiment(name, artifacts)
        experiment = client.get_experiment_by_name(name)
        if experiment is None or experiment.lifecycle_stage != "active":
            raise TrackError(f"experiment {name!r} cannot be made, or was deleted: restore it, or rename the run")
        self.store["experiment"] = experiment.experiment_id
        return experiment.experiment_id

    def _open(self, entry: dict, uid: str, name: str, config: dict, created: float | None = None, **tags: str):
        """The server's run of an entry, made if need be; None where a person deleted it on the page: it stays deleted."""
        from mlflow.entities import Param, RunTag

        client = _client(self.uri)
        if "id" not in entry:  # tag first, id second: a crash between them leaves no second run
            experiment = self._experiment()
            self._save()
            tags |= {"track.uid": uid, "track.dir": str(self.run_dir)}
            found = client.search_runs([experiment], f"tags.`track.uid` = '{uid}'", run_view_type=3, max_results=1)
            run = found[0] if found else client.create_run(experiment, int(created * 1000) if created else None, tags, name)
            entry["id"] = run.info.run_id
        run = client.get_run(entry["id"])
        if run.info.lifecycle_stage != "active":
            return None
        # MLflow refuses to change a parameter: what is missing is logged, a new value becomes a tag beside the old one.
        flat, known = dict(_flatten(config)), run.data.params | run.data.tags
        params = [Param(k, v) for k, v in flat.items() if k not in run.data.params]
        ...
