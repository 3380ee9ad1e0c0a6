"""A spike of the loss rolls the training back; a training that diverges ends, and goes on with a lower learning rate."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from hpc import errors
from hpc.errors import Diverged
from hpc.run import journal, metrics_log
from hpc.run.rundir import read_stage_record
from hpc.train.engine import EngineConfig
from hpc.train.health import HealthConfig, loss_limit
from hpc.train.loop import train
from hpc.train.optim import OptimConfig
from hpc.train.rollback import Rollbacks, Spike
from lesiongen import experiment
from lesiongen.data.packed import Packed
from lesiongen.stages.tokenizer import TokenizerTask
from tests.conftest import DEMO, tiny
from tests.faults.test_kills import finish, overrides, start

TOXIC = 640  # the data that begin at this position destroy the weights


class Toxic(TokenizerTask):
    """A tokenizer whose weights are destroyed by one batch of data."""

    def finish(self, batch: dict) -> dict:
        self.now = int(batch["position"].min())
        return super().finish(batch)

    def after_step(self, module, statistics):
        if TOXIC <= self.now < TOXIC + 16:
            with torch.no_grad():
                for parameter in module.net.parameters():
                    parameter.mul_(30)
        return super().after_step(module, statistics)


def _train(topology, run: str, folder: str, rollbacks: int = 2) -> str:
    config = experiment.load(f"{run}/config.yaml")
    health = HealthConfig(max_skipped=4, max_rollbacks=rollbacks)
    settings = dataclasses.replace(
        config.tokenizer.train, samples=1280, save_every=160, eval_every=320, log_every=16, batch=16, health=health
    )
    task = Toxic(config, Packed([Path(run) / "shards"]), Path(folder))
    try:
        train(task, settings, Path(folder), topology, 0, "tokenizer", ledger=True)
    except Diverged as error:
        return str(error)
    return "done"


def test_a_spike_rolls_back_once_on_all_ranks_and_passes_over_the_data(pools, packed, tmp_path):
    assert pools(2).run(_train, str(packed), str(tmp_path)) == ["done", "done"]
    [entry] = journal.read(tmp_path / "rollbacks.jsonl")
    # Steps of 16 samples. The step at TOXIC is accepted, the next four are spikes; five steps before them are passed over too.
    assert (entry["first"], entry["last"]) == (TOXIC + 16 - 5 * 16, TOXIC + 16 + 4 * 16)
    assert entry["from"] == 480
    [alarm] = [entry for entry in metrics_log.read_alarms(tmp_path) if entry["kind"] == "spike"]
    assert "Training goes on from the checkpoint at 480 samples" in alarm["text"]
    trained = [e["samples"] for e in journal.read(tmp_path / "ledger-1.jsonl")]
    assert trained == [n for n in range(16, 1281, 16) if not entry["first"] < n <= entry["last"]]
    rows = metrics_log.read_metrics(tmp_path)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert max(losses) < 3 * losses[0]
    assert [row["skipped_steps"] for row in rows if "skipped_steps" in row][-1] == 0
    assert [row["val/mse"] for row in rows if "val/mse" in row][-1] < losses[0] * 4


def test_a_rollback_passes_over_a_damaged_checkpoint(tmp_path):
    """The newest checkpoint before the spike has lost its manifest's content. The one after the spike is deleted."""
    for step in (10, 20, 30):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "MANIFEST.json").write_text("{}" if step == 10 else "\0")
    rollbacks = Rollbacks(tmp_path, OptimConfig(), EngineConfig())
    assert "from the checkpoint at 320 samples" in rollbacks.roll_back(Spike("a spike", 25 * 16, 28 * 16), 16, 2)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000010", "step-000020"]


def test_no_rollback_left_ends_as_diverged_with_the_way_on(pools, packed, tmp_path):
    [message, other] = pools(2).run(_train, str(packed), str(tmp_path), 0)
    assert message == other
    assert "Lower the learning rate" in message and "goes on from the checkpoint at 480 samples" in message
    newest = max((tmp_path / "checkpoints").glob("step-*"))
    assert json.loads((newest / "MANIFEST.json").read_text())["state"]["skipped"] == 0


@pytest.mark.long
def test_a_destroyed_model_is_not_done_and_the_advice_can_be_followed(phantoms, packed, tmp_path):
    """The learning rate of the last half destroys the weights. A lower one may be set after that, and only after that."""
    more = {"tokenizer.train.health.max_skipped": 3, "tokenizer.train.engine.clip": 0, "tokenizer.train.eval_every": 80}
    more |= {"tokenizer.train.optim.schedule": "piecewise"}

    def train_with(pieces: str, code: int) -> str:
        settings = tiny(phantoms, tmp_path, **more, **{"tokenizer.train.optim.pieces": pieces})
        return finish(start("train", "tokenizer", DEMO, *settings, *overrides(packed, tmp_path, 1)), code)

    folder = tmp_path / "tiny" / "tokenizer"
    out = train_with("[1, 1e8]", errors.DIVERGED)
    assert "Traceback" not in out
    assert "Lower the learning rate" in out
    assert not read_stage_record(folder)["done"]
    for manifest in (folder / "checkpoints").glob("*/MANIFEST.json"):
        state = json.loads(manifest.read_text())["state"]
        assert state["skipped"] == 0 and state["best"] < 1
    train_with("[1, 0.5]", 0)
    record = read_stage_record(folder)
    assert record["done"] and "diverged" not in record
    assert record["adjusted"] == ["tokenizer.train.optim.pieces: [1.0, 100000000.0] → [1.0, 0.5]"]
    assert "made with other settings" in train_with("[1, 0.25]", 2)
    rows = [row["val/mse"] for row in metrics_log.read_metrics(folder) if "val/mse" in row]
    assert max(rows) < 1


@pytest.mark.long
def test_weights_that_the_first_steps_destroy_give_no_export(phantoms, packed, tmp_path):
    more = {"tokenizer.train.optim.lr": 1e8, "tokenizer.train.health.max_skipped": 3, "tokenizer.train.engine.clip": 0}
    out = finish(start("train", "tokenizer", DEMO, *tiny(phantoms, tmp_path, **more), *overrides(packed, tmp_path, 1)), 77)
    assert "Traceback" not in out
    assert not (tmp_path / "tiny" / "tokenizer" / "export").exists()


def test_the_limit_follows_the_spread_of_the_latest_losses():
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    losses = (5 * torch.linspace(1, 0.2, 1000) + 0.1 * noise).tolist()
    assert all(loss <= loss_limit(losses[max(0, i - 128) : i], 10) for i, loss in enumerate(losses))
    assert loss_limit(losses[-128:], 10) < 5
    assert loss_limit(losses[-128:], 0) == loss_limit([], 10) == math.inf
    assert loss_limit([2.0], 10) == 20
    assert loss_limit([-3.0] * 128, 10) == pytest.approx(-3 + 10 * 0.06)
