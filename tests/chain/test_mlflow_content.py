"""Tests what MLflow shows of a run, with the real MLflow: names, tags, data sets, notes, alarms, status, experiment."""

import os
import socket
import time

import pytest
import yaml

from hpc.run import mlflow_content
from hpc.run.metrics_log import ALARMS_FILE, MetricsLog
from hpc.run.mlflow_address import default_uri
from hpc.run.mlflow_sync import sync
from hpc.run.rundir import lock
from tests.chain.mlflow_runs import (
    client_of,
    entry_of,
    extend,
    make_run,
    new_process,
    pictures,
    png,
    runs_of,
    write_stage_record,
)

pytest.importorskip("sqlalchemy", reason="the http-only mlflow-skinny has no store of its own")
MADE = {
    "user": "mia",
    "host": "gpu1",
    "job": "77",
    "command": ["/env/bin/lesiongen", "run", "configs/ham.yaml", "name=a", "--yes"],
    "versions": {"commit": "abc123"},
}


def tags(run, stage=None):
    return client_of(run).get_run(entry_of(run, stage)["id"]).data.tags


def status(run, stage=None):
    sync(run, default_uri(run))
    return client_of(run).get_run(entry_of(run, stage)["id"]).info.status


def make_old(stage):
    """Makes a stage's files look as if nothing had been written for an hour."""
    for path in stage.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)


def test_names_and_tags_say_what_a_stage_is_and_who_made_it(runs):
    run = make_run(runs, "named", ("tokenizer", "prior-top"))
    write_stage_record(run / "prior-top", title="gpt 4×192 · 2.0 M", environment=MADE)
    sync(run, default_uri(run))
    assert {r.info.run_name for r in runs_of(run)} == {"named", "tokenizer", "prior-top · gpt 4×192 · 2.0 M"}
    expected = {"mlflow.user": "mia", "mlflow.source.git.commit": "abc123", "mlflow.source.type": "JOB", "host": "gpu1"}
    expected |= {"mlflow.source.name": "lesiongen run ham.yaml", "cluster.job": "77"}
    expected["command"] = "/env/bin/lesiongen run configs/ham.yaml name=a --yes"
    assert tags(run, "prior-top").items() >= expected.items()


def test_the_lineage_of_data_sets(runs):
    run = make_run(runs, "lineage", ("tokenizer",))
    write_stage_record(run / "shards", done=True, digest="aaa1")
    write_stage_record(run / "tokenizer", done=True, digest="bbb2", inputs={"shards": "aaa1"})
    write_stage_record(run / "codes", inputs={"shards": "aaa1", "tokenizer": "bbb2", "polish": None})
    sync(run, default_uri(run))
    sync(run, default_uri(run))

    def found(stage):
        inputs = client_of(run).get_run(entry_of(run, stage)["id"]).inputs.dataset_inputs
        return {(i.dataset.name, i.dataset.digest, i.tags[0].value) for i in inputs}

    assert found("shards") == {("shards", "aaa1", "made here")}
    assert found("tokenizer") == {("shards", "aaa1", "made from"), ("tokenizer", "bbb2", "made here")}
    assert found("codes") == {("shards", "aaa1", "made from"), ("tokenizer", "bbb2", "made from")}
    source = client_of(run).get_run(entry_of(run, "codes")["id"]).inputs.dataset_inputs[0].dataset.source
    assert str(run) in source
    write_stage_record(run / "codes", inputs={"shards": "aaa1", "tokenizer": "bbb2"}, done=True, digest="ccc3")
    sync(run, default_uri(run))
    assert found("codes") >= {("codes", "ccc3", "made here")}


def test_the_parent_has_a_note_and_the_figures_of_all_stages(runs):
    run = make_run(runs, "note", ("tokenizer",))
    write_stage_record(run / "tokenizer", title="vqvae2", done=True)
    MetricsLog(run / "tokenizer").log(5, 50, {"val/psnr": 31.5})
    write_stage_record(run / "report", done=True, created=1.8e9)
    MetricsLog(run / "report").log(0, 0, {"headline/kid": 101.0, "likeness/kid": 3.0})
    (run / "report" / mlflow_content.NOTE_FILE).write_text("**Verdict: caution**\n")
    sync(run, default_uri(run))
    parent = client_of(run).get_run(entry_of(run, None)["id"])
    note = parent.data.tags["mlflow.note.content"]
    assert note.startswith("**Verdict: caution**")
    assert "| tokenizer | vqvae2 | finished | psnr 31.5 |" in note and "| report |  | finished | kid 101 |" in note
    assert parent.data.metrics == {"tokenizer/psnr": 31.5, "report/kid": 101.0}
    assert tags(run, "report")["mlflow.note.content"] == "**Verdict: caution**\n"

    # A new figure changes the note. A note that a user has edited stays.
    MetricsLog(run / "tokenizer").log(6, 60, {"val/psnr": 32.5})
    sync(run, default_uri(run))
    parent = client_of(run).get_run(entry_of(run, None)["id"])
    assert "psnr 32.5" in parent.data.tags["mlflow.note.content"] and parent.data.metrics["tokenizer/psnr"] == 32.5
    client_of(run).set_tag(entry_of(run, None)["id"], "mlflow.note.content", "my own words")
    MetricsLog(run / "tokenizer").log(7, 70, {"val/psnr": 33.5})
    sync(run, default_uri(run))
    assert tags(run)["mlflow.note.content"] == "my own words"


def test_alarms_are_tags_of_the_stage_and_of_the_parent(runs, capsys):
    run = make_run(runs, "alarms", ("tokenizer",))
    log = MetricsLog(run / "tokenizer")
    log.alarm("straggler", "rank 1 is slow")
    sync(run, default_uri(run))
    log.alarm("straggler", "rank 2 is slow")
    log.alarm("collapse", "level 'top' is collapsing")
    log.resume(0)  # alarms tell what has happened, also after a resume
    assert "warning: rank 2 is slow" in capsys.readouterr().err
    assert len((run / "tokenizer" / ALARMS_FILE).read_text().splitlines()) == 3
    sync(run, default_uri(run))
    assert tags(run, "tokenizer")["alarm.straggler"] == "rank 2 is slow"
    assert tags(run)["alarm.straggler"] == "tokenizer: rank 2 is slow"
    assert tags(run)["alarm.collapse"] == "tokenizer: level 'top' is collapsing"


def test_the_status_of_a_stage_that_fails_is_stopped_or_is_killed(runs):
    run = make_run(runs, "status", ("tokenizer",))
    stage = run / "tokenizer"
    write_stage_record(stage)
    assert (status(run, "tokenizer"), status(run)) == ("RUNNING", "RUNNING")
    write_stage_record(stage, ended={"how": "failed", "reason": "the loss is not finite"})
    assert (status(run, "tokenizer"), status(run)) == ("FAILED", "FAILED")
    assert tags(run, "tokenizer")["ended"] == "the loss is not finite"
    with lock(stage):  # resumed
        write_stage_record(stage)
        assert (status(run, "tokenizer"), status(run)) == ("RUNNING", "RUNNING")
    write_stage_record(stage, ended={"how": "stopped", "reason": "signal 15"})
    assert status(run, "tokenizer") == "KILLED"
    # SIGKILL leaves no record, but frees the lock. A lock may not reach from another machine: there, the files tell.
    write_stage_record(stage, environment={"host": socket.gethostname()})
    assert status(run, "tokenizer") == "KILLED"
    write_stage_record(stage, environment={"host": "another"})
    assert status(run, "tokenizer") == "RUNNING"
    extend(stage, [50])
    with lock(stage):
        make_old(stage)
        assert status(run, "tokenizer") == "RUNNING"
    assert (status(run, "tokenizer"), status(run)) == ("KILLED", "KILLED")
    write_stage_record(stage, done=True, finished=time.time())
    assert (status(run, "tokenizer"), status(run)) == ("FINISHED", "SCHEDULED")
    write_stage_record(run / "report", done=True)
    assert status(run) == "FINISHED"


def test_a_stage_that_fails_before_its_first_metrics_is_seen(runs):
    run = make_run(runs, "early", ())
    write_stage_record(run / "prior-top", ended={"how": "failed", "reason": "CUDA out of memory"})
    write_stage_record(run / "samples-mel-9-seed0", done=True)
    assert status(run, "prior-top") == "FAILED"
    assert {r.info.run_name for r in runs_of(run)} == {"early", "prior-top"}


def test_pictures_are_sent_once_also_after_a_crash(runs):
    run = make_run(runs, "pictures", ("prior-top",))
    log = MetricsLog(run / "prior-top")
    log.image("samples", 10, png(10))
    log.image("code-map", 10, png(20))
    sync(run, default_uri(run))
    state = (run / "mlflow.json").read_bytes()
    log.image("samples", 20, png(30))
    (run / "prior-top" / "images" / "broken-000000020.png").write_bytes(b"torn")
    sync(run, default_uri(run))
    (run / "mlflow.json").write_bytes(state)  # as if the process had been killed before it saved what it has sent
    new_process()
    sync(run, default_uri(run))
    assert set(pictures(run, "prior-top")) == {("samples", 10), ("code-map", 10), ("samples", 20)}


def test_the_config_names_the_experiment(runs):
    run = make_run(runs, "one", ("tokenizer",))
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"mlflow": {"experiment": "ham10000"}}))
    sync(run, default_uri(run))
    client = client_of(run)
    experiment = client.get_experiment_by_name("ham10000").experiment_id
    assert {r.info.run_name for r in client.search_runs([experiment])} == {"one", "tokenizer"}
