"""Runs the whole pipeline in a tiny setting through the command line."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from hpc.run import metrics_log
from launch.__main__ import main
from tests.conftest import DEMO, tiny

STAGES = ("shards", "tokenizer", "codes", "prior-top", "prior-bottom", "samples", "report")


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert main(["run", DEMO, *tiny(phantoms, runs)]) == 0
    return runs / "tiny"


def again(phantoms, run, *more: str) -> list[str]:
    """Returns the arguments that name the run's config, and further overrides."""
    return [DEMO, *tiny(phantoms, run.parent), *more]


def test_every_stage_leaves_what_the_contract_says(run):
    for stage in STAGES:
        assert json.loads((run / stage / "stage.json").read_text())["done"], stage
    for stage in ("tokenizer", "prior-top", "prior-bottom"):
        assert {p.name for p in (run / stage / "export").iterdir()} == {"model.safetensors", "config.yaml", "README.md"}
        assert (run / stage / "config.yaml").exists()
        rows = metrics_log.read_metrics(run / stage)
        assert {"step", "samples", "time"} <= rows[0].keys()
        assert sorted(r["samples"] for r in rows) == [r["samples"] for r in rows]
        assert list((run / stage / "images").glob("*.png"))
    assert (run / "config.yaml").exists()
    assert (run / "report" / "metrics.json").exists()


def test_the_log_has_each_figure_for_train_and_held_out(run):
    found = {k for r in metrics_log.read_metrics(run / "tokenizer") for k in r}
    for level in ("top", "bottom"):
        for prefix in ("train", "val"):
            assert {f"{prefix}/usage/{level}", f"{prefix}/perplexity/{level}", f"{prefix}/psnr", f"{prefix}/ssim"} <= found
    found = {k for r in metrics_log.read_metrics(run / "prior-top") for k in r}
    assert {"train/bits_per_token", "val/bits_per_token", "val/bigram_bits", "lr", "system/memory_resident_gb"} <= found


def test_licences_are_stated_wherever_something_leaves(run):
    for folder in ("tokenizer/export", "prior-top/export", "prior-bottom/export", "samples"):
        text = (run / folder / "README.md").read_text()
        assert "Strictest licence among the training images: **CC-0**" in text, folder
        assert "lesiongen phantom" in text
    assert "CC-0" in (run / "report" / "report.html").read_text()
    assert json.loads((run / "codes" / "manifest.json").read_text())["licences"]["CC-0"] > 0
    assert "licence_of_training_images" in (run / "samples" / "metadata.csv").read_text().splitlines()[0]


def test_no_lesion_is_in_two_splits(run):
    from lesiongen.data.packed import Packed
    from lesiongen.data.stream import ImageShards

    groups = {}
    for split in ("train", "val", "test"):
        data = ImageShards(Packed([run / "shards"]), split)
        reader = data.reader()
        for shard, count in enumerate(data.counts):
            for i in range(count):
                lesion = json.loads(reader.read(shard, i)["json"])["lesion_id"]
                assert groups.setdefault(lesion, split) == split
    assert len(groups) == 84


def test_the_code_store_is_read_with_safetensors_alone(run):
    manifest = json.loads((run / "codes" / "manifest.json").read_text())
    assert [(entry["name"], entry["grid"], entry["K"], entry["dtype"]) for entry in manifest["levels"]] == [
        ("top", [4, 4], 32, "uint8"),
        ("bottom", [8, 8], 32, "uint8"),
    ]
    for entry in manifest["shards"]:
        arrays = load_file(run / "codes" / entry["name"])
        assert arrays["codes.top"].shape == (entry["count"], 4, 4)
        assert arrays["codes.bottom"].dtype == np.uint8
        assert arrays["index"].tolist() == list(range(entry["count"]))
        assert arrays["label"].dtype == np.int16
        assert 0 <= arrays["label"].min() <= arrays["label"].max() < 7
    draws = {e["draw"] for e in manifest["shards"] if e["split"] == "train"}
    assert draws == {0, 1}
    assert {e["draw"] for e in manifest["shards"] if e["split"] == "val"} == {0}


def test_data_workers_change_no_code(phantoms, run):
    store, record = run / "codes", json.loads((run / "codes" / "stage.json").read_text())
    shutil.copytree(store, run.parent / "codes-before")
    try:
        assert main(["encode", *again(phantoms, run, "data.workers=2"), "--fresh", "codes"]) == 0
        assert json.loads((store / "stage.json").read_text())["digest"] == record["digest"]
    finally:
        shutil.rmtree(store)
        shutil.move(run.parent / "codes-before", store)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_ends_encoding(phantoms, run, tmp_path, capsys, workers):
    shutil.copytree(run / "shards", tmp_path / "set" / "shards")
    shard = sorted((tmp_path / "set" / "shards").glob("train-*.tar"))[-1]
    content = bytearray(shard.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)  # longer than what lies between two members
    shard.write_bytes(content)
    inputs = [f"inputs.shards=[{tmp_path / 'set'}]", f"inputs.tokenizer={run}", f"data.workers={workers}"]
    assert main(["encode", DEMO, *tiny(phantoms, tmp_path / "runs"), *inputs]) == 2
    assert "lesiongen verify" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "tiny" / "codes" / "manifest.json").exists()


def test_samples_say_where_they_come_from(run):
    rows = list(csv.DictReader((run / "samples" / "metadata.csv").open()))
    assert len(rows) == 14
    assert len({r["label"] for r in rows}) == 7
    image = Image.open(run / "samples" / rows[3]["file"])
    assert image.size == (32, 32)
    assert image.text["label"] == rows[3]["label"]
    assert image.text["synthetic"] == "true"
    xmp = ElementTree.fromstring(image.text["XML:com.adobe.xmp"])
    assert "trainedAlgorithmicMedia" in next(v for e in xmp.iter() for k, v in e.items() if k.endswith("DigitalSourceType"))
    assert image.text["tokenizer"] == json.loads((run / "tokenizer" / "stage.json").read_text())["digest"]
    sheet = Image.open(run / "samples" / "contact.png")
    number = len({row["label"] for row in csv.DictReader((run / "samples" / "metadata.csv").open())})
    assert sheet.height == number * (96 + 2) and sheet.width > 2 * (96 + 2)  # a row of two with its name for each class


def test_the_report_opens_from_disk(run):
    page = (run / "report" / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert 'src="http' not in page
    assert "<script" not in page


def test_done_is_done(phantoms, run, capsys):
    before = {
        p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and "mlflow" not in str(p) and p != run / "config.yaml"
    }
    assert main(["run", *again(phantoms, run)]) == 0
    assert "everything is done" in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in before}
    assert {p for p in before if p.name != ".lock" and before[p] != after[p]} == set()


def test_a_stale_stage_is_refused_with_the_difference(phantoms, run, capsys):
    assert main(["run", *again(phantoms, run, "tokenizer.model.entries=64")]) == 2
    error = capsys.readouterr().err
    assert "entries: 32 → 64" in error
    assert "--fresh tokenizer" in error
    assert main(["run", *again(phantoms, run)]) == 0


def test_sampling_with_options_goes_beside_the_runs_own(phantoms, run, capsys):
    assert main(["sample", *again(phantoms, run), "--label", "mel", "-n", "3", "--seed", "5"]) == 0
    rows = list(csv.DictReader((run / "samples-mel-3-seed5" / "metadata.csv").open()))
    assert [r["label"] for r in rows] == ["mel"] * 3
    for _ in range(2):
        assert main(["sample", *again(phantoms, run), "-n", "3", "sample.temperature=0.9", "--fresh", "samples"]) == 0
    assert main(["sample", *again(phantoms, run), "-n", "3", "sample.temperature=0.8"]) == 0
    assert len(list(run.glob("samples-all-3-seed0*"))) == 2
    assert main(["sample", *again(phantoms, run), "--label", "melon", "-n", "3"]) == 2
    assert "Unknown label 'melon'; this generator knows: akiec, bcc" in capsys.readouterr().err


def test_same_seed_same_images(phantoms, run, tmp_path):
    for name in ("a", "b"):
        assert main(["sample", *again(phantoms, run), "-n", "5", "--seed", "9", "--out", str(tmp_path / name)]) == 0
    for path in sorted((tmp_path / "a" / "images").rglob("*.png")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_status_and_verify(run, capsys):
    assert main(["status", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.count(" done ") == len(STAGES)
    assert main(["verify", str(run)]) == 0
    shard = next((run / "codes").glob("train-00-*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["verify", str(run)]) == 1
    assert shard.name in capsys.readouterr().out
    shard.write_bytes(content)


def test_plan_says_what_the_models_have(phantoms, run, capsys):
    assert main(["plan", *again(phantoms, run)]) == 0
    out = capsys.readouterr().out
    weights = load_file(run / "prior-bottom" / "export" / "model.safetensors")
    assert f"trainable {sum(w.size for name, w in weights.items() if name != 'table'):,}" in out
    weights = load_file(run / "tokenizer" / "export" / "model.safetensors")
    trainable = sum(w.size for k, w in weights.items() if not k.startswith("quantizers"))
    assert f"trainable {trainable:,}" in out


def test_codes_of_another_tokenizer_are_refused(phantoms, run, tmp_path, capsys):
    """The error names the digests of both tokenizers."""
    more = [f"inputs.shards={run}", "tokenizer.train.samples=32", "seed=1"]
    assert main(["train", "tokenizer", *again(phantoms, run), f"runs={tmp_path}", *more]) == 0
    more = [f"inputs.shards={run}", f"inputs.tokenizer={tmp_path / 'tiny'}", f"inputs.codes={run}"]
    assert main(["train", "prior", *again(phantoms, run), f"runs={tmp_path / 'p'}", "--level", "top", *more]) == 2
    error = capsys.readouterr().err
    for tokenizer in (run, tmp_path / "tiny"):
        assert json.loads((tokenizer / "tokenizer" / "stage.json").read_text())["digest"] in error


def test_one_tokenizer_many_priors(phantoms, run, tmp_path):
    more = [f"inputs.shards={run}", f"inputs.tokenizer={run}", f"inputs.codes={run}", "priors.top.train.samples=32"]
    assert main(["train", "prior", *again(phantoms, run), f"runs={tmp_path}", "--level", "top", *more]) == 0
    assert (tmp_path / "tiny" / "prior-top" / "export" / "model.safetensors").exists()
    assert not (tmp_path / "tiny" / "codes").exists()


def test_a_longer_run_continues(phantoms, run, capfd, tmp_path):
    base = [f"inputs.shards={run}", "tokenizer.train.samples=32", "tokenizer.train.save_every=32"]
    assert main(["train", "tokenizer", *again(phantoms, run), f"runs={tmp_path}", *base]) == 0
    assert main(["train", "tokenizer", *again(phantoms, run), f"runs={tmp_path}", *base, "tokenizer.train.samples=64"]) == 0
    rows = metrics_log.read_metrics(tmp_path / "tiny" / "tokenizer")
    assert [r["samples"] for r in rows if "lr" in r] == [16, 32, 48, 64]


def test_a_damaged_checkpoint_falls_back(phantoms, run, tmp_path, capfd):
    base = [f"inputs.shards={run}", "tokenizer.train.samples=64", "tokenizer.train.save_every=16"]
    assert main(["train", "tokenizer", *again(phantoms, run), f"runs={tmp_path}", *base]) == 0
    newest = sorted((tmp_path / "tiny" / "tokenizer" / "checkpoints").glob("step-*"))[-1]
    state = next(newest.rglob("*model_states.pt"))
    state.write_bytes(state.read_bytes()[:-100])
    assert main(["train", "tokenizer", *again(phantoms, run), f"runs={tmp_path}", *base, "tokenizer.train.samples=96"]) == 0
    assert f"{newest.name} is damaged" in capfd.readouterr().err


def test_the_command_is_installed():
    script = Path(sys.executable).parent / "lesiongen"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0
    for verb in (
        "demo",
        "pack",
        "train",
        "encode",
        "sample",
        "evaluate",
        "run",
        "submit",
        "status",
        "logs",
        "cancel",
        "plan",
        "verify",
        "ui",
    ):
        assert f"\n    {verb} " in done.stdout
