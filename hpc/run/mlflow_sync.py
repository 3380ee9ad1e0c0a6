"""JSONL is the truth, MLflow follows.

A stage writes metrics.jsonl and images/ and waits for nobody. `sync` sends what is new, from whichever process has the
time: a thread beside the training (Follower) or the page's own process (launch/ui.py). A server that is away, hangs or loses
an answer costs nothing: the file stays, and what was sent is known by asking the server. A (metric, samples) pair is
sent once, so a line that is trained again after a resume doubles no point.

MLflow's step is `samples`: steps mean something else after a change of batch size, samples never do.
This is the only file that imports mlflow, and only where there is something to send: the import takes seconds.
"""

import contextlib
import functools
import json
import logging
import math
import os
import re
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from hpc.errors import UserError
from hpc.run.metrics_log import METRICS
from hpc.run.rundir import atomic_write, lock

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the default of 7 blocks for 247 s when the server is gone
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a clinic's machine calls nobody
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 8 processes of 160 MB each, unused here
}
_checked: set[tuple[Path, str]] = set()  # (run, uri) of which this process has asked the server what it has


class SyncError(RuntimeError):
    """MLflow did not take what was sent. Nothing is lost: the next sync sends it."""


@dataclass
class SyncResult:
    """What a sync sent. busy: another process is syncing this run at this moment, so this one did nothing."""

    metrics: int = 0
    images: int = 0
    busy: bool = False


def default_uri(run_dir: Path) -> str:
    """MLFLOW_TRACKING_URI, else the sqlite file beside the run directories."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(run_dir).absolute().parent}/mlflow.db"


def link(run_dir: Path, uri: str) -> str | None:
    """Where a person can look: a run's address on a server, the command for sqlite, None before the first sync."""
    if uri.startswith("sqlite:"):
        return "lesiongen ui"
    store = _json(Path(run_dir) / "mlflow.json").get("stores", {}).get(_public(uri), {})
    if not uri.startswith("http") or "id" not in store.get("parent", {}):
        return None
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

    One experiment per config name, one parent run per run directory, one child run per stage. Raises SyncError.
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
                return _Sync(run_dir, uri, stages).run()
            except Exception as error:
                if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                    raise
            # The store was emptied or replaced: all is sent again, but for what it has, which is found by its tag.
            return _Sync(run_dir, uri, stages, forget=True).run()
        except Exception as error:
            reason = (_public(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise SyncError(f"MLflow at {_public(uri)}: {reason}") from error


class _Sync:
    """One sync of one run, under its lock.

    mlflow.json: {"uid", "stores": {uri: {"experiment", "seen": how each stage's files were when all was sent, "parent":
    entry, "stages": {name: entry}}}}. An entry is a run's "id" and its cursor: for lines "offset", "tail" (checksum of
    the bytes before it) and "last" ({metric: samples}), for files "sent".
    """

    def __init__(self, run_dir: Path, uri: str, stages: list[Path], forget: bool = False):
        self.run_dir, self.uri, self.stages, self.result = run_dir, uri, stages, SyncResult()
        self.state = _json(run_dir / "mlflow.json") or {"uid": uuid.uuid4().hex, "stores": {}}
        if forget:
            self.state["stores"].pop(_public(uri), None)
        self.store = self.state["stores"].setdefault(_public(uri), {"seen": {}, "parent": {}, "stages": {}})
        path = run_dir / "config.yaml"
        self.config = (yaml.safe_load(path.read_bytes()) if path.exists() else None) or {}

    def run(self) -> SyncResult:
        page, key = self.run_dir / "report" / "report.html", (self.run_dir, self.uri)
        files = (METRICS, "images", "stage.json", "../config.yaml")
        now = {p.name: [_stamp(p / file) for file in files] for p in self.stages}
        now["report.html"] = [_stamp(page), _stamp(page.with_name("stage.json"))]
        news = [p for p in self.stages if key not in _checked or now[p.name] != self.store["seen"].get(p.name)]
        if not news and now == self.store["seen"]:
            return self.result
        try:
            if parent := self._open(self.store["parent"], self.state["uid"], self.run_dir.name, self.config):
                for stage in news:
                    self._stage(stage)
                if page.exists() and self.store["parent"].get("sent") != (stamp := _stamp(page)):
                    _client(self.uri).log_artifact(parent.info.run_id, str(page))
                    self.store["parent"]["sent"] = stamp
                records = [_json(p / "stage.json") for p in [*self.stages, page.parent]]
                self._status(parent, all(r.get("done") for r in records), records[-1])
            self.store["seen"] = now
            _checked.add(key)
        finally:
            self._save()
        return self.result

    def _save(self) -> None:
        atomic_write(self.run_dir / "mlflow.json", json.dumps(self.state, indent=1).encode() + b"\n")

    def _open(self, entry: dict, uid: str, name: str, params: dict, created: float | None = None, parent: str = ""):
        """The server's run of an entry, made if need be. None if a person deleted it on the page: it stays deleted."""
        from mlflow.entities import Param

        client = _client(self.uri)
        if "id" not in entry:
            experiment = self.store["experiment"] = self._experiment()
            self._save()  # the uid first, then the run that bears it, then its id: a crash leaves no second run
            found = client.search_runs([experiment], f"tags.`track.uid` = '{uid}'", run_view_type=3, max_results=1)
            tags, start = {"track.uid": uid, "track.dir": str(self.run_dir)}, int(created * 1000) if created else None
            if parent:
                tags["mlflow.parentRunId"] = parent
            entry["id"] = (found[0] if found else client.create_run(experiment, start, tags, name)).info.run_id
        run = client.get_run(entry["id"])
        if run.info.lifecycle_stage != "active":
            return None
        # Only what is missing: MLflow refuses to change a parameter.
        new = [Param(k, v) for k, v in dict(_flatten(params)).items() if k not in run.data.params]
        for i in range(0, len(new), 100):
            client.log_batch(entry["id"], params=new[i : i + 100], synchronous=True)
        return run

    def _experiment(self) -> str:
        client, name = _client(self.uri), str(self.config.get("name", self.run_dir.name))
        if client.get_experiment_by_name(name) is None:
            beside = (self.run_dir.parent / "mlartifacts" / name).as_uri()
            with contextlib.suppress(Exception):  # another run of this name may be faster; if not, the next lines tell
                client.create_experiment(name, beside if self.uri.startswith("sqlite:") else None)
        experiment = client.get_experiment_by_name(name)
        if experiment is None or experiment.lifecycle_stage != "active":
            raise SyncError(f"experiment {name!r} cannot be made, or was deleted: restore it, or rename the run")
        return experiment.experiment_id

    def _stage(self, path: Path) -> None:
        client, record, name = _client(self.uri), _json(path / "stage.json"), path.name
        entry, created = self.store["stages"].setdefault(name, {}), record.get("created")
        if created and entry.get("created", created) != created:  # made anew with --fresh: another run
            old = client.get_run(entry["id"]).info
            if (old.status, old.lifecycle_stage) == ("RUNNING", "active"):
                client.set_terminated(entry["id"], "KILLED")
            entry = self.store["stages"][name] = {}
        section = self.config.get(name, self.config.get(name.split("-")[0], {}))
        params = {k: v for k, v in self.config.items() if not isinstance(v, dict)} | {name: section}
        uid, parent = f"{self.state['uid']}/{name}/{created}", self.store["parent"]["id"]
        run = self._open(entry, uid, name, params, created, parent)
        if created:
            entry["created"] = created
        if run is None:
            return
        self._lines(path / METRICS, entry, run)
        for picture in sorted((path / "images").glob("*.png")):
            if picture.name not in entry.setdefault("sent", []):
                client.log_artifact(entry["id"], str(picture), "images")
                entry["sent"].append(picture.name)
                self.result.images += 1
        self._status(run, bool(record.get("done")), record)

    def _lines(self, path: Path, entry: dict, run) -> None:
        """Sends the lines after the cursor, without the values that the server has.

        It has all up to the latest step of each metric: a request is one transaction there, so this is exact even where
        the answer to the last one was lost.
        """
        from mlflow.entities import Metric

        last, batch, offset = dict(entry.get("last", {})), [], entry.get("offset", 0)
        for metric in run.data.to_proto().metrics:
            last[metric.key] = max(metric.step, last.get(metric.key, -1))
        if _tail(path, offset) != entry.get("tail", 0):  # cut back by a resume, even if it is longer again by now
            offset = 0

        def send() -> None:
            for i in range(0, len(batch), 1000):  # as many as MLflow takes
                _client(self.uri).log_batch(entry["id"], batch[i : i + 1000], synchronous=True)
            self.result.metrics += len(batch)
            entry.update(offset=offset, tail=_tail(path, offset), last=dict(last))
            batch.clear()

        with open(path, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                try:
                    row = json.loads(line)
                except ValueError:  # torn by a crash
                    row = {}
                # The line's own time: should a request arrive twice after all, MLflow's keys make it one point.
                samples, time_ms = row.get("samples", -1), int(row.pop("time", 0) * 1000)
                new = {name: float(value) for name, value in row.items() if samples > last.get(name, -1)}
                if len(batch) + len(new) > 1000:
                    send()
                # MLflow draws infinity as 1.8e308, and NaN not at all.
                batch += [Metric(k, v if math.isfinite(v) else math.nan, time_ms, samples) for k, v in new.items()]
                last |= dict.fromkeys(new, samples)
                offset += len(line)
            send()

    def _status(self, run, done: bool, record: dict) -> None:
        if done and run.info.status != "FINISHED":
            end = record.get("finished")
            _client(self.uri).set_terminated(run.info.run_id, "FINISHED", int(end * 1000) if end else None)
        elif not done and run.info.status != "RUNNING":  # a longer training of a finished stage
            _client(self.uri).update_run(run.info.run_id, "RUNNING")


def _stamp(path: Path) -> list[int] | None:
    return [path.stat().st_mtime_ns, path.stat().st_size] if path.exists() else None


def _tail(path: Path, offset: int) -> int:
    """Checksum of the bytes before an offset; the times of the lines make it unique."""
    with open(path, "rb") as file:
        file.seek(max(0, offset - 256))
        return zlib.crc32(file.read(min(256, offset)))


def _flatten(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and short strings, as MLflow takes them."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        yield re.sub(r"[^\w\-. /:]", "_", prefix)[:250], text[:500]


class Follower:
    """A daemon thread that syncs a run every `interval` s. It never blocks the training, nor the interpreter's exit.

    failures: how many syncs have failed so far. The file is the queue: memory is bounded however long a server is away.
    """

    def __init__(self, run_dir: Path, uri: str, interval: float = 5.0):
        self.run_dir, self.uri, self.interval, self.failures = Path(run_dir), uri, interval, 0
        self._stop, self._deadline, self._delivered = threading.Event(), math.inf, False
        self._thread = threading.Thread(target=self._loop, name="mlflow", daemon=True)
        self._thread.start()

    def close(self, deadline: float = 15.0) -> bool:
        """One last sync, given up after `deadline` s. Whether all was delivered; if not, a line says so."""
        self._deadline = time.monotonic() + deadline
        self._stop.set()
        self._thread.join(deadline)
        if not self._delivered:
            say(f"MLflow at {_public(self.uri)} did not take the last lines; they are kept for the next sync.")
        return self._delivered

    def _loop(self) -> None:
        failed = 0
        while True:
            last = self._stop.wait(min(self.interval * 2**failed, 60.0))
            try:
                while (busy := sync(self.run_dir, self.uri).busy) and last and time.monotonic() < self._deadline:
                    time.sleep(0.1)
                if failed:
                    say(f"MLflow at {_public(self.uri)} is back.")
                failed, self._delivered = 0, last and not busy
            except Exception as error:
                self.failures += 1
                failed = min(failed + 1, 8)
                if failed == 1:
                    say(f"{error}. Training goes on; the lines are sent when it is back.")
            if last:
                return


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
