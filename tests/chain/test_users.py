"""Runs that several users share: umask and set-group-ID bit, directories of somebody else, read-only file systems."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc import errors
from tests.conftest import DEMO
from tests.users import COMMANDS, GROUP, Clinic, make_clinic, needs_users

pytestmark = needs_users()


@pytest.fixture(scope="module")
def clinic(phantoms) -> Iterator[Clinic]:
    yield from make_clinic(phantoms)


@pytest.mark.long
def test_two_members_of_a_group_share_a_run(clinic):
    """umask 002 and a set-group-ID directory: whatever one member makes, another can read, go on with and replace."""
    start = ["train", "tokenizer", DEMO, *clinic.tiny(), "tokenizer.train.samples=160"]
    codes, said = clinic.run("ada", ["pack", DEMO, *clinic.tiny()], start)
    assert codes == [0, 0], said
    codes, said = clinic.run("ben", start[:-1], ["status", clinic.runs / "tiny"])
    assert codes == [0, 0], said
    assert "damaged" not in said and "MLflow at" not in said, said
    check_shared(clinic.runs)


def check_shared(runs: Path) -> None:
    """Checks that both members have made files, and that every file has the group and the permissions of umask 002."""
    owners = set()
    for path in runs.rglob("*"):
        stat = path.stat()
        owners.add(stat.st_uid)
        expected = 0o2775 if path.is_dir() else 0o664
        assert stat.st_gid == GROUP and stat.st_mode & 0o7777 == expected, f"{path}: {stat.st_mode:o}"
    assert owners == {5001, 5002}


@pytest.mark.long
def test_two_members_of_a_group_share_a_whole_run(clinic, tmp_path):
    """One member begins, another makes the report and serves MLflow's page, the first trains longer; a stranger samples."""
    whole = clinic.tiny(name="whole")
    begin = [["pack", DEMO, *whole], ["train", "tokenizer", DEMO, *whole, "tokenizer.train.samples=160"]]
    codes, said = clinic.run("ada", *begin)
    assert codes == [0, 0], said
    codes, said = clinic.run("ben", ["run", DEMO, *whole, "local.ranks=2"], ["status", clinic.runs / "whole"])
    assert codes == [0, 0] and "damaged" not in said, said
    stop = "import os, signal, threading; threading.Timer(20, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
    served = clinic.python("ben", "-c", stop + COMMANDS, json.dumps([["ui", "--runs", str(clinic.runs), "--port", "5017"]]))
    assert "rc 0 ui" in served.stdout and "MLflow shows" in served.stdout and not served.stderr, served
    longer = ["train", "prior", DEMO, *whole, "--level", "top", "priors.top.train.samples=320"]
    codes, said = clinic.run("ada", longer)
    assert codes == [0] and "damaged" not in said and "MLflow at" not in said, said
    check_shared(clinic.runs)
    codes, said = clinic.run(
        "stranger", ["sample", DEMO, *whole, longer[-1], "-n", "3", "--out", clinic.folder / "stranger" / "s"]
    )
    assert codes == [0], said


READ_ONLY = pytest.param("a read-only file system", marks=pytest.mark.long)


@pytest.mark.parametrize("case", [READ_ONLY, "the directory of somebody else, and a user without a name"])
def test_reading_verbs_write_nothing(clinic, case):
    """A finished tokenizer that cannot be written: what only reads works, and what must write there says so in one line."""
    user, read_only = ("ada", clinic.runs) if "file system" in case else ("stranger", None)
    run, own = clinic.runs / "tiny", clinic.folder / user
    if not run.exists():
        assert clinic.run("ada", ["pack", DEMO, *clinic.tiny()], ["train", "tokenizer", DEMO, *clinic.tiny()])[0] == [0, 0]
    before = {path: path.stat().st_mtime_ns for path in clinic.runs.rglob("*")}
    config = [run / "config.yaml", f"runs={clinic.runs}"]
    photo = next((clinic.photos / "images").iterdir())
    reading = [
        ["status", run],
        ["verify", run],
        ["plan", *config],
        ["pack", *config],
        ["train", "tokenizer", *config],
        ["preview", *config, "--out", own / "preview.png"],
        ["reconstruct", *config[:1], photo, *config[1:], "--out", own / "pairs"],
    ]
    writing = [
        ["logs", run],
        ["preview", *config],
        ["reconstruct", *config[:1], photo, *config[1:]],
        ["train", "tokenizer", *config, "tokenizer.train.samples=640"],
        ["sample", *config],
        ["pack", DEMO, *clinic.tiny(name="other")],
        ["ui", "--runs", clinic.runs],
    ]
    codes, said = clinic.run(user, *reading, *writing, read_only=read_only)
    assert codes == [0] * len(reading) + [errors.USAGE] * len(writing), said
    assert "Traceback" not in said
    assert {path: path.stat().st_mtime_ns for path in clinic.runs.rglob("*")} == before
