"""A Slurm for the tests, and the `lesiongen` command as a user of it types it."""

import contextlib
import io
import time
from pathlib import Path

import pytest

from launch.__main__ import main
from tests.slurm.cluster import Cluster, Unavailable


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Four nodes, n1 to n4, of 4 CPUs; SLURM_CONF points there for all that the tests start."""
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


def lesiongen(*arguments, code: int = 0) -> str:
    """The command, here, as its imports take seconds; what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        ended = main([str(a) for a in arguments])
    assert ended == code, f"lesiongen {' '.join(map(str, arguments))}\nended with {ended}\n{said.getvalue()}"
    return said.getvalue()


def wait(true, seconds: float, what: str):
    """The first true value of `true()`; a failure that names what was waited for."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows the logs of its jobs: they are where the reason is."""
    report = yield
    if report.when == "call" and report.failed and "tmp_path" in getattr(item, "funcargs", {}):
        for path in sorted(item.funcargs["tmp_path"].glob("**/jobs/*/*")):
            if path.suffix in (".out", ".err", ".jsonl") and (text := _end(path)):
                report.sections.append((str(path), text))
    return report


def _end(path: Path, lines: int = 30) -> str:
    text = path.read_text(errors="replace").split("\n")[-lines:]
    return "\n".join(line.rpartition("\r")[2] for line in text).strip()  # of a progress bar only how it ended
