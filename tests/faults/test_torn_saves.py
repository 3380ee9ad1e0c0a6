"""SIGKILL at every point inside the save of a checkpoint: before and after each file, before and after the rename.

The points are Python's audit events about files in the folder of checkpoints, and os.fsync. One process imports the libraries,
and forks a child for each point.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "fsync")
STEPS = 3  # the step that is saved while the process is killed; the step before it is saved already


def _in_child(function: Callable, *arguments) -> object:
    """Runs a function in a forked process. Returns its result, or None if the process was killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            result = function(*arguments)
        except BaseException:
            result = traceback.format_exc()
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    killed = os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return None if killed else json.loads(text)


def _engine(run: str):
    from hpc import dist
    from tests.dist import cases

    dist.init(dist.Topology())
    return cases.tokenizer_engine(dist.Topology(), run, 0, 1)


def _prepare(run: str, folder: str) -> list[float]:
    """Saves the step before, and returns the losses of an undisturbed training from there."""
    from hpc.train import checkpoint
    from tests.dist import cases

    task, engine, module = _engine(run)
    cases.train_steps(task, engine, module, 0, STEPS - 1)
    checkpoint.save(Path(folder), STEPS - 2, engine, {"samples": 16 * (STEPS - 2)})  # one that the save will delete
    checkpoint.save(Path(folder), STEPS - 1, engine, {"samples": 16 * (STEPS - 1)})
    return cases.train_steps(task, engine, module, 16 * (STEPS - 1), 3)


def _save(run: str, folder: str, point: int) -> list[str]:
    """Trains a step and saves it. Kills itself at the given point (-1: never). Returns the names of the points."""
    from hpc.train import checkpoint
    from tests.dist import cases

    task, engine, module = _engine(run)
    engine.load(Path(folder) / f"step-{STEPS - 1:06d}")
    cases.train_steps(task, engine, module, 16 * (STEPS - 1), 1)
    points: list[str] = []

    def reached(name: str) -> None:
        if len(points) == point:
            os.kill(os.getpid(), signal.SIGKILL)
        points.append(name)

    def hook(event: str, arguments: tuple) -> None:
        if event in EVENTS and isinstance(arguments[0], str | os.PathLike) and folder in str(arguments[0]):
            reached(f"{event} {Path(arguments[0]).name}")

    fsync = os.fsync
    os.fsync = lambda fd: (reached("fsync"), fsync(fd))[1]
    sys.addaudithook(hook)
    checkpoint.save(Path(folder), STEPS, engine, {"samples": 16 * STEPS}, keep=2)
    reached("after the save")
    return points


def _resume(run: str, folder: str) -> tuple[str, list[float]]:
    """Resumes from the newest sound checkpoint, trains, and saves once more. Returns the checkpoint and the losses."""
    from hpc.train import checkpoint
    from tests.dist import cases

    path = checkpoint.newest_sound(Path(folder))
    assert not list(Path(folder).glob("*.tmp"))
    done = json.loads((path / "MANIFEST.json").read_text())["step"]
    task, engine, module = _engine(run)
    engine.load(path)
    losses = cases.train_steps(task, engine, module, 16 * done, STEPS + 2 - done)
    checkpoint.save(Path(folder), STEPS + 2, engine, {"samples": 16 * (STEPS + 2)})
    return path.name, losses


def main(run: str, root: str, every: int) -> None:
    """Kills a process at each point, or at every so many, and prints what each resumed training did as JSON lines."""
    from hpc.train.zero import import_deepspeed

    import_deepspeed()
    undisturbed = _in_child(_prepare, run, f"{root}/whole")
    shutil.copytree(f"{root}/whole", f"{root}/counted")
    points = _in_child(_save, run, f"{root}/counted", -1)
    print(json.dumps({"points": points, "undisturbed": undisturbed}), flush=True)
    for point in range(0, len(points), every):
        folder = f"{root}/{point}"
        shutil.copytree(f"{root}/whole", folder)
        killed = _in_child(_save, run, folder, point) is None
        name, losses = _in_child(_resume, run, folder)
        print(json.dumps({"killed": killed, "at": points[point], "from": name, "losses": losses}), flush=True)
        shutil.rmtree(folder)


@pytest.mark.parametrize("every", [15, pytest.param(1, marks=pytest.mark.long)])
def test_a_kill_at_every_point_of_a_save(packed, tmp_path, every):
    code = f"from tests.faults.test_torn_saves import main; main({str(packed)!r}, {str(tmp_path)!r}, {every})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    first, *killed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(first["points"]) > 20
    assert any(point.startswith("os.rename step-") for point in first["points"])
    before = f"step-{STEPS - 1:06d}"
    for outcome in killed:
        assert outcome["killed"], outcome
        losses = first["undisturbed"] if outcome["from"] == before else first["undisturbed"][1:]
        assert outcome["losses"] == losses, outcome
    resumed_from = [outcome["from"] for outcome in killed]
    assert resumed_from == sorted(resumed_from), "a later kill lost what an earlier one did not"
    if every == 1:
        assert set(resumed_from) == {before, f"step-{STEPS:06d}"}
