"""Copies the metrics logs of a run to MLflow. Loses nothing when this process restarts or the MLflow server fails.

A stage writes metrics.jsonl and images/ and never waits for MLflow. `sync` reads these files and sends what is new. A thread
beside the training (Follower) and the process of `lesiongen ui` (launch/ui.py) call `sync`. If the server is down or hangs, a
later sync sends the missing data from the files.

Invariant: each pair (metric, samples) is sent once. `sync` asks the server for the latest value of each metric, so no value
appears twice after a lost answer or a crash. When a resume trains some steps again, MLflow keeps the first values of these
steps.

MLflow's "step" is the number of samples seen, because the meaning of an optimizer step changes with the batch size. No other
file imports mlflow. The import takes seconds, so it happens only when there is something to send.

In this file, "run" and "run directory" mean a run of this project; "MLflow run" means an entry on MLflow's page.
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
from typing import TYPE_CHECKING

import yaml

from hpc.errors import UserError
from hpc.run import journal
from hpc.run.metrics_log import METRICS_FILE, numbers
from hpc.run.rundir import atomic_write, is_copy, location, lock

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the default of 7 blocks for 247 s when the server is down
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a clinic's machine must not contact other servers
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # avoids 8 unused processes of 160 MB each
}
SECTIONS = {"shards": "data", "codes": "encode", "samples": "sample", "report": "evaluate"}  # of stages with another name
MAX_METRICS, MAX_PARAMS = 1000, 100  # the most that MLflow accepts in one request
STALE_CLOSE_S = 5.0  # seconds that the end of a stage waits for an MLflow that has failed or hung for some time
ALL_RUNS = 3  # mlflow.entities.ViewType.ALL: active and deleted runs

# Pairs (run_dir, uri) that this process has compared with the server. The first sync of a process contacts the server even if
# mlflow.json says that everything was sent, because the server may have lost data since.
_checked: set[tuple[Path, str]] = set()


class SyncError(RuntimeError):
    """Raised if MLflow cannot be reached or refuses the data. The data stay in the files, and the next sync sends them."""


@dataclass
class SyncResult:
    """Result of one sync.

    Attributes:
        metrics: Number of values sent.
        images: Number of pictures sent.
        busy: Another process is syncing this run, so nothing was done.
    """

    metrics: int = 0
    images: int = 0
    busy: bool = False


def default_uri(run_dir: Path) -> str:
    """Returns MLFLOW_TRACKING_URI if it is set, else the URI of mlflow.db beside the run directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(run_dir).absolute().parent}/mlflow.db"


def run_link(run_dir: Path, uri: str) -> str | None:
    """Returns where a user can look at a run in MLflow.

    Args:
        run_dir: The run's directory.
        uri: The tracking URI.

    Returns:
        The address of the run's page on a server, or a command for sqlite. None if nothing was sent to the server yet.
    """
    if uri.startswith("sqlite:"):
        return "lesiongen ui"
    store = _read_json(Path(run_dir) / "mlflow.json").get("stores", {}).get(_without_password(uri), {})
    if not uri.startswith("http") or "id" not in store.get("parent", {}):
        return None
    return f"{_without_password(uri).rstrip('/')}/#/experiments/{store['experiment']}/runs/{store['parent']['id']}"


def _without_password(text: object) -> str:
    """Removes user and password from URIs in a text, because other people can read run directories and logs."""
    return re.sub(r"://[^@/\s]*@", "://", str(text))


def _read_json(path: Path) -> dict:
    return json.loads(path.read_bytes()) if path.exists() else {}


def create_store(uri: str) -> None:
    """Creates the empty file of a sqlite store if it is missing. SQLite would ignore the umask, and shut out the group."""
    if uri.startswith("sqlite:///") and not (path := Path(uri.removeprefix("sqlite:///"))).exists():
        path.touch()


@functools.cache
def _client(uri: str) -> "MlflowClient":
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # The first use of a sqlite file would log a line for every migration, and a failure its traceback: SyncError reports it.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    create_store(uri)
    return MlflowClient(tracking_uri=uri)


def sync(run_dir: Path, uri: str) -> SyncResult:
    """Sends what is new in all stage directories of a run. Nothing is sent twice, even if an earlier sync crashed.

    MLflow then holds one experiment for each config name, one parent MLflow run for each run directory, and one child MLflow
    run for each stage.

    Args:
        run_dir: The run's directory.
        uri: The tracking URI.

    Raises:
        SyncError: The server cannot be reached or refuses the data.
    """
    run_dir = Path(run_dir).absolute()
    stage_dirs = {p.parent for p in run_dir.glob(f"*/{METRICS_FILE}") if not p.parent.name.startswith(".")}
    stage_dirs |= {run_dir / name for name in SECTIONS if (run_dir / name / "stage.json").exists()}  # these may have no metrics
    stage_dirs = sorted(stage_dirs)
    if not stage_dirs and not (run_dir / "report" / "report.html").exists():
        return SyncResult()
    with contextlib.ExitStack() as held:
        try:
            try:
                held.enter_context(lock(run_dir / ".mlflow"))
            except UserError:
                return SyncResult(busy=True)
            try:
                return _Sync(run_dir, uri, stage_dirs).run()
            except Exception as error:
                if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                    raise
            # MLflow's store was emptied or replaced: forget ids and cursors. Tags identify the MLflow runs that still exist.
            return _Sync(run_dir, uri, stage_dirs, forget=True).run()
        except Exception as error:
            reason = (_without_password(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise SyncError(f"MLflow at {_without_password(uri)}: {reason}") from error


class _Sync:
    """One sync of one run. `sync` makes one while it holds the run's lock.

    The state is stored in mlflow.json:

        {"uid": identifies the run directory in MLflow,
         "directory": location of the directory that the uid was made for; a copy of the directory gets its own uid,
         "stores": {uri: {"experiment": id,
                          "seen": file stamps of each stage at the last complete sync,
                          "parent": entry,
                          "stages": {name: entry}}}}

    An entry has the "id" of an MLflow run, and records what was sent to the MLflow run. For metrics.jsonl this is a cursor:
    "offset" (in bytes), "tail" (checksum of the bytes before the offset) and "last" ({metric: samples of its latest value}). In
    the entry of a stage, "sent" lists the pictures that were sent, and "created" is the time when the stage began. In the
    parent's entry, "sent" is the stamp of the report that was sent.
    """

    def __init__(self, run_dir: Path, uri: str, stage_dirs: list[Path], forget: bool = False):
        self.run_dir, self.uri, self.stage_dirs, self.result = run_dir, uri, stage_dirs, SyncResult()
        self.state = _read_json(run_dir / "mlflow.json")
        if not self.state or ("directory" in self.state and is_copy(run_dir, self.state["directory"])):
            self.state = {"uid": uuid.uuid4().hex, "stores": {}}
        self.state["directory"] = location(run_dir)
        if forget:
            self.state["stores"].pop(_without_password(uri), None)
        self.store = self.state["stores"].setdefault(_without_password(uri), {"seen": {}, "parent": {}, "stages": {}})
        config = run_dir / "config.yaml"
        self.config = (yaml.safe_load(config.read_bytes()) if config.exists() else None) or {}

    def run(self) -> SyncResult:
        """Sends everything that is new. Contacts the server only if a file has changed, or on this process's first sync."""
        report, key = self.run_dir / "report" / "report.html", (self.run_dir, self.uri)
        # Find the stages whose files have changed.
        files = (METRICS_FILE, "images", "stage.json", "../config.yaml")
        stamps = {p.name: [_file_stamp(p / file) for file in files] for p in self.stage_dirs}
        stamps["report.html"] = [_file_stamp(report), _file_stamp(report.with_name("stage.json"))]
        changed = [p for p in self.stage_dirs if key not in _checked or stamps[p.name] != self.store["seen"].get(p.name)]
        if not changed and stamps == self.store["seen"]:
            return self.result
        # Send these stages, then the report, then the status of the whole run.
        try:
            if parent := self._get_or_create_run(self.store["parent"], self.state["uid"], self.run_dir.name, self.config):
                for stage_dir in changed:
                    self._sync_stage(stage_dir)
                if report.exists() and self.store["parent"].get("sent") != (stamp := _file_stamp(report)):
                    _client(self.uri).log_artifact(parent.info.run_id, str(report))
                    self.store["parent"]["sent"] = stamp
                records = [_read_json(p / "stage.json") for p in [*self.stage_dirs, report.parent]]
                self._set_status(parent, all(r.get("done") for r in records), records[-1])
            self.store["seen"] = stamps
            _checked.add(key)
        finally:
            self._save()
        return self.result

    def _save(self) -> None:
        atomic_write(self.run_dir / "mlflow.json", json.dumps(self.state, indent=1).encode() + b"\n")

    def _get_or_create_run(
        self, entry: dict, uid: str, name: str, params: dict, created: float | None = None, parent_id: str = ""
    ) -> "Run | None":
        """Returns the MLflow run of an entry, and creates it if needed. Returns None if a user deleted it in MLflow.

        Args:
            entry: The entry; its "id" is set if it is missing.
            uid: Value of the tag that identifies the MLflow run.
            name: Name of a new MLflow run.
            params: Parameters of the MLflow run, nested. Parameters that MLflow lacks are sent.
            created: Start of a new MLflow run, Unix time in seconds.
            parent_id: Id of the parent MLflow run; "" for the parent itself.
        """
        from mlflow.entities import Param

        client = _client(self.uri)
        if "id" not in entry:
            experiment = self.store["experiment"] = self._get_or_create_experiment()
            # Save the uid before creating the MLflow run that has the uid as a tag. If the process is killed before the id is
            # saved, the next sync finds the MLflow run by the tag and does not create a second MLflow run.
            self._save()
            existing = client.search_runs([experiment], f"tags.`track.uid` = '{uid}'", run_view_type=ALL_RUNS, max_results=1)
            tags, start = {"track.uid": uid, "track.dir": str(self.run_dir)}, int(created * 1000) if created else None
            if parent_id:
                tags["mlflow.parentRunId"] = parent_id
            entry["id"] = (existing[0] if existing else client.create_run(experiment, start, tags, name)).info.run_id
        run = client.get_run(entry["id"])
        if run.info.lifecycle_stage != "active":
            return None
        # Send missing parameters only: MLflow refuses to change the value of a parameter.
        new = [Param(k, v) for k, v in dict(_flatten(params)).items() if k not in run.data.params]
        for i in range(0, len(new), MAX_PARAMS):
            client.log_batch(entry["id"], params=new[i : i + MAX_PARAMS], synchronous=True)
        return run

    def _get_or_create_experiment(self) -> str:
        """Returns the id of the experiment with the config's name."""
        client, name = _client(self.uri), str(self.config.get("name", self.run_dir.name))
        if client.get_experiment_by_name(name) is None:
            artifacts = (self.run_dir.parent / "mlartifacts" / name).as_uri()
            # This fails if another process creates the experiment first. The check below finds other failures.
            with contextlib.suppress(Exception):
                client.create_experiment(name, artifacts if self.uri.startswith("sqlite:") else None)
        experiment = client.get_experiment_by_name(name)
        if experiment is None or experiment.lifecycle_stage != "active":
            raise SyncError(
                f"the experiment {name!r} was deleted or cannot be created; restore it in MLflow, or rename the run"
            )
        return experiment.experiment_id

    def _sync_stage(self, stage_dir: Path) -> None:
        """Sends one stage: its parameters, new metrics, new pictures and its status."""
        client, record, name = _client(self.uri), _read_json(stage_dir / "stage.json"), stage_dir.name
        entry, created = self.store["stages"].setdefault(name, {}), record.get("created")
        # A stage that was made again with --fresh gets a new MLflow run. The old MLflow run stays.
        if created and entry.get("created", created) != created:
            old = client.get_run(entry["id"]).info
            if (old.status, old.lifecycle_stage) == ("RUNNING", "active"):
                client.set_terminated(entry["id"], "KILLED")
            entry = self.store["stages"][name] = {}
        params = self._params(name, record)
        uid, parent_id = f"{self.state['uid']}/{name}/{created}", self.store["parent"]["id"]
        run = self._get_or_create_run(entry, uid, name, params, created, parent_id)
        if created:
            entry["created"] = created
        if run is None:
            return
        self.result.metrics += _LineSender(self.uri, stage_dir / METRICS_FILE, entry, run).send()
        for picture in sorted((stage_dir / "images").glob("*.png")):
            if picture.name not in entry.setdefault("sent", []):
                client.log_artifact(entry["id"], str(picture), "images")
                entry["sent"].append(picture.name)
                self.result.images += 1
        self._set_status(run, bool(record.get("done")), record)

    def _params(self, stage: str, record: dict) -> dict:
        """Returns a stage's parameters: values outside of sections, what stage.json says it was made from, its section.

        The section of each prior is called "prior", so that MLflow compares priors of all levels.
        """
        kind, _, level = stage.partition("-")
        section = self.config.get(f"{kind}s", {}).get(level) if level else self.config.get(SECTIONS.get(stage, stage))
        params = {k: v for k, v in self.config.items() if v is not None and not isinstance(v, dict)}
        params |= dict(_flatten(record.get("identity", {}))) | dict(_flatten({SECTIONS.get(kind, kind): section or {}}))
        return params | dict(_flatten({"input": record.get("inputs", {})}))

    def _set_status(self, run: "Run", done: bool, record: dict) -> None:
        """Sets the status of an MLflow run to FINISHED, with the end time of the stage record, or to RUNNING."""
        if done and run.info.status != "FINISHED":
            end = record.get("finished")
            _client(self.uri).set_terminated(run.info.run_id, "FINISHED", int(end * 1000) if end else None)
        elif not done and run.info.status != "RUNNING":  # a finished stage is being trained for longer
            _client(self.uri).update_run(run.info.run_id, "RUNNING")


class _LineSender:
    """Sends the new values of one metrics.jsonl, and moves the entry's cursor after each batch that MLflow accepted.

    A value is new if its number of samples is above the latest step that MLflow stores for its metric. MLflow handles a request
    as one transaction: it stores either all values of a request or none. The comparison is therefore exact, even if MLflow
    stored the last request but its answer was lost.
    """

    def __init__(self, uri: str, path: Path, entry: dict, run: "Run"):
        self.uri, self.path, self.entry = uri, path, entry
        self.batch: list[Metric] = []
        self.sent = 0
        self.last: dict[str, int] = dict(entry.get("last", {}))  # samples of the latest value of each metric
        for metric in run.data.to_proto().metrics:
            self.last[metric.key] = max(metric.step, self.last.get(metric.key, -1))
        self.offset = entry.get("offset", 0)
        # Another checksum means that a resume has cut the file back, and the file may have grown since. Read it from the start.
        if _checksum_before(path, self.offset) != entry.get("tail", 0):
            self.offset = 0

    def send(self) -> int:
        """Sends everything new and returns the number of values."""
        if not self.path.exists():
            return 0
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # the stage is still writing this line
                self._add(line)
            self._send_batch()
        return self.sent

    def _add(self, line: bytes) -> None:
        """Adds the new values of a line to the batch of values. If the batch would become too large, sends it first."""
        from mlflow.entities import Metric

        row = numbers(journal.parse(line))
        # Each value gets the time of its line. If a value arrives twice with the same time, MLflow stores it once.
        samples, time_ms = row.get("samples", -1), int(row.pop("time", 0) * 1000)
        new = {name: float(value) for name, value in row.items() if samples > self.last.get(name, -1)}
        if len(self.batch) + len(new) > MAX_METRICS:
            self._send_batch()
        # MLflow plots infinity as 1.8e308 but leaves NaN out of a plot, so infinity is sent as NaN.
        self.batch += [Metric(k, v if math.isfinite(v) else math.nan, time_ms, samples) for k, v in new.items()]
        self.last |= dict.fromkeys(new, samples)
        self.offset += len(line)

    def _send_batch(self) -> None:
        for i in range(0, len(self.batch), MAX_METRICS):
            _client(self.uri).log_batch(self.entry["id"], self.batch[i : i + MAX_METRICS], synchronous=True)
        self.sent += len(self.batch)
        tail = _checksum_before(self.path, self.offset)
        self.entry.update(offset=self.offset, tail=tail, last=dict(self.last))
        self.batch.clear()


def _file_stamp(path: Path) -> list[int] | None:
    """Returns modification time (ns) and size, which tell whether a file has changed. None if there is no file."""
    return [path.stat().st_mtime_ns, path.stat().st_size] if path.exists() else None


def _checksum_before(path: Path, offset: int) -> int:
    """Returns the checksum of the 256 bytes before an offset. They include a line's time, so a rewritten file differs."""
    if not offset:
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, offset - 256))
        return zlib.crc32(file.read(min(256, offset)))


def _flatten(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields dotted keys and values of nested data as short strings that MLflow accepts as parameters."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        yield re.sub(r"[^\w\-. /:]", "_", prefix)[:250], text[:500]


class Follower:
    """A daemon thread that syncs a run regularly. Blocks neither the training nor the exit of the process.

    Unsent lines stay in the file, not in memory, so memory does not grow while the server is down.

    Args:
        run_dir: The run's directory.
        uri: The tracking URI.
        interval: Seconds between two syncs. After failures the pause doubles, up to 60 s.

    Attributes:
        failures: Number of syncs that have failed.
    """

    def __init__(self, run_dir: Path, uri: str, interval: float = 5.0):
        self.run_dir, self.uri, self.interval, self.failures = Path(run_dir), uri, interval, 0
        self._succeeded = time.monotonic()  # when the last sync succeeded; at first, when the thread started
        self._stop, self._deadline, self._delivered = threading.Event(), math.inf, False
        self._thread = threading.Thread(target=self._loop, name="mlflow", daemon=True)
        self._thread.start()

    def close(self, deadline: float = 15.0) -> bool:
        """Syncs a last time and returns whether everything was sent. Prints a line if not.

        Args:
            deadline: Seconds after which the last sync is given up; STALE_CLOSE_S if no sync has succeeded for six intervals.
        """
        if time.monotonic() - self._succeeded > 6 * self.interval:
            deadline = min(deadline, STALE_CLOSE_S)
        self._deadline = time.monotonic() + deadline
        self._stop.set()
        self._thread.join(deadline)
        if not self._delivered:
            print_stderr(f"MLflow at {_without_password(self.uri)} did not receive the last metrics. The next sync sends them.")
        return self._delivered

    def _loop(self) -> None:
        failed = 0  # failed syncs in a row
        while True:
            closing = self._stop.wait(min(self.interval * 2**failed, 60.0))
            try:
                # At the end, wait for any other process that is syncing this run, to be sure that everything is sent.
                while (busy := sync(self.run_dir, self.uri).busy) and closing and time.monotonic() < self._deadline:
                    time.sleep(0.1)
                if failed:
                    print_stderr(f"MLflow at {_without_password(self.uri)} is reachable again.")
                failed, self._delivered, self._succeeded = 0, closing and not busy, time.monotonic()
            except Exception as error:
                self.failures += 1
                failed = min(failed + 1, 8)
                if failed == 1:
                    print_stderr(f"{error}. Training continues. The metrics are sent when MLflow is reachable again.")
            if closing:
                return


def print_stderr(text: str) -> None:
    """Prints a line to stderr at once."""
    print(text, file=sys.stderr, flush=True)
