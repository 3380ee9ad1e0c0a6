"""Results that must stay the same in every version. If they changed, images would move to other splits, and a resumed run would
see other samples than before."""

import hashlib

import pytest
import torch

from hpc.config import digest
from hpc.data.order import SampleOrder, sample_seed
from hpc.data.shards import write_shard
from lesiongen.ingest.splits import split_of
from lesiongen.priors.level_sampler import LevelSampler
from lesiongen.priors.sampling import TokenChooser, uniform_numbers


def test_splits():
    found = {i: split_of(f"HAM_{i:07d}", 0.1, 0.1) for i in range(28)}
    held_out = {5: "val", 13: "test", 23: "test", 25: "val", 27: "test"}
    assert {i: split for i, split in found.items() if split != "train"} == held_out


def test_the_plans_sequence():
    order = SampleOrder((7, 5, 9), 6, seed=3, streams=3, window=4)
    expected = [(0, 4), (0, 6), (2, 0), (2, 0), (1, 0), (2, 8), (0, 2), (0, 1)]
    assert [order.sample(i) for i in range(18, 26)] == expected


def test_seeds():
    assert [sample_seed(0, 0), sample_seed(1, 2)] == [3119036373970289394, 9211167930615000173]
    expected = [0.923966109752655, 0.3991045355796814, 0.42691266536712646]
    assert uniform_numbers(7, [41], (1, 3))[0].tolist() == pytest.approx(expected)


def test_the_random_numbers_of_attempts():
    """The first attempt has the numbers of samples without a gate; each replacement has others."""
    drawn = []

    class Recorder:
        grid = (1, 3)

        def sample(self, facts, upper, uniform, *rest):
            drawn.append(uniform[0].tolist())
            return uniform

    sampler = LevelSampler(Recorder(), TokenChooser(), lambda t: 1.0, 7, torch.device("cpu"))
    for attempt in range(3):
        sampler([[]], [], [41], attempt)
    assert drawn[0] == uniform_numbers(7, [41], (1, 3))[0].tolist()
    assert drawn[1] == pytest.approx([0.5400559306144714, 0.8550886511802673, 0.3637058138847351])
    assert drawn[2] == pytest.approx([0.1835334300994873, 0.1406598687171936, 0.6484649777412415])


def test_digests():
    assert digest({"b": [1, 2.5, None], "a": "ü"}) == "703dceec79c30480"


def test_shard_bytes(tmp_path):
    write_shard(tmp_path / "g.tar", [{"__key__": "a", "png": b"xyz", "json": b"{}"}])
    assert hashlib.sha256((tmp_path / "g.tar").read_bytes()).hexdigest()[:16] == "f634c5d8b23fa6e0"
