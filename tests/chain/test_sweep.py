"""The verb `sweep`: what the runs share, the runs themselves, the table of results."""

import csv
import json

import pytest
from PIL import Image

from hpc.errors import UserError
from hpc.run.mlflow_address import default_uri
from hpc.run.mlflow_sync import sync
from launch.__main__ import main
from launch.sweep import Sweep
from tests.chain.mlflow_runs import client_of, entry_of
from tests.conftest import DEMO, tiny


def test_what_a_sweep_shares(phantoms, tmp_path):
    def shared(*grid):
        return Sweep.of(DEMO, tiny(phantoms, tmp_path), list(grid)).shared

    assert shared("priors.top.model.layers=1,2") == ("shards", "tokenizer", "codes")
    assert shared("encode.draws=1,2") == ("shards", "tokenizer")
    assert shared("tokenizer.train.batch=8,16", "priors.top.model.layers=1,2") == ("shards",)
    assert shared("data.size=32,64") == ()
    trials = Sweep.of(DEMO, tiny(phantoms, tmp_path), ["priors.top.model.layers=1,2", "priors.bottom.model.layers=2,3"]).trials
    assert [trial.config.name for trial in trials] == [
        "tiny-top-model-layers1-bottom-model-layers2",
        "tiny-top-model-layers1-bottom-model-layers3",
        "tiny-top-model-layers2-bottom-model-layers2",
        "tiny-top-model-layers2-bottom-model-layers3",
    ]
    assert trials[2].config.priors["top"].model.layers == 2 and trials[2].config.inputs.codes == str(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("grid", "until", "message"),
    [
        (["priors.top.model.layers=1"], None, "at least two values"),
        (["priors.top.model.layer=1,2"], None, "did you mean 'layers'"),
        (["priors.top.model.layers=1,2"], "codes", "no such stage. Their stages are prior-top"),
    ],
)
def test_a_sweep_that_cannot_be(phantoms, tmp_path, grid, until, message):
    with pytest.raises(UserError, match=message):
        Sweep.of(DEMO, tiny(phantoms, tmp_path), grid, until)


def test_a_sweep_of_priors_shares_the_codes_and_compares_the_runs(phantoms, tmp_path, capsys):
    command = ["sweep", DEMO, *tiny(phantoms, tmp_path), "--grid", "priors.bottom.model.layers=1,2", "--until", "prior-bottom"]
    assert main([*command, "--dry"]) == 0
    assert "tiny-layers2: priors.bottom.model.layers=2: prior-top, prior-bottom" in capsys.readouterr().out
    assert not (tmp_path / "tiny").exists()
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.count("stage 1 of 3: shards") == 1 and out.count("stage 1 of 2: prior-top") == 2
    names = {path.name for path in (tmp_path / "tiny").iterdir()}
    assert {"shards", "tokenizer", "codes", "sweep.csv", "sweep.png"} <= names and "prior-top" not in names
    rows = list(csv.DictReader((tmp_path / "tiny" / "sweep.csv").read_text().splitlines()))
    assert {row["run"]: row["state"] for row in rows} == {"tiny-layers1": "done", "tiny-layers2": "done"}
    bits = [float(row["bits_per_image"]) for row in rows]
    assert bits == sorted(bits) and 16 + 64 < bits[0] < 5 * (16 + 64)  # K = 32: at most 5 bits for each of 16 + 64 codes
    assert f"best by bits_per_image: {rows[0]['run']}" in out
    assert Image.open(tmp_path / "tiny" / "sweep.png").width > 300

    # MLflow lists the runs of the sweep in one experiment, below the base run.
    for run in (tmp_path / "tiny", tmp_path / "tiny-layers1"):
        sync(run, default_uri(run))
    client = client_of(tmp_path / "tiny")
    trial = client.get_run(entry_of(tmp_path / "tiny-layers1", None)["id"])
    assert trial.data.tags["mlflow.parentRunId"] == entry_of(tmp_path / "tiny", None)["id"]
    assert client.get_experiment(trial.info.experiment_id).name == "tiny"

    # The same command again has nothing to do.
    assert main(command) == 0
    assert "stage 1" not in capsys.readouterr().out
    state = json.loads((tmp_path / "tiny-layers1" / "prior-bottom" / "stage.json").read_text())
    assert state["title"].startswith("gpt 1×") and state["title"].endswith(" k")
