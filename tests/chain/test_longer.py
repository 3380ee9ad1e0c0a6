"""A finished training that is continued with more samples."""

from hpc.run.metrics_log import read_metrics
from hpc.train import checkpoint
from launch.__main__ import main
from tests.conftest import DEMO, tiny


def test_a_longer_training_knows_the_evaluation_at_the_former_end(phantoms, packed, tmp_path):
    """The former end is no multiple of eval_every, and the checkpoint there was saved before its evaluation."""

    def train(samples: int) -> list[dict]:
        own = {"inputs.shards": packed, "tokenizer.train.samples": samples, "tokenizer.train.eval_every": 160}
        assert main(["train", "tokenizer", DEMO, *tiny(phantoms, tmp_path, **own)]) == 0
        return [row for row in read_metrics(tmp_path / "tiny" / "tokenizer") if "val/mse" in row]

    former = train(240)
    assert [row["samples"] for row in former] == [160, 240]
    newest = checkpoint.committed(tmp_path / "tiny" / "tokenizer" / "checkpoints")[-1]
    assert checkpoint.read_manifest(newest)["state"]["evaluating"]
    longer = train(336)
    assert [row["samples"] for row in longer] == [160, 240, 320, 336]
    assert longer[1]["val/mse"] == former[1]["val/mse"]
