"""The verb `ui`: serves MLflow's web page with the runs of this machine.

MLflow's server shows the SQLite file beside the run directories. While it serves, this process copies new metrics from each
run's metrics.jsonl into that file (hpc/run/mlflow_sync.py).
"""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from hpc.errors import UserError
from hpc.run.mlflow_follower import print_stderr
from hpc.run.mlflow_sync import MLFLOW_ENVIRONMENT, SyncError, create_store, sync

SYNC_S = 5.0  # between two syncs of all runs


def serve(runs: Path, host: str = "127.0.0.1", port: int = 5000) -> None:
    """Serves MLflow's page with the runs of a directory, until Ctrl-C or SIGTERM. New metrics appear within seconds.

    Args:
        runs: Directory of run directories.
        host: Address to listen on.
        port: Port to listen on.

    Raises:
        UserError: The directory holds no run, or the port is in use.
        SyncError: The server ended by itself.
    """
    runs, stop = Path(runs).absolute(), threading.Event()
    if not any(runs.glob("*/config.yaml")):
        raise UserError(f"{runs} holds no run (no subdirectory with a config.yaml). Start a run, or name another directory.")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise UserError(f"Cannot listen on {host}:{port} ({error.strerror}). Name another port with --port.") from None
    # The store is not mlflow_sync.default_uri(): the page shows this machine's runs even if the environment names a server.
    uri, log = f"sqlite:///{runs}/mlflow.db", runs / "mlflow-server.log"
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    server = _start_server(runs, uri, host, port, log)
    try:
        while server.poll() is None and not stop.is_set() and not _answers(host, port):
            stop.wait(0.2)
        if server.poll() is None and not stop.is_set():
            print(f"MLflow shows {runs} at http://{host}:{port} (Ctrl-C ends it)", flush=True)
        reported: set[str] = set()
        while server.poll() is None and not stop.is_set():
            _sync_all(runs, uri, reported)
            stop.wait(SYNC_S)
        if not stop.is_set():
            raise SyncError(f"mlflow server ended with code {server.returncode}; the reason is at the end of {log}")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _stop_server(server)


def _start_server(runs: Path, uri: str, host: str, port: int, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri, "--artifacts-destination", str(runs / "mlartifacts")]
    create_store(uri)
    with open(log, "wb") as output:
        environment = MLFLOW_ENVIRONMENT | os.environ
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)


def _sync_all(runs: Path, uri: str, reported: set[str]) -> None:
    """Syncs every run. Prints each error once; `reported` holds the errors that were printed."""
    for config in sorted(runs.glob("*/config.yaml")):
        try:
            sync(config.parent, uri)
        except SyncError as error:
            if str(error) not in reported:
                reported.add(str(error))
                print_stderr(f"{config.parent.name}: {error}")


def _stop_server(server: subprocess.Popen) -> None:
    """Ends the server and its worker processes, which share its process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(server.pid, number)
            server.wait(10)


def _answers(host: str, port: int) -> bool:
    """Returns whether the server answers requests."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1" if host == "0.0.0.0" else host, port, timeout=2)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
