"""Trainings that begin with the weights of another run, or of a published generator: `--init-from`."""

import pytest
import torch

from hpc import errors
from hpc.config import read_yaml
from hpc.run.metrics_log import read_metrics
from hpc.run.rundir import read_stage_record
from hpc.train import weight_files
from hpc.train.warm_start import warm_start
from launch.__main__ import main
from tests.conftest import DEMO, tiny


@pytest.fixture(scope="module")
def public(phantoms, tmp_path_factory):
    """A published generator that knows all classes."""
    runs = tmp_path_factory.mktemp("public")
    assert main(["run", DEMO, *tiny(phantoms, runs), "--until", "prior-bottom"]) == 0
    assert main(["publish", str(runs / "tiny"), "--force", "--out", str(runs / "public")]) == 0
    return runs / "public"


def first_bits(run, level):
    return next(row["val/bits_per_token"] for row in read_metrics(run / f"prior-{level}") if "val/bits_per_token" in row)


@pytest.mark.long
def test_a_clinics_few_classes_on_top_of_a_public_model(phantoms, public, tmp_path, capsys):
    """The same tokenizer, other classes in another order, so that the embeddings of classes must be found by name."""
    few = {"data.classes": "[vasc, mel, nv]", "data.max_rejected": 1, "inputs.tokenizer": public, "name": "clinic"}
    few |= {f"priors.{level}.train.eval_every": 16 for level in ("top", "bottom")}
    command = ["run", DEMO, *tiny(phantoms, tmp_path, **few), "--until", "prior-bottom"]
    assert main([*command, "--init-from", str(public)]) == 0
    out = capsys.readouterr().out
    assert f"prior-top begins with {public / 'prior-top'}: 100% of the weights\n" in out
    assert main([*command, "name=scratch"]) == 0
    for level in ("top", "bottom"):
        assert first_bits(tmp_path / "clinic", level) < first_bits(tmp_path / "scratch", level) - 0.02
    record = read_stage_record(tmp_path / "clinic" / "prior-top")
    assert record["identity"]["init_from"] == str(public)
    licences = read_yaml(tmp_path / "clinic" / "prior-top" / "export" / "config.yaml")["data"]["licences"]
    assert licences == read_yaml(public / "prior-top" / "export" / "config.yaml")["data"]["licences"]

    # The weights come from the public model before the first step: a run without --init-from is stale, not silently another.
    assert main(command) == errors.USAGE
    assert "init_from" in capsys.readouterr().err


def test_what_does_not_fit_is_new_and_is_named(phantoms, public, tmp_path, capsys):
    more = {"tokenizer.model.hidden": 24, "priors.top.model.layers": 3}
    command = ["run", DEMO, *tiny(phantoms, tmp_path, **more), "--until", "prior-top", "--init-from", str(public)]
    assert main(command) == 0
    out = capsys.readouterr().out
    tokenizer, prior = (line for line in out.splitlines() if " begins with " in line)
    assert 0 < int(tokenizer.split(": ")[1].split("%")[0]) < 50 and "; new are " in tokenizer
    assert 50 < int(prior.split(": ")[1].split("%")[0]) < 80 and "it read codes of another tokenizer" in prior
    assert main([*command[:-1], str(tmp_path / "nowhere"), "name=other"]) == errors.USAGE
    assert "holds no trained model" in capsys.readouterr().err


def test_rows_are_copied_by_their_meaning(tmp_path):
    theirs = {"facts.label.weight": torch.arange(8.0).view(4, 2), "head.weight": torch.ones(3, 2), "gone": torch.ones(1)}
    weight_files.write(tmp_path, {name: tensor.shape for name, tensor in theirs.items()}, iter(sorted(theirs.items())))
    model = torch.nn.ModuleDict(
        {"facts": torch.nn.ModuleDict({"label": torch.nn.Embedding(3, 2)}), "head": torch.nn.Linear(2, 5)}
    )
    new = model["facts"]["label"].weight[1].clone()
    fit = warm_start(model, tmp_path, {"facts.label.weight": [2, -1, 3]})
    assert model["facts"]["label"].weight[[0, 2]].tolist() == [[4.0, 5.0], [6.0, 7.0]]
    assert torch.equal(model["facts"]["label"].weight[1], new)
    assert (fit.copied, fit.total) == (4, 6 + 10 + 5)
    assert str(fit) == "19% of the weights; new are facts.label.weight (in part), head.weight, head.bias"
