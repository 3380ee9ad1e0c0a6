"""Where MLflow is: the tracking URI of a run, the address of its page, and how MLflow's client and server are set up.

This file needs no MLflow. mlflow_sync.py sends a run there.
"""

import json
import os
import re
from pathlib import Path

MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the default of 7 blocks for 247 s when the server is down
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a clinic's machine must not contact other servers
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # avoids 8 unused processes of 160 MB each
}
# MLflow's page is about language models, unless the experiment and the address say otherwise.
EXPERIMENT_TAGS, TRAINING_PAGE = {"mlflow.experimentKind": "custom_model_development"}, "?workflowType=machine_learning"


def read_json(path: Path) -> dict:
    """Returns the content of a JSON file; {} if there is none."""
    return json.loads(path.read_bytes()) if path.exists() else {}


def default_uri(run_dir: Path) -> str:
    """Returns MLFLOW_TRACKING_URI if it is set, else the URI of mlflow.db beside the run directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(run_dir).absolute().parent}/mlflow.db"


def run_link(run_dir: Path, uri: str) -> str | None:
    """Returns where a user can look at a run in MLflow.

    Args:
        run_dir: The run's directory.
        uri: The tracking URI.

    Returns:
        The address of the run's page on a server, or a command for sqlite. None if nothing was sent to the server yet.
    """
    if uri.startswith("sqlite:"):
        return "lesiongen ui"
    store = read_json(Path(run_dir) / "mlflow.json").get("stores", {}).get(without_password(uri), {})
    if not uri.startswith("http") or "id" not in store.get("parent", {}):
        return None
    server = without_password(uri).rstrip("/")
    return f"{server}/#/experiments/{store['experiment']}/runs/{store['parent']['id']}{TRAINING_PAGE}"


def without_password(text: object) -> str:
    """Removes user and password from URIs in a text, because other people can read run directories and logs."""
    return re.sub(r"://[^@/\s]*@", "://", str(text))


def create_store(uri: str) -> None:
    """Creates the empty file of a sqlite store if it is missing. SQLite would ignore the umask, and shut out the group."""
    if uri.startswith("sqlite:///") and not (path := Path(uri.removeprefix("sqlite:///"))).exists():
        path.touch()
