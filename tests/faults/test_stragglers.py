"""A slow rank is named; ranks that are slow once, or hardly, are not. `python -m benchmarks.stragglers` measures both."""

import contextlib
import dataclasses
import time
from pathlib import Path

from hpc.run import metrics_log
from hpc.train.loop import train
from hpc.train.stragglers import IN_A_ROW, Stragglers
from lesiongen import experiment
from lesiongen.data.packed import Packed
from lesiongen.stages.tokenizer import TokenizerTask


class SlowOnOneRank(TokenizerTask):
    """A tokenizer whose forward pass takes half a second longer on the last rank."""

    slow = False

    def build(self):
        module = super().build()
        if self.slow:
            module.register_forward_pre_hook(lambda *_: time.sleep(0.5))
        return module


def _train(topology, run: str, folder: str) -> None:
    config = experiment.load(f"{run}/config.yaml")
    settings = dataclasses.replace(config.tokenizer.train, samples=96, log_every=16, eval_every=96, save_every=96)
    task = SlowOnOneRank(config, Packed([Path(run) / "shards"]), Path(folder))
    task.slow = topology.rank == topology.world_size - 1
    with open(Path(folder) / f"stderr-{topology.rank}.txt", "w") as said, contextlib.redirect_stderr(said):
        train(task, settings, Path(folder), topology, 0, "tokenizer")


def test_a_slow_rank_is_named_with_its_host(pools, packed, tmp_path):
    pools(4).run(_train, str(packed), str(tmp_path))
    named = [row.get("straggler/rank") for row in metrics_log.read_metrics(tmp_path) if "lr" in row]
    assert named == [None] * (IN_A_ROW - 1) + [3.0] * (6 - IN_A_ROW + 1)
    assert "tokenizer: rank 3 on " in (tmp_path / "stderr-0.txt").read_text()
    [alarm] = metrics_log.read_alarms(tmp_path)
    assert alarm["kind"] == "straggler" and "rank 3 on " in alarm["text"]


def test_one_slow_interval_is_no_straggler():
    stragglers, healthy = Stragglers(), [1.0, 1.1, 0.9, 1.0]
    for own in ([1, 1, 5, 1], healthy, [1, 1, 5, 1], [1, 5, 1, 1], [1, 1, 5, 1], [1, 1, 5, 1]):
        assert stragglers.find(list(own), 10.0) is None
    assert stragglers.find([1, 1, 5, 1], 10.0) == (2, 5.0)
    assert all(stragglers.find([0.001, 0.001, 0.01, 0.001], 10.0) is None for _ in range(5)), "the difference costs nothing"
    of_two = Stragglers()
    assert [of_two.find([1.0, 2.0], 5.0) for _ in range(IN_A_ROW)] == [None] * (IN_A_ROW - 1) + [(1, 2.0)]
    assert all(Stragglers().find([5.0], 10.0) is None for _ in range(5))
