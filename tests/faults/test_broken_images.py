"""Training on shards in which images are broken: they are replaced and listed, or end the training on all ranks together."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from hpc.data import manifest
from hpc.errors import UserError
from hpc.run import journal
from hpc.train.loop import train
from lesiongen import experiment
from lesiongen.data.packed import Packed
from lesiongen.stages.tokenizer import TokenizerTask


def _train(topology, run: str, shards: str, folder: str, limit: float) -> str:
    config = experiment.load(f"{run}/config.yaml")
    settings = dataclasses.replace(config.tokenizer.train, samples=160, max_bad_fraction=limit)
    task = TokenizerTask(config, Packed([shards]), Path(folder))
    Path(folder).mkdir(exist_ok=True)
    try:
        train(task, settings, Path(folder), topology, 0, "tokenizer", ledger=True)
    except UserError as error:
        return str(error)
    return "done"


def ledgers(folder: Path) -> list[list[list[str]]]:
    return [[entry["keys"] for entry in journal.read(folder / f"ledger-{rank}.jsonl")] for rank in (0, 1)]


def flat(ledger: list[list[list[str]]]) -> list[str]:
    return [key for of_rank in ledger for of_step in of_rank for key in of_step]


@pytest.fixture
def broken(packed, tmp_path) -> Path:
    """Returns shards in which the first bytes of three training images are zero."""
    shards = Path(shutil.copytree(packed / "shards", tmp_path / "shards"))
    path = shards / next(e["name"] for e in manifest.read(shards)["shards"] if e["split"] == "train")
    content = bytearray(path.read_bytes())
    at = 0
    for _ in range(3):
        at = content.index(b"\x89PNG", at + 1)
        content[at : at + 64] = bytes(64)
    path.write_bytes(content)
    return shards


def test_broken_images_are_replaced_and_listed_in_training(pools, packed, broken, tmp_path):
    assert pools(2).run(_train, str(packed), str(packed / "shards"), str(tmp_path / "whole"), 0.5) == ["done", "done"]
    assert pools(2).run(_train, str(packed), str(broken), str(tmp_path / "broken"), 0.5) == ["done", "done"]
    whole, replaced = ledgers(tmp_path / "whole"), ledgers(tmp_path / "broken")
    assert [list(map(len, ledger)) for ledger in replaced] == [list(map(len, ledger)) for ledger in whole]
    pairs = zip(flat(whole), flat(replaced), strict=True)
    differing = sum(one != other for one, other in pairs)
    listed = [e for rank in (0, 1) for e in journal.read(tmp_path / "broken" / f"quarantine-{rank}.jsonl")]
    assert 3 <= differing <= len(listed)
    assert all("bytes differ" in entry["error"] and entry["samples"] % 16 == 0 for entry in listed)


def test_too_many_broken_images_end_the_training_on_all_ranks(pools, packed, broken, tmp_path):
    [message, other] = pools(2).run(_train, str(packed), str(broken), str(tmp_path / "broken"), 0.001)
    assert message == other
    assert "could not be read, above max_bad_fraction=0.001" in message
    assert len({len(ledger) for ledger in ledgers(tmp_path / "broken")}) == 1
