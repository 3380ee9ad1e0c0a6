"""ui: MLflow's page on what this machine holds."""

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
from hpc.run.mlflow_sync import ENVIRONMENT, SyncError, say, sync


def serve(runs: Path, host: str = "127.0.0.1", port: int = 5000) -> None:
    """MLflow's page on the runs of a directory, kept up to date every 5 s until Ctrl-C or SIGTERM.

    Raises UserError (a ValueError) if there is no run or the port is taken, SyncError if the server ends by itself.
    """
    runs, stop, told = Path(runs).absolute(), threading.Event(), set()
    if not any(runs.glob("*/config.yaml")):
        raise UserError(f"{runs} holds no run (a directory with a config.yaml). Start one, or name another directory.")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise UserError(f"Cannot listen on {host}:{port} ({error.strerror}). Name another port.") from None
    uri = f"sqlite:///{runs}/mlflow.db"  # not default_uri: an environment that names a server does not change this page
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri, "--artifacts-destination", str(runs / "mlartifacts")]
    log = runs / "mlflow-server.log"
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    with open(log, "wb") as output:
        environment = ENVIRONMENT | os.environ
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        while server.poll() is None and not stop.is_set() and not _answers(host, port):
            stop.wait(0.2)
        if server.poll() is None and not stop.is_set():
            print(f"MLflow shows {runs} at http://{host}:{port} (Ctrl-C ends it)", flush=True)
        while server.poll() is None and not stop.is_set():
            for config in sorted(runs.glob("*/config.yaml")):
                try:
                    sync(config.parent, uri)
                except SyncError as error:
                    if str(error) not in told:
                        told.add(str(error))
                        say(f"{config.parent.name}: {error}")
            stop.wait(5.0)
        if not stop.is_set():
            raise SyncError(f"mlflow server ended with code {server.returncode}; its last words are in {log}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in (signal.SIGTERM, signal.SIGKILL):  # to its workers too
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, number)
                server.wait(10)


def _answers(host: str, port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1" if host == "0.0.0.0" else host, port, timeout=2)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
