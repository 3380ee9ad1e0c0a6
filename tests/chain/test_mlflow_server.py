"""The Follower and `lesiongen ui` with real servers: one is killed, one never answers, one shows runs."""

import base64
import http.client
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from hpc.run import mlflow_address, mlflow_follower, mlflow_sync
from hpc.run.metrics_log import MetricsLog, read_metrics
from hpc.run.mlflow_address import default_uri, run_link
from hpc.run.mlflow_follower import Follower
from hpc.run.mlflow_sync import sync
from launch.__main__ import main
from tests.chain.mlflow_runs import entry_of, expected, extend, history, make_run, new_process, png, runs_of, wait_for
from tests.conftest import DEMO, tiny

pytest.importorskip("sqlalchemy", reason="the http-only mlflow-skinny has no store of its own")


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
    """A real MLflow server. A server that is started after a kill has the same store."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, free_port(), None
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/s.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | mlflow_address.MLFLOW_ENVIRONMENT, start_new_session=True
            )
        wait_for(lambda: answers(self.port))

    def kill(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.mark.long
def test_a_server_that_goes_and_comes_back(runs, tmp_path, capsys):
    server = Server(tmp_path)
    run = make_run(tmp_path / "runs", "http", lines=1)
    log, count, slowest = MetricsLog(run / "tokenizer"), 10, 0.0

    def train(lines):
        nonlocal count, slowest
        for _ in range(lines):
            count += 10
            before = time.monotonic()
            log.log(count // 10, count, {"train/loss": 1 / count})
            slowest = max(slowest, time.monotonic() - before)
            time.sleep(0.002)

    def arrived():
        state = run / "mlflow.json"
        stored = json.loads(state.read_text())["stores"].get(server.uri, {}) if state.exists() else {}
        return stored.get("stages", {}).get("tokenizer", {}).get("last", {}).get("samples", 0)

    try:
        server.start()
        log.image("recon", 10, png(10))
        follower = Follower(run, server.uri, interval=0.05)
        train(50)
        wait_for(lambda: arrived() > 10)
        assert run_link(run, server.uri).startswith(f"{server.uri}/#/experiments/")
        timer = threading.Timer(0.1, server.kill)  # kill the server while the follower sends
        timer.start()
        train(200)
        timer.join()
        wait_for(lambda: follower.failures > 1)
        before = time.monotonic()
        assert not follower.close(deadline=3)
        assert time.monotonic() - before < 4
        messages = capsys.readouterr().err.splitlines()
        assert len(messages) == 2
        assert "Training continues" in messages[0]
        assert "did not receive the last metrics" in messages[1]
        assert slowest < 0.5, "log() waited for the server"  # log() only writes to a file; 0.5 s allows for a busy machine
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
        [picture] = (tmp_path / "artifacts").rglob("recon+step+10+*.png")
        assert Image.open(picture).getpixel((0, 0)) == 10
        assert child in str(picture)
        assert sync(run, server.uri) == mlflow_sync.SyncResult()
    finally:
        server.kill()


class Gateway:
    """An HTTP server before MLflow's, as a proxy of a cluster: it answers 500 until it is `repaired`, and then forwards."""

    def __init__(self, port):
        repaired = self.repaired = threading.Event()
        refused = self.refused = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, answer = 500, b"<h1>Internal Server Error</h1>"
                if repaired.is_set():
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                    connection.request(self.command, self.path, body, dict(self.headers))
                    response = connection.getresponse()
                    status, answer = response.status, response.read()
                else:
                    refused.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_PUT = do_PATCH = handle_any

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.mark.long
def test_a_server_that_answers_500_while_a_tokenizer_is_trained(packed, phantoms, tmp_path, monkeypatch, capsys):
    """The training goes on at its speed, the log is complete, and after the repair everything is sent once."""
    server, run = Server(tmp_path), tmp_path / "tiny"
    gateway = Gateway(server.port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gateway.uri)
    command = ["train", "tokenizer", DEMO, *tiny(phantoms, tmp_path, **{"tokenizer.train.samples": 1280})]
    before = time.monotonic()
    assert main([*command, f"inputs.shards=[{packed / 'shards'}]"]) == 0
    assert time.monotonic() - before < 60
    said = [line for line in capsys.readouterr().err.splitlines() if "MLflow" in line]
    assert len(gateway.refused) >= 2 and len(said) == 2, said
    assert "500" in said[0] and "Training continues" in said[0] and "did not receive the last metrics" in said[1]
    assert [row["samples"] for row in read_metrics(run / "tokenizer") if "train/loss" in row] == list(range(16, 1281, 16))
    try:
        server.start()
        gateway.repaired.set()
        new_process()
        assert sync(run, gateway.uri).metrics > 300
        assert [samples for samples, _ in history(run, uri=gateway.uri)] == list(range(16, 1281, 16))
        assert sync(run, gateway.uri) == mlflow_sync.SyncResult()
    finally:
        server.kill()
        gateway.server.shutdown()


def test_a_database_that_is_locked(runs, monkeypatch, capsys):
    """Another process locks mlflow.db, as a backup or a hung file system does: nothing waits for it, and nothing is lost."""
    monkeypatch.setattr(mlflow_follower, "STALE_CLOSE_S", 1.0)
    run = make_run(runs, "locked")
    uri = default_uri(run)
    sync(run, uri)
    new_process()
    code = (
        "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1]); c.execute('BEGIN EXCLUSIVE'); print('locked', flush=True)"
    )
    locker = subprocess.Popen(
        [sys.executable, "-c", f"{code}; time.sleep(600)", str(runs / "mlflow.db")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert locker.stdout.readline() == "locked\n"
        log, slowest = MetricsLog(run / "tokenizer"), 0.0
        follower = Follower(run, uri, interval=0.05)
        for count in range(50, 1050, 10):
            before = time.monotonic()
            log.log(count // 10, count, {"train/loss": 1 / count})
            slowest = max(slowest, time.monotonic() - before)
            time.sleep(0.005)
        assert slowest < 0.5, "log() waited for the database"
        before = time.monotonic()
        assert not follower.close()
        assert time.monotonic() - before < mlflow_follower.STALE_CLOSE_S + 1
    finally:
        locker.kill()
        locker.wait()
    assert "did not receive the last metrics" in capsys.readouterr().err
    wait_for(lambda: not follower._thread.is_alive(), 60)  # the thread of a longer process sends everything by itself
    assert history(run) == expected(run) and len(expected(run)) == 104
    assert sync(run, uri) == mlflow_sync.SyncResult()


def test_a_server_that_hangs_does_not_hold_up_the_exit(runs, tmp_path):
    """The server accepts the connection and never answers."""
    run = make_run(tmp_path, "hang")
    with socket.create_server(("127.0.0.1", 0)) as silent_server:
        code = (
            "import mlflow, sys, time; from hpc.run.mlflow_follower import Follower\n"
            "follower = Follower(sys.argv[1], sys.argv[2], interval=0.01)\n"
            "time.sleep(0.3); before = time.monotonic()\n"
            "assert not follower.close(deadline=0.5); print(time.monotonic() - before); print(time.time())\n"
        )
        uri = f"http://127.0.0.1:{silent_server.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", code, str(run), uri], capture_output=True, text=True, timeout=60, check=True
        )
        ended_at = time.time()
    close_seconds, left_at = map(float, done.stdout.split())
    assert 0.4 < close_seconds < 1.5
    assert ended_at - left_at < 2.0
    assert "did not receive the last metrics" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.long
def test_on_another_address_the_page_asks_for_a_password(tmp_path):
    pytest.importorskip("flask_wtf", reason="needs mlflow[auth]")
    runs, port = tmp_path / "runs", free_port()
    make_run(runs, "ham")
    command = [sys.executable, "-m", "launch", "ui", "--runs", str(runs), "--port", str(port), "--host", "0.0.0.0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert re.search(rf":{port}/#/experiments/1/runs\?", process.stdout.readline())
        assert process.stdout.readline() == f"sign in as admin with the password in {runs / '.mlflow-password'}\n"
        password = (runs / ".mlflow-password").read_text()
        assert (runs / ".mlflow-password").stat().st_mode & 0o077 == 0
        search, body = "/api/2.0/mlflow/experiments/search?max_results=9", b""
        for user, answer in ((None, 401), ("admin:wrong", 401), (f"admin:{password}", 200)):
            header = {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"} if user else {}
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", search, headers=header)
            response = connection.getresponse()
            assert response.status == answer, user
            body = response.read()
        assert b"ham" in body
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def test_serve_shows_what_is_there_and_what_comes(tmp_path):
    """Runs the function behind `lesiongen ui` without an existing store, while a run continues to log."""
    runs, port = tmp_path / "runs", free_port()
    run = make_run(runs, "ham")
    MetricsLog(run / "tokenizer").image("recon", 10, png(10))
    code = f"import sys; from launch.ui import serve; serve(sys.argv[1], port={port})"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(runs)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        page = f"http://127.0.0.1:{port}/#/experiments/1/runs?workflowType=machine_learning"
        assert process.stdout.readline() == f"MLflow shows {runs} at {page} (Ctrl-C ends it)\n"
        wait_for(lambda: (run / "mlflow.json").exists() and '"offset"' in (run / "mlflow.json").read_text())
        child = entry_of(run)["id"]
        artifacts = f"/api/2.0/mlflow/artifacts/list?run_id={child}&path=images"
        wait_for(lambda: "recon+step+10+" in get(port, artifacts)[1].decode())
        extend(run / "tokenizer", [50])
        history_path = f"/api/2.0/mlflow/metrics/get-history?run_id={child}&metric_key=samples"
        wait_for(lambda: len(json.loads(get(port, history_path)[1])["metrics"]) == 5)
        assert get(port, "/")[0] == 200
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")
    assert not answers(port)
    assert Path(runs / "mlflow.db").exists()
