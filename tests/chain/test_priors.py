"""Priors from a code store to samples: facts, levels with different kinds of priors, patience, speed metrics."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from hpc.run import metrics_log
from launch.__main__ import main
from tests.conftest import DEMO, tiny


@pytest.fixture(scope="module")
def coded(phantoms, tmp_path_factory) -> Path:
    """Returns a run directory in which pack, tokenizer and encode have run."""
    runs = tmp_path_factory.mktemp("coded")
    changes = {"tokenizer.train.samples": 96, "tokenizer.train.eval_every": 96, "data.rename": "{mel: 'Melanoma, NOS (a/b)'}"}
    overrides = tiny(phantoms, runs, **changes)
    for verb in (["pack"], ["train", "tokenizer"], ["encode"]):
        assert main([*verb, DEMO, *overrides]) == 0
    return runs / "tiny"


@pytest.fixture
def given(phantoms, coded, tmp_path):
    """given(**more) returns the config and overrides of a new run on the codes of `coded`."""

    def settings(**more) -> list[str]:
        inputs = {f"inputs.{name}": coded for name in ("shards", "tokenizer", "codes")}
        inputs |= {"sample.number": 6, "sample.batch": 4, "priors.top.train.samples": 80, "priors.bottom.train.samples": 80}
        return [DEMO, *tiny(phantoms, tmp_path, **(inputs | {k.replace("__", "."): v for k, v in more.items()}))]

    return settings


def stage_of(tmp_path: Path, name: str) -> dict:
    return json.loads((tmp_path / "tiny" / name / "stage.json").read_text())


def test_levels_of_other_kinds_and_facts_give_samples(given, tmp_path, capsys):
    more = ["priors.top.facts=[label,sex]", "priors.bottom.facts=[age_band,label,site]"]
    more += ["priors.bottom.model={kind: gated_pixelcnn, layers: 2, width: 16}", "sample.facts.sex=female"]
    more += ["sample.guidance=2", "sample.guidance_schedule=linear", "sample.levels.bottom.temperature=0.8"]
    assert main(["train", "prior", *given(), *more]) == 0
    assert main(["sample", *given(), *more]) == 0
    folder = tmp_path / "tiny" / "samples"
    rows = list(csv.DictReader((folder / "metadata.csv").open()))
    assert [*rows[0]][:6] == ["file", "file_name", "label", "sex", "age_band", "site"]
    assert {row["sex"] for row in rows} == {"female"}
    assert {row["age_band"] for row in rows} <= {"", "0-19", "20-39", "40-59", "60-79", "80+"}
    assert any(row["site"] for row in rows)
    assert (rows[0]["guidance_schedule"], rows[0]["temperature"], rows[0]["temperature-bottom"]) == ("linear", "1.0", "0.8")
    for row in rows:
        text = Image.open(folder / row["file"]).text
        for fact in ("label", "sex", "age_band", "site"):
            assert text[fact] == row[fact]
    capsys.readouterr()
    assert main(["sample", *given(), *more, "sample.facts.sex=other", "-n", "2", "--out", str(tmp_path / "x")]) == 2
    assert "'other' is not a known value of sex; choose among female, male" in capsys.readouterr().err


def test_a_hierarchy_of_pixelsnails_is_sampled_and_a_killed_sampling_goes_on(given, tmp_path):
    shape = "kind: pixelsnail, layers: 1, width: 16, residual_blocks: 1, heads: 2"
    more = [f"priors.top.model={{{shape}}}", f"priors.bottom.model={{{shape}, attention: false}}"]
    assert main(["train", "prior", *given(), *more]) == 0
    assert main(["sample", *given(), *more]) == 0
    folder = tmp_path / "tiny" / "samples"
    names = sorted((folder / "images").rglob("*.png"))
    assert len(names) == 6 and any("Melanoma_NOS_a_b_" in name.parent.name for name in names)
    before, digest = [name.read_bytes() for name in names], stage_of(tmp_path, "samples")["digest"]
    stage = folder / "stage.json"
    stage.write_text(json.dumps(json.loads(stage.read_text()) | {"done": False, "digest": None}))
    modified = names[0].stat().st_mtime_ns
    for path in (*names[4:], folder / "metadata.csv"):
        path.unlink()
    assert main(["sample", *given(), *more]) == 0
    assert [name.read_bytes() for name in names] == before and stage_of(tmp_path, "samples")["digest"] == digest
    assert names[0].stat().st_mtime_ns == modified


def test_each_evaluation_draws_the_curve_and_speed_is_logged(given, tmp_path):
    more = ["priors.top.train.samples=160", "priors.top.train.save_every=1000"]
    assert main(["train", "prior", *given(), "--level", "top", *more]) == 0
    folder = tmp_path / "tiny" / "prior-top"
    checkpoints = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert checkpoints == ["step-000005", "step-000010"], "expected the best so far, and the end"
    assert sorted(p.name for p in (folder / "images").glob("bits-*")) == ["bits-000000080.png", "bits-000000160.png"]
    assert Image.open(folder / "images" / "bits-000000160.png").width > 400
    found = {key: value for row in metrics_log.read_metrics(folder) for key, value in row.items()}
    assert found["tokens_per_second"] == pytest.approx(16 * found["images_per_second"])
    assert found["model_flops_per_second"] > 6 * 20_000 * found["tokens_per_second"]
    assert "mfu" not in found


def test_where_the_codes_lie_changes_nothing(given, tmp_path):
    digests = []
    for resident in ("auto", "never"):
        command = ["train", "prior", *given(name=resident), "--level", "bottom", f"priors.bottom.resident={resident}"]
        assert main([*command, "priors.bottom.stream.balance=1"]) == 0
        digests.append(json.loads((tmp_path / resident / "prior-bottom" / "stage.json").read_text())["digest"])
    assert digests[0] == digests[1]


@pytest.mark.long
def test_training_ends_well_where_nothing_gets_better(given, tmp_path, capfd):
    """Patience runs out, because the learning rate is too small to change a weight.

    The stage is then done, also if the run was killed at its end. A longer training continues.
    """
    options = ["--level", "top", "priors.top.train.patience=80", "priors.top.train.optim.lr=1e-12", "local.ranks=2"]
    options += ["priors.top.train.save_every=10000", "priors.top.train.eval_every=32"]

    def train(samples: int) -> list[int]:
        assert main(["train", "prior", *given(), *options, f"priors.top.train.samples={samples}"]) == 0
        rows = metrics_log.read_metrics(tmp_path / "tiny" / "prior-top")
        assert [r["samples"] for r in rows] == sorted(r["samples"] for r in rows)
        return [r["samples"] for r in rows if "lr" in r]

    # The best evaluation is at 32 samples. The first evaluation at least 80 samples later is at 128.
    assert train(400) == list(range(16, 129, 16))
    output = capfd.readouterr()
    assert "no better held-out bits_per_token since 32 samples (patience 80): training ends at 128" in output.out + output.err
    assert main(["status", str(tmp_path / "tiny")]) == 0
    assert "prior-top      done     ████████████████████ 100%" in capfd.readouterr().out
    digest = stage_of(tmp_path, "prior-top")["digest"]
    assert train(400)[-1] == train(300)[-1] == 128
    stage = stage_of(tmp_path, "prior-top") | {"done": False}
    (tmp_path / "tiny" / "prior-top" / "stage.json").write_text(json.dumps(stage))
    assert train(400)[-1] == 128
    assert train(500)[-1] == 224
    assert stage_of(tmp_path, "prior-top")["digest"] == digest
    assert stage_of(tmp_path, "prior-top")["done"]


def test_a_fact_that_no_image_has_is_named_before_training(given, phantoms, tmp_path, capsys):
    with (phantoms / "metadata.csv").open() as file, (tmp_path / "m.csv").open("w") as out:
        rows = list(csv.DictReader(file))
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(row | {"sex": ""} for row in rows)
    own = ["inputs.shards=[]", "inputs.tokenizer=null", "inputs.codes=null", f"data.metadata={tmp_path / 'm.csv'}"]
    own += ["tokenizer.train.samples=16", "priors.top.facts=[label,sex]"]
    for verb in (["pack"], ["train", "tokenizer"], ["encode"]):
        assert main([*verb, *given(), *own]) == 0
    capsys.readouterr()
    assert main(["train", "prior", *given(), *own, "--level", "top"]) == 2
    assert "has a 'sex', so a prior cannot learn from it. Available facts: label, site, age_band" in capsys.readouterr().err
