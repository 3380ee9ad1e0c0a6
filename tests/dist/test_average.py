"""Averaged weights: their values, that training is the same without them, and that checkpoints and exports hold them."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hpc.train import checkpoint
from tests.conftest import DEMO, tiny
from tests.dist import average_cases, cases, topology_cases


@pytest.mark.parametrize("world", [1, 2])
def test_the_average_is_the_one_made_by_hand(pools, packed, world):
    losses, differences = pools(world).run(average_cases.by_hand, str(packed), 6, 3)[0]
    assert np.max(differences) < 1e-7
    plain = pools(world).run(topology_cases.leg, str(packed), {"accumulation": 4 // world}, 3)[0]
    assert losses[:3] == plain.losses, "averaging changed the training"


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_average_resumes_exactly(pools, packed, tmp_path, zero):
    engine = {"zero": zero, "accumulation": 2, "average": 1.0}
    uninterrupted = pools(2).run(topology_cases.leg, str(packed), engine, 4)[0]
    pools(2).run(topology_cases.leg, str(packed), engine, 2, "adamw", None, str(tmp_path))
    resumed = pools(2).run(topology_cases.leg, str(packed), engine, 2, "adamw", str(tmp_path))[0]
    assert resumed.losses == uninterrupted.losses[2:]
    assert np.array_equal(resumed.weights, uninterrupted.weights)
    assert resumed.books == uninterrupted.books


def test_the_loop_exports_the_average(pools, phantoms, tmp_path):
    """Runs the real training loop with SGD and a piecewise schedule. The loop evaluates once, at the end."""
    more = {"engine.average": 64, "eval_every": 320, "optim.name": "sgd", "optim.schedule": "piecewise"}
    more = {f"tokenizer.train.{k}": v for k, v in more.items()} | {"tokenizer.train.optim.pieces": [1, 0.1]}
    overrides = tiny(phantoms, tmp_path, **more, **{"local.ranks": 2, "tokenizer.train.optim.lr": 0.01})
    pools(2).run(cases.run_stages, overrides, DEMO, ["shards", "tokenizer"])
    folder = tmp_path / "tiny" / "tokenizer"
    last = checkpoint.committed(folder / "checkpoints")[-1]
    exported, average = load_file(folder / "export" / "model.safetensors"), load_file(last / "average-00000.safetensors")
    weights = torch.load(last / "engine" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    average = {key.removesuffix(":0"): value for key, value in average.items()}
    for name, value in average.items():
        assert torch.equal(exported[name.removeprefix("net.")].flatten(), value)
    assert any(not torch.equal(weights[name].flatten(), value) for name, value in average.items())


def test_averages_of_older_checkpoints_load(pools, packed, tmp_path):
    for before, after in pools(2).run(average_cases.former_file, str(packed), str(tmp_path)):
        assert before == after
