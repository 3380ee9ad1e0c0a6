"""Helpers of the MLflow tests: they write run directories, and read back what MLflow's stores hold."""

import io
import json
import time

from PIL import Image

from hpc.run import mlflow_sync
from hpc.run.metrics_log import MetricsLog, read_metrics
from hpc.run.mlflow_address import default_uri

CONFIG = (
    "name: {name}\nseed: 3\nbatch: [8, 8]\ntokenizer:\n  dim: 64\n  quantizer: {{kind: ema}}\npriors:\n  top:\n    width: 128\n"
)


def make_run(runs, name, stages=("tokenizer",), lines=4, experiment=None):
    run = runs / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG.format(name=experiment or name))
    for stage in stages:
        extend(run / stage, range(10, 10 * lines + 1, 10))
    return run


def extend(stage, counts, offset=0.0):
    """Logs a loss and a system metric at each of these numbers of samples."""
    log = MetricsLog(stage)
    for count in counts:
        log.log(count // 10, count, {"train/loss": 1 / count + offset, "system/cpu_percent": 50.0})


def png(shade):
    """Returns a small grey PNG."""
    content = io.BytesIO()
    Image.new("L", (8, 8), shade).save(content, "PNG")
    return content.getvalue()


def pictures(run, stage, uri=None):
    """Returns the pictures that MLflow holds of a stage, as {(what it shows, samples): path of the artifact}."""
    client, run_id = client_of(run, uri), entry_of(run, stage, uri)["id"]
    paths = [file.path for file in client.list_artifacts(run_id, "images") if file.path.endswith(".png")]
    found = {(name.removeprefix("images/"), int(samples)): path for path in paths for name, _, samples, *_ in [path.split("+")]}
    assert len(found) == len(paths), "a picture was sent twice"
    titles = {key for key in found if not key[1]}
    assert {name for name, _ in titles} == {name for name, _ in found}, "a slider opens on nothing"
    return {key: path for key, path in found.items() if key not in titles}


def write_stage_record(stage, **record):
    stage.mkdir(exist_ok=True)
    (stage / "stage.json").write_text(json.dumps({"done": False, "created": 1.7e9} | record))


def new_process():
    """Makes the next sync behave as in a new process."""
    mlflow_sync._checked.clear()  # the only state that a process keeps between two syncs


def client_of(run, uri=None):
    return mlflow_sync._client(uri or default_uri(run))


def entry_of(run, stage="tokenizer", uri=None):
    """Returns the entry of mlflow.json for a stage, or for the run as a whole if `stage` is None."""
    store = json.loads((run / "mlflow.json").read_text())["stores"][uri or default_uri(run)]
    return store["stages"][stage] if stage else store["parent"]


def history(run, stage="tokenizer", name="train/loss", uri=None):
    points = client_of(run, uri).get_metric_history(entry_of(run, stage, uri)["id"], name)
    return sorted((point.step, point.value) for point in points)


def expected(run, stage="tokenizer", name="train/loss"):
    return [(row["samples"], row[name]) for row in read_metrics(run / stage)]


def runs_of(run, uri=None):
    client = client_of(run, uri)
    name = next(line for line in (run / "config.yaml").read_text().splitlines() if line.startswith("name:"))[6:]
    return client.search_runs([client.get_experiment_by_name(name).experiment_id])


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)
    return found
