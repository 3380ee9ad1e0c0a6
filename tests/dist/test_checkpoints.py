"""Checkpoints at scale: who writes and describes which file, what a killed save leaves, which ZeRO stages follow another."""

import json

import numpy as np
import pytest

from hpc.data import manifest
from hpc.errors import UserError
from hpc.train import checkpoint
from tests.dist import topology_cases as cases

GROUPS = {0: (0,), 1: (1, 2), 2: (1, 2), 3: (3,)}


def engine(zero: int) -> dict:
    return {"zero": zero, "accumulation": 2, "average": 1.0}


@pytest.fixture(scope="module")
def saved(pools, packed, tmp_path_factory):
    """{ZeRO stage: folder of a checkpoint after two steps on two ranks}."""
    folders = {zero: tmp_path_factory.mktemp(f"zero{zero}") for zero in GROUPS}
    for zero, folder in folders.items():
        pools(2).run(cases.leg, str(packed), engine(zero), 2, "adamw", None, str(folder))
    return folders


@pytest.mark.parametrize("zero", GROUPS)
def test_the_manifest_describes_every_file(saved, zero):
    (path,) = checkpoint.committed(saved[zero])
    listed = {entry["name"] for entry in json.loads((path / "MANIFEST.json").read_text())["files"]}
    assert listed == {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {"MANIFEST.json"}
    assert checkpoint.verify(path) == []


@pytest.mark.parametrize("zero", [2, 3])
def test_each_rank_reads_only_the_files_that_it_wrote(pools, packed, tmp_path, zero):
    read = pools(2).run(described, str(packed), engine(zero), str(tmp_path))
    assert all(any("zero_pp_rank_" in name for name in names) for names in read)
    assert not set(read[0]) & set(read[1])
    assert not [name for name in read[1] if "zero_pp_rank_1_" not in name and name != "average-00001.safetensors"]


def described(topology, run: str, settings: dict, folder: str) -> list[str]:
    """Names of the files that this rank checksums during a save."""
    names, describe = [], manifest.describe
    manifest.describe = lambda path, **extra: names.append(path.name) or describe(path, **extra)
    try:
        cases.leg(topology, run, settings, 1, "adamw", None, folder)
    finally:
        manifest.describe = describe
    return names


@pytest.mark.parametrize("after", GROUPS)
@pytest.mark.parametrize("before", GROUPS)
def test_one_zero_stage_after_another(pools, packed, saved, before, after):
    """Stages of one group continue each other with the same losses; others are refused with the stages that can resume."""
    if after in GROUPS[before]:
        resumed = pools(2).run(cases.leg, str(packed), engine(after), 2, "adamw", str(saved[before]))[0]
        reference = pools(2).run(cases.leg, str(packed), engine(before), 4)[0]
        assert resumed.losses == pytest.approx(reference.losses[2:], rel=1e-4)
        assert np.abs(resumed.weights - reference.weights).max() < 3e-5
    else:
        said = pools(2).run(refusal, str(packed), engine(after), str(saved[before]))
        stages = " or ".join(map(str, GROUPS[before]))
        assert all(f"under ZeRO {before} and cannot be resumed under ZeRO {after}" in text for text in said)
        assert all(f"Set train.engine.zero={stages}," in text for text in said)


def refusal(topology, run: str, settings: dict, folder: str) -> str:
    try:
        cases.leg(topology, run, settings, 1, "adamw", folder)
    except UserError as error:
        return str(error)
    return "no refusal"


def test_what_a_killed_save_left_is_removed(tmp_path):
    (tmp_path / "step-000007.tmp" / "engine").mkdir(parents=True)
    (tmp_path / "step-000007.tmp" / "engine" / "half.pt").write_bytes(b"x")
    assert checkpoint.newest_sound(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
