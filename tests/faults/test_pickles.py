"""A checkpoint whose files would run code when unpickled is refused, also if its manifest fits; the code does not run."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from hpc.config import digest
from hpc.data import manifest
from hpc.run.rundir import StageDir, atomic_write
from hpc.train import checkpoint
from tests.dist import cases


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def poison(step: Path, names: str, target: Path) -> None:
    """Replaces files of a checkpoint, and makes its manifest fit."""
    for path in (step / "engine").glob(names):
        torch.save({"module": Payload(target)}, path)
    header = checkpoint.read_manifest(step)
    header["files"] = [e | manifest.describe(step / e["name"]) | {"name": e["name"]} for e in header["files"]]
    del header["digest"]
    atomic_write(step / "MANIFEST.json", json.dumps(header | {"digest": digest(header)}).encode())
    assert checkpoint.verify(step) == []


def resume(topology, run: str, zero: int, folder: str) -> str:
    try:
        cases.resume(topology, run, zero, 1, folder)
    except ValueError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize(
    ("zero", "world", "names", "words"),
    [
        (0, 2, "mp_rank_00_model_states.pt", "could run code"),
        (3, 2, "*optim_states.pt", "could run code"),
        (2, 1, "*optim_states.pt", "cannot convert"),  # another number of ranks: DeepSpeed's converter reads the files
    ],
)
def test_a_hostile_checkpoint_runs_no_code(pools, packed, tmp_path, zero, world, names, words):
    pools(2).run(cases.save_and_resume, str(packed), zero, str(tmp_path / "checkpoints"))
    poison(tmp_path / "checkpoints" / "step-000003", names, tmp_path / "code has run")
    for said in pools(world).run(resume, str(packed), zero, str(tmp_path / "checkpoints")):
        assert words in said
    assert not (tmp_path / "code has run").exists()
    pickle.loads(pickle.dumps(Payload(tmp_path / "code has run")))
    assert (tmp_path / "code has run").exists(), "the payload does not work"


def test_a_checkpoint_of_another_training_is_not_resumed(tmp_path):
    stage = StageDir(tmp_path, {}, {})
    stage.begin()
    step = tmp_path / "checkpoints" / "step-000004"
    for training, problems in ((stage.record["created"], 0), (stage.record["created"] + 1, 1)):
        header = {"step": 4, "world": 1, "zero": 0, "state": {}, "files": [], "training": training}
        atomic_write(step / "MANIFEST.json", json.dumps(header | {"digest": digest(header)}).encode())
        assert len(checkpoint.verify(step)) == problems
    assert "saved by another training" in checkpoint.verify(step)[0]
