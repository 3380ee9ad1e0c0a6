"""Each report's config (configs/seeds) trains, resumes, reconstructs and samples, in a tiny setting on data of its kind."""

import csv
from pathlib import Path

import pytest
from PIL import Image

from hpc.config import read_yaml
from hpc.run import metrics_log
from hpc.run.rundir import read_stage_record
from launch.__main__ import main

SEEDS = sorted((Path(__file__).parents[2] / "configs" / "seeds").glob("report-*.yaml"))
SMALL = {"data.size": 64, "data.val": 0.2, "data.test": 0.2, "data.workers": 0, "tokenizer.model.hidden": 16}
SMALL |= {"tokenizer.train.batch": 16, "tokenizer.train.save_every": 64, "tokenizer.train.eval_every": 64}
SMALL |= {"tokenizer.train.log_every": 16, "tokenizer.train.samples": 128}
PRIORS = dict.fromkeys(("report-001", "report-002", "report-004"), "gated_pixelcnn")
PRIORS |= {"report-000": "pixelcnn", "report-003": "gpt"}


@pytest.fixture(scope="module")
def skin(real_images) -> tuple[Path, Path]:
    """Returns (images, metadata) of dermoscopic photographs."""
    folder = real_images / "ham10000"
    return folder / "images", folder / "mini.csv"


@pytest.fixture(scope="module")
def slices(real_images) -> tuple[Path, Path]:
    """Returns (images, metadata) of MRI slices."""
    return real_images / "mri" / "images", real_images / "mri" / "metadata.csv"


QUICK = ("report-000", "report-004")  # of the five, a VQ-VAE of photographs and one of grey slices
CASES = [pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.long) for path in SEEDS]


@pytest.mark.parametrize("seed", CASES)
def test_a_seed_trains_resumes_and_reconstructs(seed, request, tmp_path, capsys):
    images, metadata = request.getfixturevalue("slices" if seed.stem.endswith("004") else "skin")
    with open(metadata, newline="") as file:
        ids = [row["image_id"] for row in csv.DictReader(file)]
    if seed.stem.endswith("004"):
        chosen = ids[::6]
    else:
        with open(images.parent / "metadata.csv", newline="") as file:
            named = set(ids[::3])
            chosen = [row["image_id"] for row in csv.DictReader(file) if row["image_id"] in named]
    (tmp_path / "images").mkdir()
    for name in chosen:
        path = next(images.glob(f"{name}.*"))
        (tmp_path / "images" / path.name).symlink_to(path)
    full = images.parent / "metadata.csv"
    given = SMALL | {"runs": tmp_path, "data.images": tmp_path / "images", "data.metadata": full, "data.max_rejected": 1}
    overrides = [f"{key}={value}" for key, value in given.items()]
    assert main(["pack", str(seed), *overrides]) == 0
    train = ["train", "tokenizer", str(seed), *overrides]
    assert main([*train, "tokenizer.train.samples=64"]) == 0
    assert main(train) == 0
    run = tmp_path / seed.stem
    rows = metrics_log.read_metrics(run / "tokenizer")
    assert read_stage_record(run / "tokenizer")["done"]
    assert {r["samples"] for r in rows if "val/psnr" in r} == {64, 128}
    seen = [r["samples"] for r in rows if "train/loss" in r]
    assert seen == sorted(set(seen)) == list(range(16, 129, 16))
    first, last = ([r["train/reconstruction"] for r in rows if "train/loss" in r][i] for i in (0, -1))
    assert last < first
    capsys.readouterr()
    assert main(["reconstruct", str(seed), str(tmp_path / "images" / path.name), *overrides]) == 0
    assert "1 images: PSNR" in capsys.readouterr().out
    out = run / "reconstructions"
    assert Image.open(out / "pairs.png").mode == ("L" if seed.stem.endswith("004") else "RGB")
    assert {p.name for p in out.iterdir()} == {"images", "pairs.png", "codes.png", "codebook.png", "metrics.csv"}
    assert len(list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))) == 1
    _samples(seed, PRIORS[seed.stem], run, overrides)


def _samples(seed: Path, kind: str, run: Path, overrides: list[str]) -> None:
    """Encodes, trains the report's kind of prior, and samples three images."""
    levels = ("top", "bottom") if seed.stem.endswith("002") else ("codes",)
    small = {"samples": 32, "batch": 16, "log_every": 16, "eval_every": 32, "save_every": 32}
    for level in levels:
        overrides = [*overrides, *(f"priors.{level}.train.{key}={value}" for key, value in small.items())]
        overrides += [f"priors.{level}.model.layers=2", f"priors.{level}.model.width=24"]
    assert main(["encode", str(seed), *overrides]) == 0
    assert main(["train", "prior", str(seed), *overrides]) == 0
    assert main(["sample", str(seed), *overrides, "sample.number=3"]) == 0
    for level in levels:
        assert read_yaml(run / f"prior-{level}" / "export" / "config.yaml")["model"]["kind"] == kind
    assert len(list((run / "samples" / "images").rglob("*.png"))) == 3
