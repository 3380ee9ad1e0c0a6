"""Fixtures and helpers of the Slurm tests: a Slurm cluster, and the `lesiongen` command."""

import contextlib
import io
import time
from pathlib import Path

import pytest

from launch.__main__ import main
from tests.slurm.cluster import Cluster, Unavailable


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A cluster of four nodes, n1 to n4, with 4 CPUs each. SLURM_CONF is set, so the commands of the tests use this cluster."""
    cluster, patch = Cluster(tmp_path_factory.mktemp("slurm")), pytest.MonkeyPatch()
    try:
        cluster.start()
    except Unavailable as reason:
        pytest.skip(f"no Slurm here: {reason}")
    for name, value in cluster.environment.items():
        patch.setenv(name, value)
    yield cluster
    patch.undo()
    cluster.stop()


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(name, script) installs a shell script in place of a Slurm command."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def write(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\nPATH=/usr/bin:/bin\ncd {tmp_path}\n{script}\n")
        (folder / name).chmod(0o755)

    return write


def lesiongen(*arguments, code: int = 0) -> str:
    """Runs the command in this process, because its imports take seconds. Returns its output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        exit_code = main([str(a) for a in arguments])
    assert exit_code == code, f"lesiongen {' '.join(map(str, arguments))}\nended with {exit_code}\n{output.getvalue()}"
    return output.getvalue()


def wait(condition, seconds: float, what: str):
    """Returns the first true value of `condition()`. Fails after `seconds`, with `what` in the message."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Adds the logs of its jobs to the report of a failed test, because the logs show the reason."""
    report = yield
    if report.when == "call" and report.failed and "tmp_path" in getattr(item, "funcargs", {}):
        for path in sorted(item.funcargs["tmp_path"].glob("**/jobs/*/*")):
            if path.suffix in (".out", ".err", ".jsonl") and (text := _last_lines(path)):
                report.sections.append((str(path), text))
    return report


def _last_lines(path: Path, lines: int = 30) -> str:
    text = path.read_text(errors="replace").split("\n")[-lines:]
    return "\n".join(line.rpartition("\r")[2] for line in text).strip()  # keep only the last state of a progress bar
