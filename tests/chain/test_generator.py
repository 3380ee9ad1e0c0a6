"""What a user does with a trained run: load it in Python, publish it, read its samples, make parts of it again."""

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.datasets import ImageFolder

import lesiongen.generator
from hpc.errors import UserError
from hpc.run import mlflow_address, mlflow_sync
from launch.__main__ import main
from lesiongen.data.sample_files import image_paths
from lesiongen.experiment import LevelSampling
from tests.conftest import DEMO, tiny


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert main(["run", DEMO, *tiny(phantoms, runs)]) == 0
    return runs / "tiny"


@pytest.fixture(scope="module")
def generator(run) -> lesiongen.generator.Generator:
    return lesiongen.load(run)


def test_a_loaded_generator_samples_what_the_command_writes(phantoms, run, generator, tmp_path):
    settings = ["sample.guidance=2", "sample.levels.top.temperature=0.9"]
    command = ["sample", str(run), *settings, "--label", "mel", "-n", "9", "--seed", "4", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    config = replace(generator.config, sample=replace(generator.config.sample, levels={"top": LevelSampling(temperature=0.9)}))
    samples = lesiongen.generator.Generator(config, generator.device).sample("mel", n=9, seed=4, guidance=2)
    files = sorted((tmp_path / "out" / "images" / "mel").iterdir())
    written = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    assert torch.equal(samples.images, written) and len(samples.pictures()) == len(samples) == 9
    assert {facts["label"] for facts in samples.facts} == {"mel"}
    # A setting of the call wins over the level's in the config.
    asked = lesiongen.generator.Generator(config, generator.device).sample("mel", n=2, temperature=1)
    assert torch.equal(asked.images, generator.sample("mel", n=2).images)


def test_a_loaded_generator_encodes_decodes_and_knows_what_is_likely(phantoms, generator):
    files = sorted((phantoms / "images").iterdir())[:3]
    codes = generator.encode(files)
    assert {level: grid.shape for level, grid in codes.items()} == {"top": (3, 4, 4), "bottom": (3, 8, 8)}
    pictures = [Image.open(file) for file in files]
    assert all(np.array_equal(codes[level], grid) for level, grid in generator.encode(pictures).items())
    assert generator.decode(codes).shape == generator.prepare(files).shape == (3, 3, 32, 32)
    samples = generator.sample("nv", n=50)
    likely = generator.log_likelihood(samples.codes, samples.facts)
    tokens = {"top": 16, "bottom": 64}
    assert np.allclose(likely, -np.log(2) * sum(samples.bits[level] * n for level, n in tokens.items()), rtol=1e-5)
    noise = {level: np.random.default_rng(0).integers(0, 32, grid.shape) for level, grid in samples.codes.items()}
    assert generator.log_likelihood(noise, samples.facts).mean() < likely.mean()


def test_a_loaded_generator_says_what_it_cannot_do(phantoms, generator, tmp_path):
    with pytest.raises(UserError, match=r"Unknown label 'melon'; this generator knows: akiec, bcc"):
        generator.sample("melon")
    with pytest.raises(UserError, match=r"no setting 'guidence' of sampling; there are temperature"):
        generator.sample("mel", guidence=2)
    with pytest.raises(UserError, match="temperature above 0"):
        generator.sample("mel", temperature=0)
    with pytest.raises(UserError, match="'melon' is not a known value of label"):
        generator.log_likelihood(generator.sample("mel").codes, [{"label": "melon"}])
    with pytest.raises(UserError, match=r"metadata\.csv cannot be used: not a JPEG"):
        generator.encode([phantoms / "metadata.csv"])
    with pytest.raises(UserError, match=r"it has no config\.yaml"):
        lesiongen.load(tmp_path)


@pytest.fixture(scope="module")
def published(phantoms, run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("published") / "generator"
    assert main(["publish", str(run), "--out", str(out), "--force"]) == 0
    return out


def test_a_published_generator_gives_the_runs_samples(run, published, generator, tmp_path, capsys):
    other = shutil.copytree(published, tmp_path / "elsewhere")
    same = lesiongen.load(other).sample("mel", n=3, seed=4)
    assert torch.equal(same.images, generator.sample("mel", n=3, seed=4).images)
    snippet = (other / "README.md").read_text().split("```python\n")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", snippet], cwd=other, check=True)
    assert Image.open(other / "sample.png").size == (32, 32)
    assert main(["sample", str(other), "-n", "7", "--out", str(tmp_path / "out")]) == 0
    assert main(["verify", str(published)]) == 0
    assert main(["status", str(published)]) == 0
    capsys.readouterr()
    assert main(["run", str(published)]) == 2  # it has no training images
    assert "data.images: IMAGES does not exist" in capsys.readouterr().err


def test_a_published_generator_holds_nothing_of_the_training_images(phantoms, run, published):
    files = {str(path.relative_to(published)) for path in published.rglob("*") if path.is_file()}
    models = {f"{stage}/{name}" for stage in ("tokenizer", "prior-top", "prior-bottom") for name in ("stage.json",)}
    models |= {
        f"{model.split('/')[0]}/export/{name}" for model in models for name in ("README.md", "config.yaml", "model.safetensors")
    }
    assert files == models | {"README.md", "config.yaml", "samples.png", "report.html"}
    for name in files:
        content = (published / name).read_bytes()
        assert str(phantoms).encode() not in content and str(run.parent).encode() not in content, name
    text = (published / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "lesiongen" and front["license"] == "cc0-1.0"
    assert "verdict: " in text


def test_what_may_not_be_published(phantoms, run, published, tmp_path, capsys):
    command = ["publish", str(run), "--out"]
    assert main([*command, str(published)]) == 2
    assert "exists already" in capsys.readouterr().err
    other = shutil.copytree(run, tmp_path / "tiny")
    shutil.rmtree(other / "report")
    assert main(["publish", str(other), "--out", str(tmp_path / "out")]) == 2
    assert "has no finished report" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["publish", str(other), "--out", str(tmp_path / "out"), "--force"]) == 0
    assert "There is no report" in (tmp_path / "out" / "README.md").read_text()
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    metrics["verdict"]["overall"] = "do not share"
    shutil.copytree(run / "report", other / "report")
    (other / "report" / "metrics.json").write_text(json.dumps(metrics))
    assert main(["publish", str(other), "--out", str(tmp_path / "two")]) == 2
    assert "The report advises against it. verdict: do not share" in capsys.readouterr().err


def test_a_published_generator_becomes_a_version_of_a_model_in_mlflow(run, generator, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sqlalchemy", reason="the http-only mlflow-skinny has no store of its own")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for version in (1, 2):
        command = ["publish", str(run), "--force", "--register", "skin", "--out", str(tmp_path / str(version))]
        assert main(command) == 0
        assert f"MLflow has it as version {version} of the model skin" in capsys.readouterr().out
    client = mlflow_sync._client(mlflow_address.default_uri(run))
    model = client.get_model_version("skin", "2")
    stores = json.loads((run / "mlflow.json").read_text())["stores"]
    assert model.run_id == stores[mlflow_address.default_uri(run)]["parent"]["id"]
    assert "# tiny" in model.description or "tiny" in model.description
    folder = client.get_model_version_download_uri("skin", "2").removeprefix("file://")
    assert torch.equal(lesiongen.load(folder).sample("mel", n=2, seed=4).images, generator.sample("mel", n=2, seed=4).images)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["publish", str(run), "--force", "--register", "skin", "--out", str(tmp_path / "3")]) == 2
    assert "is written, but not registered. MLflow at http://127.0.0.1:9" in capsys.readouterr().err


def test_samples_as_webdataset(run, tmp_path, capsys):
    wds = pytest.importorskip("webdataset")
    command = ["sample", str(run), "-n", "9", "--out", str(tmp_path / "out"), "--format", "webdataset"]
    assert main(command) == 0
    shard = tmp_path / "out" / "webdataset" / "samples-000000.tar"
    assert f"as WebDataset: {shard}" in capsys.readouterr().out
    classes = (shard.parent / "classes.txt").read_text().split()
    read = list(wds.WebDataset(str(shard), shardshuffle=False).decode("pil"))
    rows = list(csv.DictReader((tmp_path / "out" / "metadata.csv").read_text().splitlines()))
    assert [(sample["json"]["file"], classes[sample["cls"]]) for sample in read] == [
        (row["file"], row["label"]) for row in rows
    ]
    assert np.array_equal(np.array(read[3]["png"]), np.array(Image.open(tmp_path / "out" / rows[3]["file"])))


def test_samples_describe_themselves_to_catalogues(run):
    mlcroissant = pytest.importorskip("mlcroissant")
    described = mlcroissant.Dataset(jsonld=str(run / "samples" / "croissant.json"))
    assert not described.metadata.issues.errors
    assert described.metadata.license == ["CC-0"]
    rows = list(csv.DictReader((run / "samples" / "metadata.csv").read_text().splitlines()))
    found = [record["samples/file"].decode() for record in described.records("samples")]
    assert found == [row["file"] for row in rows]


def test_a_trace_for_the_profiler(phantoms, tmp_path):
    assert main(["run", DEMO, *tiny(phantoms, tmp_path), "tokenizer.train.profile=true", "--until", "tokenizer"]) == 0
    trace = json.loads((tmp_path / "tiny" / "tokenizer" / "profile" / "trace-0.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 10
    assert any("conv2d" in name for name in names)


def test_other_libraries_load_the_samples_in_one_line(run, tmp_path, monkeypatch):
    rows = list(csv.DictReader((run / "samples" / "metadata.csv").open()))
    folder = ImageFolder(run / "samples" / "images")
    assert [folder.classes[label] for _, label in folder.samples] == sorted(row["label"] for row in rows)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    from datasets import load_dataset

    found = load_dataset("imagefolder", data_dir=str(run / "samples"), split="train", cache_dir=str(tmp_path))
    assert len(found) == len(rows) and set(found["label"]) == {row["label"] for row in rows}
    assert found[0]["image"].size == (32, 32)


def test_labels_that_look_alike_get_folders_of_their_own():
    paths = image_paths(["a/b", "a b", "A_b", "", "../..", "a b"])
    assert paths[:3] == ["images/a_b/000000.png", "images/a_b-2/000001.png", "images/A_b-3/000002.png"]
    assert paths[3:] == ["images/any/000003.png", "images/_/000004.png", "images/a_b-2/000005.png"]


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


def test_fresh_deletes_what_was_made_from_the_stage_if_the_user_agrees(copy, capsys, monkeypatch):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert main(["run", str(copy), "--fresh", "samples"]) == 2
    text = "--fresh samples also deletes what was made from it: report."
    assert f"{text} Add --yes to agree." in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
    assert main(["run", str(copy), "--fresh", "samples"]) == 2
    assert questions == [f"{text} Go on? [y/N] "] and "Nothing was deleted" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert main(["run", str(copy), "--fresh", "samples", "--yes", "sample.seed=3"]) == 0
    digests = [json.loads((copy / stage / "stage.json").read_text())["digest"] for stage in ("samples", "report")]
    old = [json.loads(before[copy / stage / "stage.json"])["digest"] for stage in ("samples", "report")]
    assert all(new != former for new, former in zip(digests, old, strict=True))
    assert (copy / "prior-top" / "stage.json").read_bytes() == before[copy / "prior-top" / "stage.json"]


def test_nothing_else_depends_on_the_report(copy, capsys):
    assert main(["run", str(copy), "--fresh", "report"]) == 0
    assert "also deletes" not in capsys.readouterr().err


def test_a_run_in_parts(phantoms, tmp_path, capsys):
    command = ["run", DEMO, *tiny(phantoms, tmp_path)]
    assert main([*command, "--from", "codes"]) == 2
    assert "--from codes needs shards, tokenizer, which is not done" in capsys.readouterr().err
    assert main([*command, "--until", "shards"]) == 0
    assert re.search(r"shards took \d+ s: \d+ train, \d+ val, \d+ test images", capsys.readouterr().out)
    assert [path.name for path in (tmp_path / "tiny").glob("*/stage.json")] == ["stage.json"]
    assert main([*command, "--until", "shards"]) == 0
    assert "these stages are done" in capsys.readouterr().out
    assert main([*command, "--from", "report", "--until", "codes"]) == 2
    assert "--from report comes after --until codes" in capsys.readouterr().err
    assert main([*command, "--until", "prior"]) == 2
    assert "--until prior: there is no such stage here" in capsys.readouterr().err
    assert main([*command, "--from", "tokenizer", "--until", "codes"]) == 0
    made = {path.parent.name for path in (tmp_path / "tiny").glob("*/stage.json")}
    said = capsys.readouterr().out
    assert made == {"shards", "tokenizer", "codes"} and "report:" not in said
    assert re.search(
        r"stage 1 of 2: tokenizer\ntokenizer took \d+ s: psnr [\d.]+ .*tiny/tokenizer\nstage 2 of 2: codes\n",
        said,
    )


def test_clean_deletes_only_what_can_be_made_again_and_only_if_asked(copy, capsys):
    def files() -> set[str]:
        return {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file() and path.name != ".lock"}

    before = files()
    assert main(["clean", str(copy)]) == 0
    listed = capsys.readouterr().out
    assert "add --delete" in listed and files() == before
    for folder in ("tokenizer/checkpoints", "prior-top/checkpoints", "shards/features", "codes/features"):
        assert f"{copy / folder}: " in listed
    assert main(["clean", str(copy), "--delete"]) == 0
    gone = before - files()
    assert gone and all(set(Path(name).parts[:2]) & {"checkpoints", "features"} for name in gone)
    assert main(["clean", str(copy), "--delete"]) == 0
    assert "nothing to delete" in capsys.readouterr().out
    assert main(["run", str(copy)]) == 0 and "everything is done" in capsys.readouterr().out
    assert lesiongen.load(copy).sample("mel").images.shape == (1, 3, 32, 32)
    assert main(["run", str(copy), "--fresh", "report"]) == 0  # features are computed again


@pytest.mark.parametrize(("word", "said"), [("evalute", "did you mean 'evaluate'?"), ("xyz", "see lesiongen --help")])
def test_a_mistyped_verb(word, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main([word, "x"])
    assert ended.value.code == 2 and f"there is no verb '{word}'; {said}" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("lesiongen 0.")
