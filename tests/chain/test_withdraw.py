"""The verb `withdraw`: images leave the shards and everything that holds them; what was made from them is named."""

import csv
import json
import shutil
from collections import Counter

import pytest

import lesiongen.experiment
from hpc import errors
from hpc.data import manifest
from hpc.run.rundir import read_stage_record
from launch import pipeline
from launch.__main__ import main
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from tests.conftest import DEMO, tiny


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory):
    """A run up to the samples, another run that uses its tokenizer, and a published folder."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(["run", DEMO, *tiny(phantoms, runs), "--until", "samples"]) == 0
    own = {
        "name": "other",
        "inputs.shards": f"[{runs / 'tiny'}]",
        "inputs.tokenizer": runs / "tiny",
        "inputs.codes": runs / "tiny",
    }
    assert main(["train", "prior", DEMO, "--level", "top", *tiny(phantoms, runs, **own)]) == 0
    assert main(["publish", str(runs / "tiny"), "--force", "--out", str(runs / "public")]) == 0
    return runs


@pytest.fixture
def runs(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs")


def catalog(run) -> list[dict]:
    names = [entry["name"] for entry in manifest.read(run / "shards")["catalogs"]]
    return [row for name in names for row in csv.DictReader((run / "shards" / name).read_text().splitlines())]


def contents(run) -> dict[str, tuple]:
    """What each image of the shards is: id → split, label, pixels."""
    packed = Packed([run / "shards"])
    found = {}
    for split in packed.splits:
        data = ImageShards(packed, split)
        reader = data.reader()
        for row in (row for row in catalog(run) if row["split"] == split):
            shard = [entry["name"] for entry in data.entries].index(row["shard"]) if hasattr(data, "entries") else 0
            image, facts = data.image(reader.read(shard, int(row["ordinal"])))
            assert facts["image_id"] == row["image_id"]
            found[row["image_id"]] = (split, facts["dx"], image.numpy().tobytes())
    return found


def test_a_lesion_leaves_everything_that_holds_it(runs, capsys):
    run = runs / "tiny"
    lesions = Counter(row["lesion"] for row in catalog(run) if row["split"] == "train" and row["lesion"])
    lesion = max(lesions, key=lesions.get)
    single = next(row["image_id"] for row in catalog(run) if row["split"] == "train" and row["lesion"] != lesion)
    gone = {row["image_id"] for row in catalog(run) if row["lesion"] == lesion} | {single}
    before, old = contents(run), manifest.read(run / "shards")
    command = ["withdraw", str(run), lesion, single]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"found {len(gone)} images ({len(gone)} train)" in out and "Nothing was changed" in out
    assert contents(run) == before and (run / "codes").exists()

    assert main([*command, "--delete"]) == 0
    out = capsys.readouterr().out
    for made in (run / "tokenizer", run / "prior-top", run / "samples", runs / "other" / "prior-top"):
        assert f"  {made}: " in out, made
    assert f"deleted: {run / 'codes'}" in out and not (run / "codes").exists()
    assert not (run / "tokenizer" / "images").exists() and (run / "tokenizer" / "export").exists()
    assert ": published" in out
    after, new = contents(run), manifest.read(run / "shards")
    assert after == {name: found for name, found in before.items() if name not in gone}
    assert sum(new["counts"]["train"].values()) == sum(old["counts"]["train"].values()) - len(gone)
    left = {row["lesion"] for row in catalog(run) if row["split"] == "train"}
    assert sum(new["licences"].values()) == len(after) and new["lesions"]["train"] == len(left) < old["lesions"]["train"]
    assert new["mean"] != old["mean"] and new["mean"] == pytest.approx(old["mean"], abs=0.02)
    for name in gone:
        for path in (run / "shards").iterdir():
            assert path.is_dir() or path.name in ("files.json",) or name.encode() not in path.read_bytes(), path
    assert main(["verify", str(run / "shards")]) == 0
    assert (
        read_stage_record(run / "shards")["digest"]
        != json.loads((run / "tokenizer" / "stage.json").read_text())["inputs"]["shards"]
    )
    # What was made from the images is stale: the run asks for a new training, and then goes through.
    capsys.readouterr()
    assert main(["run", str(run), "--until", "codes"]) == errors.USAGE
    assert "tokenizer was made with other settings or inputs: " in capsys.readouterr().err
    assert main(["run", str(run), "--until", "codes", "--fresh", "tokenizer", "--yes"]) == 0
    # A second withdrawal from a shard that was written again.
    other = next(row["image_id"] for row in catalog(run) if row["split"] == "train")
    assert main(["withdraw", str(run), other, "--delete"]) == 0
    assert set(contents(run)) == set(after) - {other}


def test_models_are_named_that_were_made_before_an_append_or_on_several_sets_or_from_published_weights(runs, phantoms, capsys):
    run, more = runs / "tiny", runs / "more"
    patient = next(row["image_id"] for row in catalog(run) if row["split"] == "train")
    # Another withdrawal has changed the digest of the shards, and the models of before were not trained again.
    other = [row["image_id"] for row in catalog(run) if row["split"] == "train"][5]
    assert main(["withdraw", str(run), other, "--delete"]) == 0
    # A run on two sets, and one whose prior began with published weights.
    assert main(["pack", "--images", str(phantoms / "images"), "--size", "32", "data.format=png", "--out", str(more)]) == 0
    both = {"name": "both", "inputs.shards": f"[{run / 'shards'}, {more}]"}
    config = lesiongen.experiment.load(DEMO, tiny(phantoms, runs, **both))
    write_stage(config, "tokenizer")
    warm = {"name": "warm", "inputs.init_from": runs / "public", "data.images": phantoms / "images"}
    write_stage(lesiongen.experiment.load(DEMO, tiny(phantoms, runs, **warm)), "tokenizer")
    shutil.copytree(run / "samples", run / "samples-mel-3-seed1")
    (run / "published.jsonl").write_text(json.dumps({"folder": str(runs / "public"), "time": 1.0}) + "\n")
    capsys.readouterr()
    assert main(["withdraw", str(run), patient]) == 0
    out = capsys.readouterr().out
    for made in (run / "tokenizer", runs / "both" / "tokenizer", runs / "warm" / "tokenizer", run / "samples-mel-3-seed1"):
        assert f"  {made}: " in out, made
    assert main(["withdraw", str(run), ""]) == errors.USAGE


def write_stage(config, name):
    """Writes the record of a stage and the config of its run, as if the stage had begun."""
    pipeline.write_config(config)
    (config.directory / name).mkdir(parents=True)
    (config.directory / name / "stage.json").write_text('{"done": false, "digest": null, "inputs": {}, "identity": {}}')


def test_what_cannot_be_withdrawn(runs, capsys):
    run = runs / "tiny"
    assert main(["withdraw", str(run), "nobody", "--delete"]) == errors.USAGE
    assert "There is no image, lesion or patient 'nobody'" in capsys.readouterr().err
    everyone = [row["image_id"] for row in catalog(run) if row["split"] == "val"]
    before = contents(run)
    assert main(["withdraw", str(run), *everyone, "--delete"]) == errors.USAGE
    assert "No image would be left in the split val" in capsys.readouterr().err
    assert contents(run) == before and (run / "codes").exists()
