"""Copies the metrics logs of a run to MLflow. Loses nothing when this process restarts or the MLflow server fails.

A stage writes metrics.jsonl and images/ and never waits for MLflow. `sync` reads these files and sends what is new. A thread
beside the training (mlflow_follower.py) and the process of `lesiongen ui` (launch/ui.py) call `sync`. If the server is down or
hangs, a later sync sends the missing data from the files. mlflow_content.py says what MLflow shows of the files.

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
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from hpc.errors import UserError
from hpc.run import mlflow_content
from hpc.run.metrics_log import ALARMS_FILE, METRICS_FILE, picture_name
from hpc.run.mlflow_address import EXPERIMENT_TAGS, MLFLOW_ENVIRONMENT, create_store, read_json, without_password
from hpc.run.mlflow_content import NOTE_FILE, NOTE_TAG
from hpc.run.mlflow_values import MAX_VALUES, NewLines, Value
from hpc.run.rundir import atomic_write, location, lock, was_copied

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from PIL import Image

MAX_PARAMS = 100  # the most that MLflow accepts in one request
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


@functools.cache
def _client(uri: str) -> "MlflowClient":
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # The first use of a sqlite file would log a line for every migration, and a failure its traceback: SyncError reports it.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    create_store(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def sync(run_dir: Path, uri: str) -> SyncResult:
    """Sends what is new in all stage directories of a run. Nothing is sent twice, even if an earlier sync crashed.

    MLflow then holds one parent MLflow run for each run directory, and one child MLflow run for each stage. They are in the
    experiment that the config names (mlflow.experiment), by default in one with the config's name.

    Args:
        run_dir: The run's directory.
        uri: The tracking URI.

    Raises:
        SyncError: The server cannot be reached or refuses the data.
    """
    run_dir = Path(run_dir).absolute()
    stage_dirs = {p.parent for p in run_dir.glob(f"*/{METRICS_FILE}") if not p.parent.name.startswith(".")}
    # A stage may have no metrics: it makes none, or has failed before the first. Other directories with a record hold samples
    # that a user has asked for beside the run's.
    stage_dirs |= {p.parent for p in run_dir.glob("*/stage.json") if mlflow_content.is_stage(p.parent.name)}
    stage_dirs = sorted(stage_dirs, key=lambda path: (read_json(path / "stage.json").get("created", 0.0), path.name))
    if not stage_dirs:
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
            raise _sync_error(error, uri) from error


def _sync_error(error: Exception, uri: str) -> SyncError:
    """Returns the SyncError that tells of an error of MLflow or of the connection to it."""
    reason = (without_password(error).strip() or type(error).__name__).splitlines()[0][:300]
    return SyncError(f"MLflow at {without_password(uri)}: {reason}")


def register(run_dir: Path, uri: str, folder: Path, name: str, note: str) -> str:
    """Registers a folder as a new version of a model in MLflow's registry. MLflow stores a copy of the folder.

    Args:
        run_dir: The run that made the folder. It is synced first; the model is linked to its MLflow run.
        uri: The tracking URI, also that of the registry.
        folder: The folder.
        name: Name of the registered model, which is created if needed.
        note: Description of the version, Markdown.

    Returns:
        The version.

    Raises:
        SyncError: The server cannot be reached or refuses the data.
    """
    sync(run_dir, uri)
    try:
        from mlflow.entities import LoggedModelOutput

        client = _client(uri)
        store = read_json(Path(run_dir) / "mlflow.json")["stores"][without_password(uri)]
        run_id = store["parent"]["id"]
        model = client.create_logged_model(store["experiment"], name, run_id, model_type="generator")
        client.log_model_artifacts(model.model_id, str(folder))
        model = client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        return client.create_model_version(name, model.artifact_location, run_id, description=note).version
    except Exception as error:
        raise _sync_error(error, uri) from error


class _Sync:
    """One sync of one run. `sync` makes one while it holds the run's lock.

    The state is stored in mlflow.json:

        {"uid": identifies the run directory in MLflow,
         "directory": location of the directory that the uid was made for; a copy of the directory gets its own uid,
         "stores": {uri: {"experiment": id,
                          "seen": file stamps of each stage at the last complete sync,
                          "parent": entry,
                          "stages": {name: entry}}}}

    An entry has the "id" of an MLflow run, and records what was sent to the MLflow run: "tags" and "datasets". For
    metrics.jsonl this is a cursor: "offset" (in bytes), "tail" (checksum of the bytes before the offset) and "last" ({metric:
    samples of its latest value}). In the entry of a stage, "sent" lists the pictures that were sent, and "created" is the time
    when the stage began. In the parent's entry, "sent" is the stamp of the report that was sent, and "figures" has the samples
    of each stage's figures that were sent.
    """

    def __init__(self, run_dir: Path, uri: str, stage_dirs: list[Path], forget: bool = False):
        self.run_dir, self.uri, self.stage_dirs, self.result = run_dir, uri, stage_dirs, SyncResult()
        self.state = read_json(run_dir / "mlflow.json")
        if not self.state or ("directory" in self.state and was_copied(run_dir, self.state["directory"])):
            self.state = {"uid": uuid.uuid4().hex, "stores": {}}
        self.state["directory"] = location(run_dir)
        if forget:
            self.state["stores"].pop(without_password(uri), None)
        self.store = self.state["stores"].setdefault(without_password(uri), {"seen": {}, "parent": {}, "stages": {}})
        config = run_dir / "config.yaml"
        self.config = (yaml.safe_load(config.read_bytes()) if config.exists() else None) or {}
        self.records = {path.name: read_json(path / "stage.json") for path in stage_dirs}
        self.statuses = {path.name: mlflow_content.status(path, self.records[path.name]) for path in stage_dirs}
        self.first = (run_dir, uri) not in _checked  # the first sync of this process

    def run(self) -> SyncResult:
        """Sends everything that is new. Contacts the server only if something has changed, or on this process's first sync."""
        # Find the stages whose files or status have changed.
        files = (METRICS_FILE, ALARMS_FILE, NOTE_FILE, "images", "stage.json", "report.html", "../config.yaml")
        stamps = {p.name: [self.statuses[p.name], *(_file_stamp(p / file) for file in files)] for p in self.stage_dirs}
        changed = [p for p in self.stage_dirs if self.first or stamps[p.name] != self.store["seen"].get(p.name)]
        if not changed and stamps == self.store["seen"]:
            return self.result
        # Send these stages, then what the MLflow run of the whole run shows.
        try:
            uid, above = self.state["uid"], self._run_above()
            began = min(filter(None, (record.get("created") for record in self.records.values())), default=None)
            name = self.run_dir.name
            if parent := self._get_or_create_run(self.store["parent"], uid, name, self.config, began, above):
                for stage_dir in changed:
                    self._sync_stage(stage_dir)
                self._sync_parent(parent)
            self.store["seen"] = stamps
            _checked.add((self.run_dir, self.uri))
        finally:
            self._save()
        return self.result

    def _run_above(self) -> str:
        """Returns the id of the MLflow run of the run that mlflow.parent names; "" if none is named or it is not there yet."""
        above = (self.config.get("mlflow") or {}).get("parent")
        stores = read_json(Path(above) / "mlflow.json").get("stores", {}) if above else {}
        return stores.get(without_password(self.uri), {}).get("parent", {}).get("id", "")

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
        new = [Param(k, v) for k, v in dict(mlflow_content.flatten(params)).items() if k not in run.data.params]
        for i in range(0, len(new), MAX_PARAMS):
            client.log_batch(entry["id"], params=new[i : i + MAX_PARAMS], synchronous=True)
        return run

    def _get_or_create_experiment(self) -> str:
        """Returns the id of the run's experiment."""
        client = _client(self.uri)
        name = str((self.config.get("mlflow") or {}).get("experiment") or self.config.get("name", self.run_dir.name))
        if client.get_experiment_by_name(name) is None:
            artifacts = (self.run_dir.parent / "mlartifacts" / name).as_uri()
            # This fails if another process creates the experiment first. The check below finds other failures.
            with contextlib.suppress(Exception):
                client.create_experiment(name, artifacts if self.uri.startswith("sqlite:") else None, EXPERIMENT_TAGS)
        experiment = client.get_experiment_by_name(name)
        if experiment is None or experiment.lifecycle_stage != "active":
            raise SyncError(
                f"the experiment {name!r} was deleted or cannot be created; restore it in MLflow, or rename the run"
            )
        return experiment.experiment_id

    def _sync_stage(self, stage_dir: Path) -> None:
        """Sends one stage: its parameters, tags, data sets, new metrics, new pictures and its status."""
        client, name, record = _client(self.uri), stage_dir.name, self.records[stage_dir.name]
        entry, created = self.store["stages"].setdefault(name, {}), record.get("created")
        # A stage that was made again with --fresh gets a new MLflow run. The old MLflow run stays.
        if created and entry.get("created", created) != created:
            old = client.get_run(entry["id"]).info
            if (old.status, old.lifecycle_stage) == ("RUNNING", "active"):
                client.set_terminated(entry["id"], "KILLED")
            entry = self.store["stages"][name] = {}
        params = mlflow_content.parameters(name, record, self.config)
        uid, title = f"{self.state['uid']}/{name}/{created}", mlflow_content.run_name(name, record)
        run = self._get_or_create_run(entry, uid, title, params, created, self.store["parent"]["id"])
        if created:
            entry["created"] = created
        if run is None:
            return
        self._send_tags(entry, run, mlflow_content.tags(stage_dir, record))
        self._send_datasets(entry, mlflow_content.datasets(stage_dir, record, self.config))
        latest = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        send = functools.partial(self._send_values, entry["id"])
        self.result.metrics += NewLines(stage_dir / METRICS_FILE, entry, latest, send).send()
        self._send_pictures(entry, stage_dir / "images")
        self._send_status(entry, run, self.statuses[name], record.get("finished"))

    def _sync_parent(self, parent: "Run") -> None:
        """Sends what the MLflow run of the whole run shows: a note, all stages' figures and alarms, the report, the status."""
        client, entry = _client(self.uri), self.store["parent"]
        note = mlflow_content.note(self.stage_dirs, self.records, self.statuses)
        raised = {key: f"{p.name}: {text}" for p in self.stage_dirs for key, text in mlflow_content.alarms(p).items()}
        self._send_tags(entry, parent, {NOTE_TAG: note} | raised)
        for stage_dir in self.stage_dirs:
            samples, found = mlflow_content.figures(stage_dir)
            if found and entry.setdefault("figures", {}).get(stage_dir.name) != samples:
                time_ms = (_file_stamp(stage_dir / METRICS_FILE) or [0])[0] // 10**6
                self._send_values(entry["id"], [(key, value, time_ms, samples) for key, value in found.items()][:MAX_VALUES])
                entry["figures"][stage_dir.name] = samples
        report = self.run_dir / "report" / "report.html"
        if (stamp := _file_stamp(report)) and entry.get("sent") != stamp:
            client.log_artifact(entry["id"], str(report))
            entry["sent"] = stamp
        last = self.records.get("report", {})
        status = mlflow_content.run_status(self.statuses, bool(last.get("done")))
        self._send_status(entry, parent, status, last.get("finished"))

    def _send_tags(self, entry: dict, run: "Run", tags: dict[str, str]) -> None:
        """Sends the tags that are new or have changed. A note that a user has edited in MLflow stays as it is."""
        from mlflow.entities import RunTag

        sent = entry.setdefault("tags", {})
        edited = NOTE_TAG in sent and run.data.tags.get(NOTE_TAG) != sent[NOTE_TAG]
        new = {key: text for key, text in tags.items() if sent.get(key) != text and not (key == NOTE_TAG and edited)}
        if new:
            _client(self.uri).log_batch(entry["id"], tags=[RunTag(*item) for item in new.items()], synchronous=True)
            sent |= new

    def _send_datasets(self, entry: dict, datasets: list[mlflow_content.Dataset]) -> None:
        """Sends the data sets that a stage was made from, or that it has made."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if entry.get("datasets", []) != (sent := [list(item) for item in datasets]):
            inputs = [
                DatasetInput(
                    Dataset(name, digest[:36], "local", json.dumps({"uri": place})), [InputTag("mlflow.data.context", role)]
                )
                for name, digest, place, role in datasets
            ]
            _client(self.uri).log_inputs(entry["id"], inputs)
            entry["datasets"] = sent

    def _send_values(self, run_id: str, values: list[Value]) -> None:
        """Sends values of metrics in one request, of which MLflow stores all or none."""
        from mlflow.entities import Metric

        # MLflow plots infinity as 1.8e308 but leaves NaN out of a plot.
        metrics = [Metric(name, value if math.isfinite(value) else math.nan, *when) for name, value, *when in values]
        _client(self.uri).log_batch(run_id, metrics, synchronous=True)

    def _send_pictures(self, entry: dict, folder: Path) -> None:
        """Sends new pictures. MLflow shows those of one name with a slider over the samples.

        The slider stands at 0 when the page opens, and there it would show nothing. A title is sent for this place.
        """
        from PIL import Image, UnidentifiedImageError

        client, sent = _client(self.uri), entry.setdefault("sent", [])
        new = [path for path in sorted(folder.glob("*.png")) if path.name not in sent]
        # After a crash, mlflow.json may not know of the last pictures that were sent.
        there = [file.path for file in client.list_artifacts(entry["id"], "images")] if self.first and new else []

        def is_there(name: str, samples: int) -> bool:
            return any(file.startswith(f"images/{name}+step+{samples}+") for file in there)

        for path in new:
            name, samples = picture_name(path)
            if samples and (title := f"{name}-title") not in sent:
                if not is_there(name, 0):
                    client.log_image(entry["id"], _title(name), key=name, step=0, synchronous=True)
                sent.append(title)
            if not is_there(name, samples):
                with contextlib.suppress(UnidentifiedImageError), Image.open(path) as picture:  # a power failure may damage one
                    client.log_image(entry["id"], picture, key=name, step=samples, synchronous=True)
                self.result.images += 1
            sent.append(path.name)

    def _send_status(self, entry: dict, run: "Run", status: str, finished: float | None) -> None:
        """Sets the status of an MLflow run.

        Args:
            entry: The entry of the MLflow run.
            run: The MLflow run.
            status: MLflow's word for the status.
            finished: The end of a finished MLflow run, Unix time in seconds. None for now.
        """
        if run.info.status == status:
            return
        if status in ("FINISHED", "FAILED", "KILLED"):
            end = int(finished * 1000) if finished and status == "FINISHED" else None
            _client(self.uri).set_terminated(entry["id"], status, end)
        else:  # for example, a finished stage is being trained for longer
            _client(self.uri).update_run(entry["id"], status)


def _title(name: str) -> "Image.Image":
    """Draws the picture at the beginning of a slider."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (480, 320), "white")
    text = f"{name}\n\nmove the slider:\nits numbers are the samples\nthat the training has seen"
    ImageDraw.Draw(picture).multiline_text((240, 160), text, "black", ImageFont.load_default(28), "mm", align="center")
    return picture


def _file_stamp(path: Path) -> list[int] | None:
    """Returns modification time (ns) and size, which tell whether a file has changed. None if there is no file."""
    return [path.stat().st_mtime_ns, path.stat().st_size] if path.exists() else None
