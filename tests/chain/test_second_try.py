"""What a failed, refused or differently spelt command leaves: nothing that blocks the right one, and no changed file."""

import errno
import fcntl
import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from hpc import errors
from hpc.run import rundir
from hpc.run.rundir import same_path
from hpc.train import checkpoint
from launch.__main__ import main
from lesiongen.stages import pack
from tests.conftest import DEMO, tiny


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_first_try_that_fails_does_not_block_the_second(phantoms, tmp_path, capsys):
    right = tiny(phantoms, tmp_path)
    for wrong in ("data.images=nowhere", "data.metadata=nowhere.csv", "data.columns.image=none", "data.max_rejected=0.0"):
        more = ["data.classes=[mel, nv]"] if "max" in wrong else []
        assert main(["pack", DEMO, *right, wrong, *more]) == errors.USAGE
        assert "Traceback" not in capsys.readouterr().err
    assert main(["pack", DEMO, *right]) == 0


@pytest.mark.parametrize(
    ("error", "code", "how"),
    [(RuntimeError("no such kernel\nmore"), errors.FAILED, "failed"), (KeyboardInterrupt(), 75, "stopped")],
)
def test_a_stage_that_fails_leaves_the_reason_until_it_begins_again(phantoms, tmp_path, monkeypatch, capsys, error, code, how):
    right = tiny(phantoms, tmp_path)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(pack, "run", fail)
        assert main(["pack", DEMO, *right]) == code
    ended = rundir.read_stage_record(tmp_path / "tiny" / "shards")["ended"]
    assert (ended["how"], ended["reason"]) == (how, "no such kernel" if how == "failed" else "KeyboardInterrupt")
    capsys.readouterr()
    assert main(["status", str(tmp_path / "tiny")]) == 0
    assert f"{how}: {ended['reason']}" in capsys.readouterr().out
    assert main(["pack", DEMO, *right]) == 0
    assert "ended" not in rundir.read_stage_record(tmp_path / "tiny" / "shards")


@pytest.mark.parametrize("spelling", ["{0}/", "./{1}", "{0}/../images", "{2}"])
def test_another_spelling_of_the_folder_is_the_same_data(phantoms, tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(phantoms)
    (tmp_path / "link").symlink_to(phantoms / "images")
    images = phantoms / "images"
    assert main(["pack", DEMO, *tiny(phantoms, tmp_path)]) == 0
    before = contents(tmp_path / "tiny" / "shards")
    other = spelling.format(images, images.name, tmp_path / "link")
    assert main(["pack", DEMO, *tiny(phantoms, tmp_path), f"data.images={other}"]) == 0
    assert contents(tmp_path / "tiny" / "shards") == before


def test_another_folder_is_still_other_data(phantoms, tmp_path, capsys):
    assert main(["pack", DEMO, *tiny(phantoms, tmp_path)]) == 0
    assert main(["pack", DEMO, *tiny(phantoms, tmp_path), f"data.images={tmp_path}"]) == errors.USAGE
    assert "was made with other settings or inputs: images" in capsys.readouterr().err
    assert not same_path(None, "x") and not same_path("a", "b") and same_path("a/", "./a")


def test_a_command_that_meets_a_busy_stage_changes_no_file(phantoms, tmp_path, monkeypatch, capsys):
    assert main(["pack", DEMO, *tiny(phantoms, tmp_path)]) == 0
    folder = tmp_path / "tiny" / "tokenizer"
    folder.mkdir()
    with open(folder / ".lock", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = contents(tmp_path / "tiny")
        assert main(["train", "tokenizer", DEMO, *tiny(phantoms, tmp_path), "sample.seed=77"]) == errors.USAGE
        assert contents(tmp_path / "tiny") == before
    assert "in use by another process" in capsys.readouterr().err


@pytest.fixture
def trained(packed, phantoms, tmp_path) -> tuple[list[str], Path]:
    """A tokenizer that was trained for 160 samples: the command that goes on to 320, and its directory."""
    command = ["train", "tokenizer", DEMO, *tiny(phantoms, tmp_path), f"inputs.shards=[{packed / 'shards'}]"]
    assert main([*command, "tokenizer.train.samples=160"]) == 0
    return command, tmp_path / "tiny" / "tokenizer"


@pytest.mark.parametrize("how", ["all damaged", "all gone", "folder gone"])
def test_no_training_starts_from_zero_over_an_export(trained, how, capsys):
    command, folder = trained
    for path in checkpoint.committed(folder / "checkpoints"):
        if how == "all damaged":
            largest = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
            largest.write_bytes(largest.read_bytes()[:-1])
        else:
            subprocess.run(["rm", "-r", str(path)], check=True)
    if how == "folder gone":
        (folder / "checkpoints").rmdir()
    log, export = (folder / "metrics.jsonl").read_bytes(), contents(folder / "export")
    assert main(command) == errors.USAGE
    said = capsys.readouterr().err
    assert "--fresh tokenizer" in said and ("are damaged" if how == "all damaged" else "are gone") in said
    assert (folder / "metrics.jsonl").read_bytes() == log and contents(folder / "export") == export
    assert main([*command, "--fresh", "tokenizer"]) == 0


def test_files_of_a_group_are_shared(trained):
    """umask 002: every file of a run can be read and written by the group, also those that safetensors writes."""
    command, folder = trained
    old = os.umask(0o002)
    try:
        assert (
            main(["train", "tokenizer", *command[2:], "tokenizer.train.samples=320", "tokenizer.train.engine.average=0"]) == 0
        )
    finally:
        os.umask(old)
    newest = checkpoint.committed(folder / "checkpoints")[-1]
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in newest.rglob("*") if p.is_file()}
    assert all(mode & 0o060 == 0o060 for mode in modes.values()), modes


def test_an_unreadable_checkpoint_is_not_damaged(trained, monkeypatch, capsys):
    command, folder = trained
    before = contents(folder)
    from hpc.data import manifest

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(manifest, "crc32_file", refuse)
    assert main(command) == errors.USAGE
    said = capsys.readouterr().err
    assert "cannot be read (Permission denied). Correct its permissions" in said and "damaged" not in said
    assert {k: v for k, v in contents(folder).items() if k not in ("stage.json", "config.yaml", ".lock")} == {
        k: v for k, v in before.items() if k not in ("stage.json", "config.yaml", ".lock")
    }


def test_the_record_of_a_stage_that_made_something_still_binds(phantoms, tmp_path, capsys):
    assert main(["pack", DEMO, *tiny(phantoms, tmp_path)]) == 0
    stage = tmp_path / "tiny" / "shards" / "stage.json"
    stage.write_text(json.dumps(json.loads(stage.read_text()) | {"done": False, "digest": None}))
    assert main(["pack", DEMO, *tiny(phantoms, tmp_path), "data.size=16"]) == errors.USAGE
    assert "was made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["samples", "cut", "empty", "a list"])
def test_a_changed_manifest_is_damage(trained, change, capsys):
    """Each field of the manifest counts: a changed number of samples would train on other data."""
    command, folder = trained
    newest = checkpoint.committed(folder / "checkpoints")[-1]
    path = newest / checkpoint.MANIFEST
    text = path.read_text()
    changed = {"samples": text.replace('"samples": 160', '"samples": 176'), "cut": text[:-9], "empty": "", "a list": "[]"}[
        change
    ]
    assert changed != text
    path.write_text(changed)
    assert len(checkpoint.verify(newest)) == 1
    assert main(["verify", str(newest)]) == errors.FAILED
    assert "Traceback" not in capsys.readouterr().err
    assert main(command) == 0, "the checkpoint before it is sound"
    assert f"checkpoint {newest.name} is damaged" in capsys.readouterr().err
