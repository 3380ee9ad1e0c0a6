"""The verb `ui`: serves MLflow's web page with the runs of this machine.

MLflow's server shows the SQLite file beside the run directories. While it serves, this process copies new metrics from each
run's metrics.jsonl into that file (hpc/run/mlflow_sync.py).

The page shows images of patients. It listens on this machine only, unless the user gives another address; then MLflow asks for
a password.
"""

import contextlib
import http.client
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from hpc.errors import UserError
from hpc.run.mlflow_address import MLFLOW_ENVIRONMENT, TRAINING_PAGE, create_store
from hpc.run.mlflow_follower import print_stderr
from hpc.run.mlflow_sync import SyncError, sync

SYNC_S = 5.0  # between two syncs of all runs
LOOPBACK = ("127.0.0.1", "localhost", "::1")
USER, PASSWORD_FILE = "admin", ".mlflow-password"


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
    runs, stop, public = Path(runs).absolute(), threading.Event(), host not in LOOPBACK
    if not any(runs.glob("*/config.yaml")):
        raise UserError(f"{runs} holds no run (no subdirectory with a config.yaml). Start a run, or name another directory.")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise UserError(f"Cannot listen on {host}:{port} ({error.strerror}). Name another port with --port.") from None
    if public and importlib.util.find_spec("flask_wtf") is None:
        raise UserError(
            f"On {host} the page would show images of patients to everybody who can reach this machine. MLflow asks for a "
            "password if its package for this is installed: pip install 'lesiongen[auth]'. Without it, leave --host out."
        )
    # The store is not mlflow_address.default_uri(): the page shows this machine's runs even if the environment names a server.
    uri, log = f"sqlite:///{runs}/mlflow.db", runs / "mlflow-server.log"
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    server = _start_server(runs, uri, host, port, log, public)
    try:
        while server.poll() is None and not stop.is_set() and not _answers(host, port):
            stop.wait(0.2)
        reported: set[str] = set()
        if server.poll() is None and not stop.is_set():
            _sync_all(runs, uri, reported)
            name = socket.getfqdn() if host == "0.0.0.0" else host
            print(f"MLflow shows {runs} at http://{name}:{port}{_page(runs, uri)} (Ctrl-C ends it)", flush=True)
            if public:
                print(f"sign in as {USER} with the password in {runs / PASSWORD_FILE}", flush=True)
        while server.poll() is None and not stop.is_set():
            _sync_all(runs, uri, reported)
            stop.wait(SYNC_S)
        if not stop.is_set():
            raise SyncError(f"mlflow server ended with code {server.returncode}; the reason is at the end of {log}")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _stop_server(server)


def _start_server(runs: Path, uri: str, host: str, port: int, log: Path, password: bool) -> subprocess.Popen:
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri, "--artifacts-destination", str(runs / "mlartifacts")]
    environment = MLFLOW_ENVIRONMENT | os.environ
    if password:  # any name of this machine may be asked for: the password protects the page
        command += ["--app-name", "basic-auth", "--allowed-hosts", "*"]
        environment |= _protect(runs)
    create_store(uri)
    with open(log, "wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)


def _protect(runs: Path) -> dict[str, str]:
    """Returns the environment with which MLflow asks for a password. PASSWORD_FILE keeps the password for the next time."""
    password, config = runs / PASSWORD_FILE, runs / ".mlflow-auth.ini"
    if not password.exists():
        with open(os.open(password, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(12))
    config.write_text(
        f"[mlflow]\ndefault_permission = READ\nadmin_username = {USER}\ndatabase_uri = sqlite:///{runs}/.mlflow-auth.db\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password.read_text(),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
    }


def _page(runs: Path, uri: str) -> str:
    """Returns the part of the address that opens on the newest run's experiment. MLflow's start page is about other things."""
    states = sorted(runs.glob("*/mlflow.json"), key=lambda path: path.stat().st_mtime)
    stores = [json.loads(path.read_bytes())["stores"].get(uri, {}) for path in states]
    experiments = [store["experiment"] for store in stores if "experiment" in store]
    return (f"/#/experiments/{experiments[-1]}/runs" if experiments else "/#/experiments") + TRAINING_PAGE


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
