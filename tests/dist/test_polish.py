"""Polishing gives the same curve for every number of ranks and ZeRO stage, and resumes exactly."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hpc.run.metrics_log import read_metrics
from tests.conftest import DEMO, tiny
from tests.dist import polish_cases

LENGTH = {
    "polish.train.samples": 160,
    "polish.train.batch": 16,
    "polish.train.log_every": 16,
    "polish.train.eval_every": 80,
    "polish.train.save_every": 32,
    "polish.train.engine.average": 32,
}


@pytest.fixture(scope="module")
def trained(phantoms, packed, tmp_path_factory) -> Path:
    """Returns a run with a trained tokenizer."""
    from launch.__main__ import main

    runs = tmp_path_factory.mktemp("trained")
    assert main(["train", "tokenizer", DEMO, *tiny(phantoms, runs, **{"inputs.shards": f"[{packed / 'shards'}]"})]) == 0
    return runs / "tiny"


def overrides(phantoms: Path, packed: Path, trained: Path, runs: Path, **more) -> list[str]:
    inputs = {"inputs.shards": f"[{packed / 'shards'}]", "inputs.tokenizer": trained}
    return tiny(phantoms, runs, **inputs, **LENGTH, **more)


def losses(rows: list[dict]) -> list[float]:
    return [row[key] for row in rows for key in ("train/loss", "val/loss", "val/psnr") if key in row]


@pytest.fixture(scope="module")
def reference(pools, phantoms, packed, trained, tmp_path_factory):
    runs = tmp_path_factory.mktemp("reference")
    return pools(1).run(polish_cases.polish, overrides(phantoms, packed, trained, runs))[0]


LONG = [pytest.param(world, zero, marks=pytest.mark.long) for world, zero in ((1, 2), (2, 1), (2, 3))]


@pytest.mark.parametrize(("world", "zero"), [(2, 0), (2, 2), *LONG])
def test_one_curve(pools, phantoms, packed, trained, reference, tmp_path, world, zero):
    settings = overrides(phantoms, packed, trained, tmp_path, **{"polish.train.engine.zero": zero, "local.ranks": world})
    found = pools(world).run(polish_cases.polish, settings)
    assert len({digest for digest, *_ in found}) == 1
    assert losses(found[0][1]) == pytest.approx(losses(reference[1]), rel=1e-3)
    mine, other = (load_file(export / "model.safetensors") for export in (found[0][2], reference[2]))
    for name, value in other.items():
        assert torch.allclose(mine[name], value, atol=1e-4), name  # steps are 5e-4: less than one step apart
    assert any(
        not torch.equal(value, start)
        for value, start in zip(
            mine.values(), load_file(trained / "tokenizer" / "export" / "model.safetensors").values(), strict=True
        )
    )


@pytest.mark.long
def test_a_kill_changes_nothing(phantoms, packed, trained, reference, tmp_path):
    command = [sys.executable, "-m", "launch", "train", "polish", DEMO, *overrides(phantoms, packed, trained, tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    folder, deadline = tmp_path / "tiny" / "polish", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["samples"] >= 48 for row in read_metrics(folder)):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the training was done before it could be killed"
    subprocess.run(command, check=True, env=environment, timeout=200)
    assert losses(read_metrics(folder)) == pytest.approx(losses(reference[1]), rel=1e-6)
