"""Tests hpc/run/mlflow_sync.py with the real MLflow and its SQLite store."""

import json
import math
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest
from PIL import Image

from hpc.run import mlflow_sync
from hpc.run.metrics_log import MetricsLog
from hpc.run.mlflow_address import default_uri
from hpc.run.mlflow_follower import Follower
from hpc.run.mlflow_sync import sync
from tests.chain.mlflow_runs import (
    CONFIG,
    client_of,
    entry_of,
    expected,
    extend,
    history,
    make_run,
    new_process,
    pictures,
    png,
    runs_of,
    write_stage_record,
)

pytest.importorskip("sqlalchemy", reason="the http-only mlflow-skinny has no store of its own")


def test_a_run_with_two_stages(runs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run = make_run(runs, "two", ("tokenizer", "prior-top"))
    write_stage_record(run / "tokenizer", done=True, finished=1.7e9 + 60)
    log = MetricsLog(run / "prior-top")
    log.log(9, 90, {"bad": math.nan, "worse": math.inf})
    log.image("samples", 90, png(90))
    first = sync(run, default_uri(run))
    assert (first.metrics, first.images) == (2 * 4 * 4 + 4, 1)
    assert sync(run, default_uri(run)) == mlflow_sync.SyncResult()
    new_process()
    assert sync(run, default_uri(run)) == mlflow_sync.SyncResult()
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
    assert children["prior-top"].data.params["prior.width"] == "128"
    assert parent.data.params["priors.top.width"] == "128"
    info = children["tokenizer"].info
    assert (info.status, info.start_time, info.end_time) == ("FINISHED", 1_700_000_000_000, 1_700_000_060_000)
    assert (children["prior-top"].info.status, parent.info.status) == ("RUNNING", "RUNNING")
    artifacts = runs / "mlartifacts" / "two"
    assert set(pictures(run, "prior-top")) == {("samples", 90)}
    sent = artifacts / children["prior-top"].info.run_id / "artifacts" / pictures(run, "prior-top")["samples", 90]
    assert Image.open(sent).getpixel((0, 0)) == 90

    # The run ends: one more picture, the report, all stages done. MLflow keeps the first value of a changed parameter.
    (run / "config.yaml").write_text(CONFIG.format(name="two").replace("width: 128", "width: 256\n    depth: 4"))
    MetricsLog(run / "prior-top").image("samples", 100, png(100))
    write_stage_record(run / "prior-top", done=True)
    write_stage_record(run / "report", done=True)
    (run / "report" / "report.html").write_text("<p>one")
    assert sync(run, default_uri(run)) == mlflow_sync.SyncResult(0, 1)
    assert set(pictures(run, "prior-top")) == {("samples", 90), ("samples", 100)}
    page = artifacts / parent.info.run_id / "artifacts/report.html"
    assert page.read_text() == "<p>one"
    assert {r.info.status for r in runs_of(run)} == {"FINISHED"}
    prior = client.get_run(children["prior-top"].info.run_id).data.params
    assert (prior["prior.width"], prior["prior.depth"]) == ("128", "4")
    (run / "report" / "report.html").write_text("<p>second")
    assert sync(run, default_uri(run)) == mlflow_sync.SyncResult()
    assert page.read_text() == "<p>second"

    # A longer training of a finished stage continues the same MLflow run.
    write_stage_record(run / "tokenizer", done=False)
    extend(run / "tokenizer", [50])
    assert sync(run, default_uri(run)).metrics == 4
    status = {r.info.run_name: r.info.status for r in runs_of(run)}
    assert len(runs_of(run)) == len(status)
    assert status == {"two": "RUNNING", "tokenizer": "RUNNING", "prior-top": "FINISHED", "report": "FINISHED"}

    assert capfd.readouterr() == ("", ""), "MLflow or alembic printed something"
    assert list(tmp_path.iterdir()) == [], "MLflow left something in the working directory"


def test_every_stage_has_a_run_with_its_parameters(runs):
    """A stage's settings are in stage.json; the config leaves out priors that use the defaults."""
    run = make_run(runs, "parameters", ("tokenizer", "prior-bottom"))
    prior = {"model": {"kind": "gpt", "layers": 4}, "facts": ["label"]}
    write_stage_record(run / "prior-bottom", identity={"prior": prior, "level": "bottom"}, inputs={"codes": "0123"})
    write_stage_record(run / "codes", identity={"encode": {"draws": 8}}, inputs={"tokenizer": "4567"}, done=True)
    write_stage_record(run / "samples", identity={"sample": {"guidance": 2.0}})
    with open(run / "config.yaml", "a") as file:
        file.write("sample: {number: 9}\n")
    sync(run, default_uri(run))
    params = {r.info.run_name: r.data.params for r in runs_of(run)}
    assert set(params) == {"parameters", "tokenizer", "prior-bottom", "codes", "samples"}
    expected = {"prior.model.kind": "gpt", "prior.model.layers": "4", "prior.facts": '["label"]', "level": "bottom"}
    assert params["prior-bottom"].items() >= (expected | {"input.codes": "0123"}).items()
    assert params["codes"].items() >= {"encode.draws": "8", "input.tokenizer": "4567"}.items()
    assert params["samples"].items() >= {"sample.guidance": "2.0", "sample.number": "9"}.items()


@pytest.mark.parametrize("what", ["cursor", "ids", "wrong ids", "nothing but the uid"])
def test_a_crash_between_sending_and_the_cursor(runs, what):
    """Resets mlflow.json to its content before the second sync, as after a crash. Some cases also change or remove entries."""
    run = make_run(runs, f"crash-{what.replace(' ', '-')}")
    state = run / "mlflow.json"
    sync(run, default_uri(run))
    old = json.loads(state.read_text())
    extend(run / "tokenizer", range(50, 80, 10))
    sync(run, default_uri(run))
    store = old["stores"][default_uri(run)]
    if what == "ids":
        del store["stages"]["tokenizer"], store["parent"]["id"]
    elif what == "wrong ids":  # as after the database was replaced by another
        store["parent"]["id"] = store["stages"]["tokenizer"]["id"] = "0" * 32
    elif what == "nothing but the uid":
        old["stores"] = {}
    state.write_text(json.dumps(old))
    extend(run / "tokenizer", [80])
    new_process()
    assert sync(run, default_uri(run)).metrics == 4, "sync must send only the new line"
    assert history(run) == expected(run)
    assert len(expected(run)) == 8
    assert len(runs_of(run)) == 2


def test_a_copy_has_an_mlflow_run_of_its_own_and_a_moved_run_keeps_its(runs):
    run = make_run(runs, "original")
    sync(run, default_uri(run))
    before = history(run)
    # cp -r original copy, then the copy is trained on.
    copy = runs / "copy"
    shutil.copytree(run, copy)
    (copy / "config.yaml").write_text(CONFIG.format(name="copy"))
    extend(copy / "tokenizer", [70, 80])
    new_process()
    sync(copy, default_uri(copy))
    assert history(copy) == expected(copy) and len(history(copy)) == len(before) + 2
    assert history(run) == before, "points of the copy went into the original's run"
    assert entry_of(copy)["id"] != entry_of(run)["id"]
    # mv original moved
    known = entry_of(run)["id"]
    moved = run.rename(runs / "moved")
    extend(moved / "tokenizer", [90])
    new_process()
    sync(moved, default_uri(moved))
    assert entry_of(moved)["id"] == known and history(moved) == expected(moved)


def test_the_cursor_in_another_process(runs):
    run = make_run(runs, "process")
    sync(run, default_uri(run))
    old = (run / "mlflow.json").read_bytes()
    extend(run / "tokenizer", range(50, 80, 10))
    sync(run, default_uri(run))
    (run / "mlflow.json").write_bytes(old)
    imports = "from hpc.run.mlflow_address import default_uri; from hpc.run.mlflow_sync import sync"
    code = f"{imports}; print(sync({str(run)!r}, default_uri({str(run)!r})).metrics)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
    assert history(run) == expected(run)


def test_a_lost_answer_and_a_refused_request(runs, monkeypatch):
    """The second of three requests fails. The next sync repeats it, but the answer is lost. The third sync sends the rest."""
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
        with pytest.raises(mlflow_sync.SyncError, match="http://server: no answer"):
            sync(run, default_uri(run))
    assert sync(run, default_uri(run)).metrics == 400
    assert calls == [1000, 1000, 1000, 400]
    assert history(run) == expected(run)
    assert len(expected(run)) == 1200


def test_a_resume_doubles_no_point(runs):
    """After a resume, some samples are logged again. MLflow must keep the points that it has, and get only the later ones."""
    run = make_run(runs, "resume", lines=6)
    sync(run, default_uri(run))
    before = history(run)
    log = MetricsLog(run / "tokenizer")
    log.resume(30)
    assert sync(run, default_uri(run)) == mlflow_sync.SyncResult()
    extend(run / "tokenizer", [40], offset=1.0)
    assert sync(run, default_uri(run)) == mlflow_sync.SyncResult()
    log.resume(20)
    extend(run / "tokenizer", range(70, 160, 10), offset=2.0)  # beyond the samples that MLflow has
    assert sync(run, default_uri(run)).metrics == 9 * 4
    assert history(run) == before + [(count, 1 / count + 2.0) for count in range(70, 160, 10)]


def test_two_lines_at_one_count_and_a_torn_one(runs):
    """Held-out metrics have a line of their own with the samples of the training metrics. They may be sent one sync later."""
    run = make_run(runs, "lines", lines=1)
    sync(run, default_uri(run))
    log = MetricsLog(run / "tokenizer")
    log.log(1, 10, {"val/loss": 7.0})
    path = run / "tokenizer" / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert sync(run, default_uri(run)).metrics == 0
    path.write_bytes(whole)
    new_process()
    assert sync(run, default_uri(run)).metrics == 1
    # Lines that a power failure has damaged are passed over.
    with open(path, "ab") as file:
        file.write(b'12\n"\xff"\n[]\n{"samples": "x"}\n{"step": 3}\n\0\0\0\n{"step": 2, "sam')
    extend(run / "tokenizer", [20])
    assert sync(run, default_uri(run)).metrics == 4
    assert history(run) == [(10, 0.1), (20, 0.05)]
    assert history(run, name="val/loss") == [(10, 7.0)]
    assert history(run, name="samples") == [(10, 10), (20, 20)]


def test_fresh_is_another_run_and_a_deleted_one_stays_deleted(runs):
    run = make_run(runs, "fresh")
    write_stage_record(run / "tokenizer", created=1.7e9)
    sync(run, default_uri(run))
    first = entry_of(run)["id"]
    MetricsLog(run / "tokenizer").resume(0)
    write_stage_record(run / "tokenizer", created=1.8e9)
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
    """Two runs of one experiment log while two followers send each of them, as when two priors train at the same time."""
    both = [make_run(runs, name, ("tokenizer", "prior-top"), experiment="shared") for name in ("a", "b")]
    logs = [MetricsLog(run / stage) for run in both for stage in ("tokenizer", "prior-top")]
    followers = [Follower(run, default_uri(run), interval=0.01) for run in both for _ in range(2)]
    for count in range(50, 650, 10):
        for log in logs:
            log.log(count // 10, count, {"train/loss": 1 / count})
        time.sleep(0.005)
    assert all(follower.close() for follower in followers)
    for run in both:
        for stage in ("tokenizer", "prior-top"):
            assert history(run, stage) == expected(run, stage)
            assert len(expected(run, stage)) == 64
    assert Counter(r.info.run_name for r in runs_of(both[0])) == {"a": 1, "b": 1, "tokenizer": 2, "prior-top": 2}
