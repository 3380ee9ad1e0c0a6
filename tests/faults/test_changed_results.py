"""Results that have changed after their stage was done are refused where they are read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hpc.data import manifest
from hpc.run.rundir import read_stage_record
from launch.__main__ import main
from lesiongen.stages import encode
from tests.conftest import DEMO, tiny


@pytest.fixture(scope="module")
def encoded(phantoms, packed, tmp_path_factory) -> Path:
    """Returns a run with a tokenizer and codes."""
    runs = tmp_path_factory.mktemp("encoded")
    shutil.copytree(packed / "shards", runs / "tiny" / "shards")
    for verb in (["train", "tokenizer"], ["encode"]):
        assert main([*verb, DEMO, *tiny(phantoms, runs, **{"tokenizer.train.samples": 32})]) == 0
    return runs / "tiny"


@pytest.fixture
def run(encoded, tmp_path) -> Path:
    return Path(shutil.copytree(encoded, tmp_path / "tiny"))


def command(phantoms, run: Path, *verb: str) -> int:
    settings = {"tokenizer.train.samples": 32, "priors.top.train.samples": 16}
    return main([*verb, DEMO, *tiny(phantoms, run.parent, **settings)])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def train_top(phantoms, run: Path) -> int:
    return command(phantoms, run, "train", "prior", "--level", "top")


@pytest.mark.parametrize("resident", ["auto", "never"])
def test_flipped_codes(phantoms, run, capsys, resident):
    flip_a_bit(run / "codes" / "train-01-000000.safetensors")
    settings = tiny(phantoms, run.parent, **{"tokenizer.train.samples": 32, "priors.top.resident": resident})
    assert main(["train", "prior", DEMO, "--level", "top", *settings]) == 2
    assert "train-01-000000.safetensors has changed since it was written" in capsys.readouterr().err


@pytest.mark.parametrize(("column", "value"), [("codes.top", 32), ("label", 7), ("label", -2)])
def test_codes_and_facts_out_of_range(phantoms, run, capsys, column, value):
    """The manifest's checksum fits, as if another program had written the store."""
    path = run / "codes" / "train-00-000000.safetensors"
    arrays = load_file(path)
    arrays[column].flat[0] = value
    save_file(arrays, path)
    content = manifest.read(run / "codes")
    for entry in content["shards"]:
        if entry["name"] == path.name:
            entry |= manifest.describe(path)
    digest = manifest.write(run / "codes", content)
    assert train_top(phantoms, run) == 2
    assert "manifest.json has changed" in capsys.readouterr().err
    record = read_stage_record(run / "codes") | {"digest": digest}
    (run / "codes" / "stage.json").write_text(json.dumps(record))
    assert train_top(phantoms, run) == 2
    assert f"holds {column} from" in capsys.readouterr().err


def test_an_export_that_was_swapped(phantoms, run, capsys):
    flip_a_bit(run / "tokenizer" / "export" / "model.safetensors")
    shutil.rmtree(run / "codes")
    assert command(phantoms, run, "encode") == 2
    assert "export has changed since the stage was done" in capsys.readouterr().err
    assert not (run / "codes" / "manifest.json").exists()


def test_a_file_that_changes_between_two_attempts_is_encoded_again(phantoms, run, encoded, monkeypatch):
    shutil.rmtree(run / "codes")
    with monkeypatch.context() as patch:
        patch.setattr(encode, "_finish", lambda *_: 1 / 0)  # the first attempt ends before the manifest is written
        assert command(phantoms, run, "encode") == 1
    made = sorted((run / "codes").glob("*.safetensors"))
    flip_a_bit(made[0])
    made[1].unlink()
    written = made[2].stat().st_mtime_ns
    assert command(phantoms, run, "encode") == 0
    assert made[2].stat().st_mtime_ns == written, "a sound file was encoded again"
    assert read_stage_record(run / "codes")["digest"] == read_stage_record(encoded / "codes")["digest"]
    assert not (run / "codes" / "work").exists()


def test_the_cost_of_checking_is_paid_once(run, monkeypatch):
    """Files that are mapped, dropped and mapped again are checked once in a process."""
    from hpc.data import codestore

    monkeypatch.setattr(codestore, "MAX_MAPPED", 1)
    store = codestore.CodeStore(run / "codes")
    checked = []
    check = store._check
    monkeypatch.setattr(store, "_check", lambda path, *rest: (checked.append(path.name), check(path, *rest)))
    for _ in range(3):
        for draw in (0, 1):
            assert store.arrays("train", draw, 0)["codes.top"].dtype == np.uint8
    assert checked == ["train-00-000000.safetensors", "train-01-000000.safetensors"]
