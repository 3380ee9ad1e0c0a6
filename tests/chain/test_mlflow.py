"""hpc/track.py against the real MLflow: its sqlite store, and `mlflow server` on the loopback, killed in the middle."""

import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from hpc import track
from hpc.record import Tracker, read_metrics
from hpc.track import Follower, default_uri, link, sync

pytest.importorskip("sqlalchemy", reason="the http-only mlflow-skinny has no store of its own")
CONFIG = "name: {name}\nseed: 3\nbatch: [8, 8]\ntokenizer:\n  dim: 64\n  quantizer: {{kind: ema}}\nprior:\n  width: 128\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One `runs` for all sqlite tests, since making a store takes seconds; a space in its path, as people have."""
    patch = pytest.MonkeyPatch()
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in track.ENVIRONMENT:
        patch.setenv(name, track.ENVIRONMENT[name])
    yield tmp_path_factory.mktemp("my runs")
    patch.undo()


def make_run(runs, name, stages=("tokenizer",), lines=4, experiment=None):
    run = runs / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG.format(name=experiment or name))
    for stage in stages:
        extend(run / stage, range(10, 10 * lines + 1, 10))
    return run


def extend(stage, counts, offset=0.0):
    tracker = Tracker(stage)
    for count in counts:
        tracker.log(count // 10, count, {"train/loss": 1 / count + offset, "system/cpu_percent": 50.0})
    tracker.close()


def mark(stage, **record):
    stage.mkdir(exist_ok=True)
    (stage / "stage.json").write_text(json.dumps({"done": False, "created": 1.7e9} | record))


def new_process():
    track._checked.clear()  # all that a process remembers between two syncs


def client_of(run, uri=None):
    return track._client(uri or default_uri(run))


def entry_of(run, stage="tokenizer", uri=None):
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


def test_a_run_with_two_stages(runs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run = make_run(runs, "two", ("tokenizer", "prior-top"))
    mark(run / "tokenizer", done=True, finished=1.7e9 + 60)
    tracker = Tracker(run / "prior-top")
    tracker.log(9, 90, {"bad": math.nan, "worse": math.inf})
    tracker.image("samples", 90, b"first")
    tracker.close()
    first = sync(run, default_uri(run))
    assert (first.metrics, first.images) == (2 * 4 * 4 + 4, 1)
    assert sync(run, default_uri(run)) == track.SyncResult()
    new_process()
    assert sync(run, default_uri(run)) == track.SyncResult()
    client = client_of(run)
    for stage in ("tokenizer", "prior-top"):
        assert history(run, stage) == [(10, 0.1), (20, 0.05), (30, 1 / 30), (40, 0.025)]
    assert history(run, "tokenizer", "step") == [(10, 1), (20, 2), (30, 3), (40, 4)]
    for name in ("bad", "worse"):
        [(step, value)] = history(run, "prior-top", name)
        assert step == 90
        assert math.isnan(value)

    children = {r.info.run_name: r for r in runs_of(run)}
    parent = children.pop("two")
    assert set(children) == {"tokenizer", "prior-top"}
    assert all(r.data.tags["mlflow.parentRunId"] == parent.info.run_id for r in children.values())
    assert children["tokenizer"].data.params == {
        "name": "two", "seed": "3", "batch": "[8, 8]", "tokenizer.dim": "64", "tokenizer.quantizer.kind": "ema"
    }  # fmt: skip
    assert children["prior-top"].data.params["prior-top.width"] == "128"
    assert parent.data.params["prior.width"] == "128"
    info = children["tokenizer"].info
    assert (info.status, info.start_time, info.end_time) == ("FINISHED", 1_700_000_000_000, 1_700_000_060_000)
    assert (children["prior-top"].info.status, parent.info.status) == ("RUNNING", "RUNNING")
    artifacts = runs / "mlartifacts" / "two"
    picture = artifacts / children["prior-top"].info.run_id / "artifacts/images/samples-000000090.png"
    assert picture.read_bytes() == b"first"

    # The rest of the run: another picture, the report, all done. A changed parameter keeps its first value.
    (run / "config.yaml").write_text(CONFIG.format(name="two").replace("width: 128", "width: 256\n  depth: 4"))
    Tracker(run / "prior-top").image("samples", 100, b"second")
    mark(run / "prior-top", done=True)
    mark(run / "report", done=True)
    (run / "report" / "report.html").write_text("<p>one")
    assert sync(run, default_uri(run)) == track.SyncResult(0, 1)
    page = artifacts / parent.info.run_id / "artifacts/report.html"
    assert page.read_text() == "<p>one"
    assert {r.info.status for r in runs_of(run)} == {"FINISHED"}
    prior = client.get_run(children["prior-top"].info.run_id).data.params
    assert (prior["prior-top.width"], prior["prior-top.depth"]) == ("128", "4")
    (run / "report" / "report.html").write_text("<p>second")
    assert sync(run, default_uri(run)) == track.SyncResult()
    assert page.read_text() == "<p>second"

    # A longer training of a finished stage goes on in the same run.
    mark(run / "tokenizer", done=False)
    extend(run / "tokenizer", [50])
    assert sync(run, default_uri(run)).metrics == 4
    assert len(runs_of(run)) == 3
    status = {r.info.run_name: r.info.status for r in runs_of(run)}
    assert status == {"two": "RUNNING", "tokenizer": "RUNNING", "prior-top": "FINISHED"}

    assert capfd.readouterr() == ("", ""), "MLflow and alembic are to be quiet"
    assert list(tmp_path.iterdir()) == [], "MLflow left something in the working directory"


@pytest.mark.parametrize("what", ["cursor", "ids", "wrong ids", "nothing but the uid"])
def test_a_crash_between_sending_and_the_cursor(runs, what):
    """mlflow.json is put back to what it was before the send, as a crash leaves it, or to what an older copy says."""
    run = make_run(runs, f"crash-{what.replace(' ', '-')}")
    state = run / "mlflow.json"
    sync(run, default_uri(run))
    old = json.loads(state.read_text())
    extend(run / "tokenizer", range(50, 80, 10))
    sync(run, default_uri(run))
    store = old["stores"][default_uri(run)]
    if what == "ids":
        del store["stages"]["tokenizer"], store["parent"]["id"]
    elif what == "wrong ids":  # the store was replaced by another
        store["parent"]["id"] = store["stages"]["tokenizer"]["id"] = "0" * 32
    elif what == "nothing but the uid":
        old["stores"] = {}
    state.write_text(json.dumps(old))
    extend(run / "tokenizer", [80])
    new_process()
    assert sync(run, default_uri(run)).metrics == 4, "only the line that is new"
    assert history(run) == expected(run)
    assert len(expected(run)) == 8
    assert len(runs_of(run)) == 2


def test_the_cursor_in_another_process(runs):
    run = make_run(runs, "process")
    sync(run, default_uri(run))
    old = (run / "mlflow.json").read_bytes()
    extend(run / "tokenizer", range(50, 80, 10))
    sync(run, default_uri(run))
    (run / "mlflow.json").write_bytes(old)
    code = f"from hpc.track import *; print(sync({str(run)!r}, default_uri({str(run)!r})).metrics)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
    assert history(run) == expected(run)


def test_a_lost_answer_and_a_refused_request(runs, monkeypatch):
    """The second of three requests is refused; when it is sent again its answer is lost; then all is well."""
    run = make_run(runs, "lost", lines=600)
    sync(run, default_uri(run))
    extend(run / "tokenizer", range(6010, 12010, 10))  # 2,400 values: three requests
    client, calls = client_of(run), []
    real = client.log_batch

    def unreliable(run_id, metrics=(), **keywords):
        calls.append(len(metrics))
        if len(calls) != 2:
            real(run_id, metrics, **keywords)
        if len(calls) in (2, 3):
            raise TimeoutError("http://me:secret@server: no answer")

    monkeypatch.setattr(client, "log_batch", unreliable)
    for _ in range(2):
        with pytest.raises(track.TrackError, match="http://server: no answer"):
            sync(run, default_uri(run))
    assert sync(run, default_uri(run)).metrics == 400
    assert calls == [1000, 1000, 1000, 400]
    assert history(run) == expected(run)
    assert len(expected(run)) == 1200


def test_a_resume_doubles_no_point(runs):
    """Cut back and trained again: what was sent stays as it was, and goes on where it ended."""
    run = make_run(runs, "resume", lines=6)
    sync(run, default_uri(run))
    before = history(run)
    tracker = Tracker(run / "tokenizer")
    tracker.resume(30)
    assert sync(run, default_uri(run)) == track.SyncResult()
    extend(run / "tokenizer", [40], offset=1.0)
    assert sync(run, default_uri(run)) == track.SyncResult()
    tracker.resume(20)
    extend(run / "tokenizer", range(70, 160, 10), offset=2.0)  # longer than ever before the next sync
    assert sync(run, default_uri(run)).metrics == 9 * 4
    assert history(run) == before + [(count, 1 / count + 2.0) for count in range(70, 160, 10)]


def test_two_lines_at_one_count_and_a_torn_one(runs):
    """Held-out figures come in a line of their own, at the same samples as the training's, perhaps a sync later."""
    run = make_run(runs, "lines", lines=1)
    sync(run, default_uri(run))
    tracker = Tracker(run / "tokenizer")
    tracker.log(1, 10, {"val/loss": 7.0})
    tracker.close()
    path = run / "tokenizer" / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert sync(run, default_uri(run)).metrics == 0
    path.write_bytes(whole)
    new_process()
    assert sync(run, default_uri(run)).metrics == 1
    assert history(run, name="val/loss") == [(10, 7.0)]
    assert history(run, name="samples") == [(10, 10)]


def test_fresh_is_another_run_and_a_deleted_one_stays_deleted(runs):
    run = make_run(runs, "fresh")
    mark(run / "tokenizer", created=1.7e9)
    sync(run, default_uri(run))
    first = entry_of(run)["id"]
    Tracker(run / "tokenizer").resume(0)
    mark(run / "tokenizer", created=1.8e9)
    extend(run / "tokenizer", [10, 20], offset=5.0)
    assert sync(run, default_uri(run)).metrics == 8
    assert history(run) == [(10, 5.1), (20, 5.05)]
    assert len(runs_of(run)) == 3
    assert client_of(run).get_run(first).info.status == "KILLED"

    client_of(run).delete_run(entry_of(run)["id"])
    extend(run / "tokenizer", [30])
    assert sync(run, default_uri(run)).metrics == 0
    assert len(runs_of(run)) == 2
    client_of(run).restore_run(entry_of(run)["id"])
    extend(run / "tokenizer", [40])
    assert sync(run, default_uri(run)).metrics == 8
    assert history(run) == expected(run)


def test_runs_of_one_name_and_many_at_once(runs):
    """Two runs of one experiment, each followed from two sides while it writes: what two priors side by side do."""
    both = [make_run(runs, name, ("tokenizer", "prior-top"), experiment="shared") for name in ("a", "b")]
    trackers = [Tracker(run / stage) for run in both for stage in ("tokenizer", "prior-top")]
    followers = [Follower(run, default_uri(run), interval=0.01) for run in both for _ in range(2)]
    for count in range(50, 650, 10):
        for tracker in trackers:
            tracker.log(count // 10, count, {"train/loss": 1 / count})
        time.sleep(0.005)
    assert all(follower.close() for follower in followers)
    for run in both:
        for stage in ("tokenizer", "prior-top"):
            assert history(run, stage) == expected(run, stage)
            assert len(expected(run, stage)) == 64
    assert Counter(r.info.run_name for r in runs_of(both[0])) == {"a": 1, "b": 1, "tokenizer": 2, "prior-top": 2}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def answers(port):
    try:
        return get(port, "/health")[0] == 200
    except OSError:
        return False


class Server:
    """A real one, whose store outlives it."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, free_port(), None
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/s.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | track.ENVIRONMENT, start_new_session=True
            )
        wait_for(lambda: answers(self.port))

    def kill(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def test_a_server_that_goes_and_comes_back(runs, tmp_path, capsys):
    server = Server(tmp_path)
    run = make_run(tmp_path / "runs", "http", lines=1)
    tracker, count, slowest = Tracker(run / "tokenizer"), 10, 0.0

    def train(lines):
        nonlocal count, slowest
        for _ in range(lines):
            count += 10
            before = time.monotonic()
            tracker.log(count // 10, count, {"train/loss": 1 / count})
            slowest = max(slowest, time.monotonic() - before)
            time.sleep(0.002)

    def arrived():
        state = run / "mlflow.json"
        stored = json.loads(state.read_text())["stores"].get(server.uri, {}) if state.exists() else {}
        return stored.get("stages", {}).get("tokenizer", {}).get("last", {}).get("samples", 0)

    try:
        server.start()
        tracker.image("recon", 10, b"png")
        follower = Follower(run, server.uri, interval=0.05)
        train(50)
        wait_for(lambda: arrived() > 10)
        assert link(run, server.uri).startswith(f"{server.uri}/#/experiments/")
        stop = threading.Timer(0.1, server.kill)  # in the middle of the sending
        stop.start()
        train(200)
        stop.join()
        wait_for(lambda: follower.failures > 1)
        before = time.monotonic()
        assert not follower.close(deadline=3)
        assert time.monotonic() - before < 4
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 2
        assert "Training goes on" in said[0]
        assert "did not take the last lines" in said[1]
        assert slowest < 0.5, "log() waited for the server"  # it is a write to a file; half a second is a busy machine
        sent = arrived()
        train(10)

        server.start()
        new_process()
        assert sync(run, server.uri).metrics > 0
        assert history(run, uri=server.uri) == expected(run)
        assert sent < count
        assert len(expected(run)) == 261
        assert len(runs_of(run, server.uri)) == 2
        child = entry_of(run, uri=server.uri)["id"]
        [picture] = (tmp_path / "artifacts").rglob("recon-000000010.png")
        assert picture.read_bytes() == b"png"
        assert child in str(picture)
        assert sync(run, server.uri) == track.SyncResult()
    finally:
        server.kill()


def test_a_server_that_hangs_does_not_hold_up_the_exit(runs, tmp_path):
    """It takes the connection and never answers."""
    run = make_run(tmp_path, "hang")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        code = (
            "import mlflow, sys, time; from hpc.track import Follower\n"
            "follower = Follower(sys.argv[1], sys.argv[2], interval=0.01)\n"
            "time.sleep(0.3); before = time.monotonic()\n"
            "assert not follower.close(deadline=0.5); print(time.monotonic() - before); print(time.time())\n"
        )
        uri = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", code, str(run), uri], capture_output=True, text=True, timeout=60, check=True
        )
        ended = time.time()
    closing, left = map(float, done.stdout.split())
    assert 0.4 < closing < 1.5
    assert ended - left < 2.0
    assert "did not take the last lines" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_serve_shows_what_is_there_and_what_comes(tmp_path):
    """What `lesiongen ui` does, on a store that does not exist yet, beside a run that goes on."""
    runs, port = tmp_path / "runs", free_port()
    run = make_run(runs, "ham")
    Tracker(run / "tokenizer").image("recon", 10, b"a picture")
    code = f"import sys; from launch.ui import serve; serve(sys.argv[1], port={port})"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(runs)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == f"MLflow shows {runs} at http://127.0.0.1:{port} (Ctrl-C ends it)\n"
        wait_for(lambda: (run / "mlflow.json").exists() and '"offset"' in (run / "mlflow.json").read_text())
        child = entry_of(run)["id"]
        where = f"/get-artifact?path=images/recon-000000010.png&run_uuid={child}"
        wait_for(lambda: get(port, where) == (200, b"a picture"))
        extend(run / "tokenizer", [50])
        url = f"/api/2.0/mlflow/metrics/get-history?run_id={child}&metric_key=samples"
        wait_for(lambda: len(json.loads(get(port, url)[1])["metrics"]) == 5)
        assert get(port, "/")[0] == 200
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")
    assert not answers(port)
    assert Path(runs / "mlflow.db").exists()
