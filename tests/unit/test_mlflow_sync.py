"""The metrics log, and the parts of mlflow_sync.py that need no MLflow. tests/chain/test_mlflow.py tests the other parts."""

import json
import math
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from hpc.run import mlflow_content, mlflow_follower, mlflow_sync
from hpc.run.metrics_log import MetricsLog, read_metrics, system_metrics
from hpc.run.mlflow_address import default_uri, run_link
from hpc.run.mlflow_follower import Follower
from hpc.run.mlflow_sync import sync
from launch.ui import serve


def written(tmp_path, *samples):
    """Logs a loss at each number of samples. Returns the path of metrics.jsonl."""
    log = MetricsLog(tmp_path)
    for count in samples:
        log.log(count // 10, count, {"loss": 1.0 / count})
    return tmp_path / "metrics.jsonl"


def test_a_line_is_readable_at_once(tmp_path):
    log = MetricsLog(tmp_path / "new" / "tokenizer")
    log.log(3, 96, {"train/loss": 0.25, "usage": 1})
    [row] = read_metrics(log.stage_dir)
    assert (row["step"], row["samples"], row["train/loss"], row["usage"]) == (3, 96, 0.25, 1.0)
    assert row["time"] > 1.7e9


def test_non_finite_values_stay_strict_json(tmp_path):
    log = MetricsLog(tmp_path)
    log.log(1, 10, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 2.5})

    def refuse(text):
        raise AssertionError(text)

    raw = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (raw["a"], raw["b"], raw["c"], raw["d"]) == ("nan", "inf", "-inf", 2.5)
    [row] = read_metrics(tmp_path)
    assert math.isnan(row["a"])
    assert row["b"] == math.inf
    assert row["c"] == -math.inf


@pytest.mark.parametrize("name", ["a//b", "/a", "a=b", "", "x" * 251, "samples", "time"])
def test_a_name_mlflow_would_refuse_never_reaches_the_file(tmp_path, name):
    with pytest.raises(AssertionError):
        MetricsLog(tmp_path).log(1, 10, {name: 0.0})
    assert read_metrics(tmp_path) == []


def test_resume_cuts_back_to_the_checkpoint(tmp_path):
    path = written(tmp_path, 10, 20, 30, 40)
    expected = path.read_bytes().splitlines(keepends=True)[:2]
    log = MetricsLog(tmp_path)
    log.log(5, 50, {"loss": 0.0})
    log.resume(20)
    assert path.read_bytes() == b"".join(expected)
    log.log(3, 30, {"loss": 9.0})
    assert [(row["samples"], row["loss"]) for row in read_metrics(tmp_path)] == [(10, 0.1), (20, 0.05), (30, 9.0)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_resume_where_nothing_is(tmp_path):
    MetricsLog(tmp_path / "absent").resume(0)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("cut", range(2, 40))
def test_a_torn_last_line_is_passed_over_and_dropped_on_resume(tmp_path, cut):
    path = written(tmp_path, 10, 20)
    path.write_bytes(path.read_bytes()[:-cut])
    assert [row["samples"] for row in read_metrics(tmp_path)] == [10]
    log = MetricsLog(tmp_path)
    log.resume(1000)
    log.log(3, 30, {"loss": 0.0})
    assert [row["samples"] for row in read_metrics(tmp_path)] == [10, 30]


def test_pictures_are_whole_and_cut_back_too(tmp_path):
    log = MetricsLog(tmp_path)
    for count in (10, 20, 1_500_000_000):
        log.image("recon-top", count, b"png")
    (tmp_path / "images" / "legend-x.png").write_bytes(b"png")
    assert (tmp_path / "images" / "recon-top-000000010.png").read_bytes() == b"png"
    log.resume(10)
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["legend-x.png", "recon-top-000000010.png"]


def test_other_ranks_write_nothing(tmp_path):
    written(tmp_path, 10)
    log = MetricsLog(tmp_path, enabled=False)
    log.resume(0)
    log.log(2, 20, {"loss": 0.0})
    log.image("a", 20, b"png")
    assert [row["samples"] for row in read_metrics(tmp_path)] == [10]
    assert not (tmp_path / "images").exists()


def test_system_metrics(monkeypatch):
    found = system_metrics()
    assert all(name.startswith("system/") and math.isfinite(value) for name, value in found.items())
    assert 0.01 < found["system/memory_resident_gb"] < 100

    def no_driver():
        raise RuntimeError("no NVML")

    cuda = SimpleNamespace(
        is_available=lambda: True,
        mem_get_info=lambda: (2_000_000_000, 5_000_000_000),
        max_memory_allocated=lambda: 1_000_000_000,
        utilization=no_driver,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    found = system_metrics()
    assert found["system/gpu_memory_gb"] == 3.0
    assert "system/gpu_percent" not in found
    cuda.utilization = lambda: 87
    assert system_metrics()["system/gpu_percent"] == 87.0


def test_default_uri_and_link(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "runs" / "ham"
    assert default_uri(run) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert run_link(run, default_uri(run)) == "lesiongen ui"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@server:5000/")
    assert default_uri(run) == "http://me:secret@server:5000/"
    assert run_link(run, default_uri(run)) is None
    run.mkdir(parents=True)
    store = {"experiment": "7", "parent": {"id": "abc"}}
    (run / "mlflow.json").write_text(json.dumps({"uid": "u", "stores": {"http://server:5000/": store}}))
    assert run_link(run, default_uri(run)) == "http://server:5000/#/experiments/7/runs/abc?workflowType=machine_learning"


def test_flatten_makes_what_mlflow_takes():
    config = {"name": "a", "model": {"widths": [1, 2], "x=y": None, "deep": {"flag": True}}, "long": "z" * 900}
    flat = dict(mlflow_content.flatten(config))
    assert flat == {
        "name": "a", "model.widths": "[1, 2]", "model.x_y": "null", "model.deep.flag": "true", "long": "z" * 500
    }  # fmt: skip


def test_nothing_to_send_needs_no_mlflow(tmp_path):
    code = (
        "import sys; from hpc.run.mlflow_follower import sync\n"
        f"assert sync({str(tmp_path)!r}, 'http://127.0.0.1:9').metrics == 0\n"
        "assert not {'mlflow', 'psutil', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert sync(tmp_path, "http://127.0.0.1:9") == mlflow_sync.SyncResult()
    assert list(tmp_path.iterdir()) == []


def test_follower_says_once_that_it_fails_and_once_that_it_is_back(tmp_path, monkeypatch, capsys):
    answers = [
        mlflow_sync.SyncError("away"),
        mlflow_sync.SyncError("away"),
        mlflow_sync.SyncResult(1),
        mlflow_sync.SyncResult(busy=True),
    ]

    def fake_sync(run_dir, uri):
        answer = answers.pop(0) if answers else mlflow_sync.SyncResult()
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(mlflow_follower, "sync", fake_sync)
    follower = Follower(tmp_path, "http://u:p@server", interval=0.001)
    deadline = time.monotonic() + 10
    while answers and time.monotonic() < deadline:
        time.sleep(0.001)
    assert follower.close(deadline=5)
    assert follower.failures == 2
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 2
    assert messages[0].startswith("away. Training continues")
    assert messages[1] == "MLflow at http://server is reachable again."


def test_follower_gives_up_when_another_process_stays_busy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mlflow_follower, "sync", lambda *_: mlflow_sync.SyncResult(busy=True))
    assert not Follower(tmp_path, "http://server", interval=60).close(deadline=0.2)
    assert "did not receive the last metrics" in capsys.readouterr().err


def test_serve_refuses_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        serve(tmp_path)
    (tmp_path / "ham").mkdir()
    (tmp_path / "ham" / "config.yaml").write_text("name: ham\n")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1:{port}"):
            serve(tmp_path, port=port)
