"""The evaluate stage on a small run: what it writes, what it keeps, what it refuses, and what it never shows."""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from hpc.errors import UserError
from hpc.run import metrics_log
from launch.__main__ import main
from lesiongen.evaluation import plots
from lesiongen.evaluation.privacy.candidates import Candidates
from lesiongen.stages import evaluate as stage
from tests.chain.evaluated_runs import (
    cache_of,
    check_schema,
    copy_of,
    evaluate,
    figures_of,
    finished,
    image_ids,
    is_reason,
    metrics_of,
    neighbours,
    real_rows,
)
from tests.dist import cases

# Runs in a process of its own: evaluates a run, and is killed after it has written its third cache file.
KILLED = """
import os, pathlib, signal, sys
from lesiongen.evaluation import feature_cache
from tests.chain.evaluated_runs import evaluate
written, write = [], feature_cache.write_arrays
def write_and_die(path, columns):
    write(path, columns)
    written.append(path)
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
feature_cache.write_arrays = write_and_die
evaluate(pathlib.Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory) -> Path:
    """Returns a finished run in which every part was measured."""
    return finished(phantoms, tmp_path_factory.mktemp("evaluated"))


@pytest.fixture
def quick(monkeypatch):
    """Leaves out the learning curves, which take half of the time of so small an evaluation."""
    monkeypatch.setattr(plots, "curves", lambda _: b"")


# What the stage writes


def test_every_part_is_measured_and_in_the_form_of_the_schema(run):
    found = metrics_of(run)
    check_schema(found)
    assert not any(map(is_reason, (found["utility"], found["privacy"]["membership"], found["privacy"]["extraction"])))
    assert found["classifier"]["reason"] is None and found["diversity"]["reason"] is None and found["gate"] is None
    for figures in found["likeness"]["rulers"]["lesions"]["all"].values():
        assert all(figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"] for name in ("kid", "frechet"))
    assert found["data"]["generated"] == found["likeness"]["mix"] and sum(found["data"]["generated"].values()) == 28


def test_the_log_holds_the_numbers_of_metrics_json(run):
    (row,) = metrics_log.read_metrics(run / "report")
    found = metrics_of(run)
    assert row["likeness/rulers/lesions/all/both/kid"] == found["likeness"]["rulers"]["lesions"]["all"]["both"]["kid"]["value"]
    assert row["privacy/copies/any/copies"] == found["privacy"]["copies"]["any"]["copies"]
    assert row["privacy/membership/scores/likelihood all/auc"] > 0 and row["tokenizer/psnr"] == found["tokenizer"]["psnr"]
    assert not any(name.startswith("made") for name in row) and len(row) > 200
    assert {p.name.rpartition("-")[0] for p in (run / "report" / "images").glob("*.png")} >= {
        *("samples", "training", "neighbours", "curves", "confusion", "reconstructions"),
        *("distances-pixels", "distances-features", "distances-codes-top", "distances-codes-bottom"),
    }


def test_the_private_table_names_training_images(run):
    rows, catalog = neighbours(run), set(image_ids(run))
    assert [row["sample"] for row in rows] == [str(i) for i in range(28)]
    for kind, about in metrics_of(run)["privacy"]["copies"]["kinds"].items():
        assert {row[f"image-{kind}"] for row in rows} <= catalog
        assert min(float(row[f"closeness-{kind}"]) for row in rows) == pytest.approx(about["least"])
        assert sum(kind in row["copy"].split("; ") for row in rows) == about["copies"]


def test_nothing_but_the_private_table_names_a_training_image(run):
    public = [p for p in (run / "report").rglob("*") if p.is_file() and p.parent.name not in ("private", "images")]
    assert {p.name for p in public} >= {"metrics.json", "metrics.jsonl", "report.html", "share.html"}
    assert not any(mark in str(p) for mark in image_ids(run) for p in (run / "report").rglob("*"))
    for path in public:
        text = path.read_text()
        assert not [identity for identity in image_ids(run) if identity in text], path


def pictures(page: str) -> list[bytes]:
    """Returns the pixels of the pictures of a page."""
    found = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))).tobytes() for png in found]


def test_the_shared_page_shows_no_real_image(run):
    whole, shared = (pictures((run / "report" / name).read_text()) for name in ("report.html", "share.html"))
    rows = real_rows(run)
    assert sum(any(row in picture for picture in whole) for row in rows) >= 7, "the whole page shows real images"
    assert shared and not any(row in picture for row in rows for picture in shared)


def test_the_pages_show_the_reader_no_missing_values(run):
    for name in ("report.html", "share.html"):
        text = re.sub(r"<[^>]+>", " ", (run / "report" / name).read_text().partition("The whole config")[0])
        assert not re.findall(r"\b(?:None|nan|inf|NaN)\b|[{}]", text.partition("</style>")[2] or text.partition("Skip to")[2])


# Ranks, the cache, and a stage that is killed


@pytest.mark.long
def test_two_ranks_find_the_same(run, tmp_path, pools):
    copy = copy_of(run, tmp_path, cache=False)
    pools(2).run(cases.run_stages, [f"runs={copy.parent}"], str(copy / "config.yaml"), ["report"])
    one, two = figures_of(run), figures_of(copy)
    # The ranks reconstruct batches of other sizes, which round differently.
    assert two.pop("tokenizer") == pytest.approx(one.pop("tokenizer"), rel=1e-5, abs=1e-4)
    assert two == one
    assert set(cache_of(copy)) == set(cache_of(run))


def test_a_second_evaluation_reads_the_cache(run, tmp_path, quick):
    copy = copy_of(run, tmp_path)
    before = cache_of(copy)
    assert len(before) > 10 and sum("classifier" in name for name in before) == 1
    evaluate(copy)
    assert cache_of(copy) == before and figures_of(copy) == figures_of(run)


def test_damaged_cache_files_are_computed_again(run, tmp_path, quick):
    copy = copy_of(run, tmp_path)
    names = sorted(cache_of(copy))
    damages = {
        next(name for name in names if "shards/features/train" in name): lambda content: content[:-100],
        next(name for name in names if "shards/features/val" in name): lambda content: b"",
        next(name for name in names if "shards/features/test" in name): lambda content: b"\xff" + content[1:],
        next(name for name in names if "codes/features/train" in name): _flipped,
        next(name for name in names if "codes/features/test" in name): lambda content: content.replace(b"crc32", b"crc31", 1),
        next(name for name in names if "classifier" in name): _flipped,
    }
    sound = {name: (copy / name).read_bytes() for name in damages}
    for name, damage in damages.items():
        (copy / name).write_bytes(damage(sound[name]))
    before = cache_of(copy)
    evaluate(copy)
    assert {name for name, time in cache_of(copy).items() if time != before[name]} == set(damages)
    assert {name: (copy / name).read_bytes() for name in damages} == sound
    assert figures_of(copy) == figures_of(run)


def _flipped(content: bytes) -> bytes:
    """Flips one bit in the data of a file."""
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def test_a_killed_evaluation_keeps_its_cache(run, tmp_path, quick):
    copy = copy_of(run, tmp_path, cache=False)
    command = [sys.executable, "-c", KILLED, str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    before = cache_of(copy)
    assert sum("classifier" not in name for name in before) == 3
    assert not json.loads((copy / "report" / "stage.json").read_text())["done"]
    evaluate(copy)
    assert {name: cache_of(copy)[name] for name in before} == before and set(cache_of(copy)) == set(cache_of(run))
    assert figures_of(copy) == figures_of(run)


# Other settings of the evaluation


def test_few_samples(run, tmp_path, quick):
    copy = copy_of(run, tmp_path)
    few = "sample.number=7"
    assert main(["sample", str(copy / "config.yaml"), f"runs={copy.parent}", few, "--fresh", "samples"]) == 0
    evaluate(copy, few)
    found = metrics_of(copy)
    check_schema(found)
    assert found["likeness"]["number"] == 7 and found["diversity"]["reason"]
    assert found["likeness"]["rulers"]["lesions"]["all"]["both"]["kid"]["value"] is None
    assert found["privacy"]["copies"]["any"]["number"] == 7 and found["utility"]["arms"]["synthetic"]["all"]["images"] == 7


def test_a_gate_is_described_and_privacy_is_that_of_the_first_attempts(run, tmp_path, quick):
    copy = copy_of(run, tmp_path)
    gate = "sample.gate={features: false, pixels: false, likelihood: 0.6, attempts: 2}"
    assert main(["sample", str(copy / "config.yaml"), f"runs={copy.parent}", gate, "--fresh", "samples"]) == 0
    evaluate(copy, gate)
    found, rows = metrics_of(copy), Candidates(copy / "samples").rows()
    check_schema(found)
    assert found["gate"]["candidates"] == len(rows) > 28 and found["gate"]["rejected"] > 0 and found["made"]["gate"]
    assert found["gate"]["given_up"] == 28 - sum(found["data"]["generated"].values())
    for side in ("before", "after"):
        assert found["gate"][side]["likeness"]["number"] == found["likeness"]["number"]
    assert found["gate"]["after"]["likeness"] == found["likeness"]["rulers"]["lesions"]["all"]["both"]
    copies, before = found["privacy"]["copies"], figures_of(run)["privacy"]["copies"]
    assert copies == before, "the first attempts are the samples without a gate"
    assert len(neighbours(copy)) == 28


@pytest.mark.long
def test_fine_tuning_measures_utility(run, tmp_path, quick):
    copy = copy_of(run, tmp_path)
    changes = ["evaluate.utility.method=finetune", "evaluate.utility.fine_tuning_samples=1600"]
    evaluate(copy, *changes, "evaluate.classifier_samples=1600")
    found = metrics_of(copy)
    check_schema(found)
    assert found["utility"]["method"] == "finetune" and len(found["utility"]["test"]["classes"]) == 7
    arms = {name: by_size.get("5", by_size.get("all")) for name, by_size in found["utility"]["arms"].items()}
    assert arms["real"]["balanced_accuracy"]["low"] > found["utility"]["chance"]
    assert arms["real"]["balanced_accuracy"]["value"] > arms["synthetic"]["balanced_accuracy"]["value"]
    assert arms["mixed"]["images"] == arms["augmented"]["images"] > arms["real"]["images"]


# Networks of the user's


class Scripted(nn.Module):
    """Returns the mean colour of 16 areas."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


class Picky(Scripted):
    """Takes images of 48 px only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != 48:
            raise ValueError("I take 48 px")
        return x.flatten(1)


class Flat(Scripted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Pair(Scripted):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """Returns a folder of files with networks."""
    folder = tmp_path_factory.mktemp("networks")
    for module in (Scripted, Picky, Flat, Pair):
        torch.jit.script(module()).save(folder / f"{module.__name__.lower()}.pt")
    for name in ("test_resnet", "vit_tiny_patch16_224"):
        torch.manual_seed(0)
        save_file(timm.create_model(name, pretrained=False).state_dict(), folder / f"{name}.safetensors")
    torch.save({"weight": torch.zeros(3)}, folder / "weights.pt")
    for name in ("garbage.pt", "garbage.safetensors"):
        (folder / name).write_bytes(os.urandom(1000))
    return folder


def backbone(path: Path, architecture: str) -> list[str]:
    """Returns the overrides that name a network."""
    return [f"evaluate.features.backbone={path}", *([f"evaluate.features.architecture={architecture}"] * bool(architecture))]


@pytest.mark.parametrize(
    ("file", "architecture"),
    [("scripted.pt", ""), pytest.param("test_resnet.safetensors", "test_resnet", marks=pytest.mark.long)],
)
def test_a_network_of_the_users(run, tmp_path, quick, networks, file, architecture):
    copy = copy_of(run, tmp_path)
    features = backbone(networks / file, architecture)
    evaluate(copy, *features)
    found = metrics_of(copy)
    check_schema(found)
    assert list(found["likeness"]["rulers"]) == [file.partition(".")[0], "lesions"]
    assert found["made"]["backbone"] == file.partition(".")[0] != metrics_of(run)["made"]["backbone"]
    both = [ruler["all"]["both"]["kid"]["value"] for ruler in found["likeness"]["rulers"].values()]
    before = metrics_of(run)["likeness"]["rulers"]["lesions"]["all"]["both"]["kid"]["value"]
    assert both[1] == pytest.approx(before, rel=1e-2) and both[0] != both[1]  # now without the cache's rounding to 16 bits
    assert found["privacy"]["copies"]["kinds"]["features"] != metrics_of(run)["privacy"]["copies"]["kinds"]["features"]


@pytest.mark.parametrize(
    ("file", "architecture", "expected"),
    [
        ("missing.pt", "", "there is no file"),
        ("garbage.pt", "", "cannot be loaded as TorchScript"),
        ("weights.pt", "", "cannot be loaded as TorchScript"),
        ("garbage.safetensors", "test_resnet", "cannot be loaded as weights of test_resnet"),
        ("test_resnet.safetensors", "", "Set evaluate.features.architecture to timm's name"),
        ("test_resnet.safetensors", "no_such_network", "Unknown model (no_such_network)"),
        ("test_resnet.safetensors", "resnet18", "cannot be loaded as weights of resnet18"),
        ("test_resnet.safetensors", "test_vit", "lacks weights of test_vit, such as"),
        ("vit_tiny_patch16_224.safetensors", "vit_tiny_patch16_224", "Set evaluate.features.size"),
        ("picky.pt", "", "I take 48 px"),
        ("flat.pt", "", "returns an array of shape [2, 3, 128, 128] for 2 images"),
        ("pair.pt", "", "cannot be applied to images of 128 px"),
    ],
)
def test_a_wrong_network_is_refused_before_the_work(bare, networks, file, architecture, expected):
    with pytest.raises(UserError) as refused:
        evaluate(bare, *backbone(networks / file, architecture))
    said = str(refused.value)
    assert expected in said and file in said and "\n" not in said and len(said) < 700
    assert not cache_of(bare)


def test_a_wrong_network_is_refused_before_a_report_is_deleted(run, tmp_path, networks, capfd):
    copy = copy_of(run, tmp_path)
    shutil.copytree(run / "report", copy / "report")
    before = (copy / "report" / "metrics.json").read_bytes()
    overrides = [f"runs={copy.parent}", f"name={copy.name}", *backbone(networks / "garbage.pt", "")]
    for verb in ("evaluate", "run"):
        assert main([verb, str(copy / "config.yaml"), "--fresh", "report", *overrides]) == 2
        assert "cannot be loaded as TorchScript" in capfd.readouterr().err
    assert (copy / "report" / "metrics.json").read_bytes() == before


# Inputs that do not fit


@pytest.fixture
def bare(run, tmp_path, monkeypatch) -> Path:
    """Returns a copy of the run without a cache, in which all long work fails."""

    def long_work(*_) -> None:
        raise AssertionError("the stage has begun the long work")

    for name in ("evaluate_tokenizer", "training_views"):
        monkeypatch.setattr(stage, name, long_work)
    monkeypatch.setattr("lesiongen.evaluation.subject.trained_classifier", long_work)
    monkeypatch.setattr("lesiongen.evaluation.subject.cached_columns", long_work)
    return copy_of(run, tmp_path, cache=False)


@pytest.mark.parametrize("state", ["no codes", "a batch is missing", "a batch is damaged"])
def test_samples_without_their_codes_are_refused_before_the_work(bare, state):
    codes = sorted((bare / "samples" / "private" / "codes").iterdir())
    if state == "no codes":
        shutil.rmtree(bare / "samples" / "private")
    elif state == "a batch is missing":
        codes[1].unlink()
    else:
        codes[1].write_bytes(codes[1].read_bytes()[:-50])
    with pytest.raises(UserError, match="--fresh samples"):
        evaluate(bare)
    assert not cache_of(bare)


def test_codes_of_another_tokenizer_are_refused_before_the_work(bare):
    manifest = bare / "codes" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"tokenizer": "another"}))
    with pytest.raises(UserError, match="has changed since the codes were made"):
        evaluate(bare)
