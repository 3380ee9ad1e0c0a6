"""Runs on unusual data through the evaluate stage: without labels, one class, grey, several, remote or read-only sets."""

import csv
import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.__main__ import main
from lesiongen.data.efficientnet_lite import has_lite
from tests.chain.evaluated_runs import (
    cache_of,
    check_schema,
    copy_of,
    evaluate,
    figures_of,
    finished,
    is_reason,
    metrics_of,
    neighbours,
)
from tests.users import needs_users

pytestmark = pytest.mark.long


def rows_of(phantoms: Path) -> list[dict[str, str]]:
    """Reads the table of the phantoms."""
    return list(csv.DictReader((phantoms / "metadata.csv").open()))


def table(path: Path, rows: list[dict]) -> Path:
    """Writes a table."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def check_page(run: Path) -> str:
    """Checks that the page shows no missing value. Returns the page."""
    page = (run / "report" / "report.html").read_text()
    shown = page.partition("</style>")[2].partition("The whole config")[0]
    assert not any(f">{word}<" in shown or f" {word} " in shown for word in ("None", "nan", "inf"))
    return page


def test_a_run_without_labels(phantoms, tmp_path):
    rows = [{"image_id": row["image_id"], "lesion_id": row["lesion_id"]} for row in rows_of(phantoms)]
    changes = {"data.metadata": table(tmp_path / "unlabelled.csv", rows), "data.unlabelled": True}
    changes |= {f"priors.{level}.facts": "[]" for level in ("top", "bottom")}
    changes |= {"polish.texture.width": 8, "polish.train.samples": 32, "polish.train.batch": 16, "polish.train.optim.warmup": 0}
    run = finished(phantoms, tmp_path / "runs", **changes)
    assert main(["tune", "sampling", str(run / "config.yaml"), "-n", "28"]) == 0
    found = metrics_of(run)
    check_schema(found)
    assert found["likeness"]["number"] == 28 and list(found["likeness"]["mix"]) == [""]
    (ruler,) = found["likeness"]["rulers"].values()
    assert "random weights" in ruler["about"] and ruler["all"]["both"]["kid"]["value"] is not None
    assert found["classifier"]["reason"] and is_reason(found["utility"]) and found["diversity"]["all"]["ratio"]
    assert not any(score.startswith("contrast") for score in found["privacy"]["membership"]["scores"])
    check_page(run)


def test_priors_without_labels_on_labelled_images(phantoms, tmp_path):
    """Samples without labels are compared with real images of all classes."""
    run = finished(phantoms, tmp_path / "runs", **{f"priors.{level}.facts": "[]" for level in ("top", "bottom")})
    found = metrics_of(run)
    check_schema(found)
    assert found["likeness"]["number"] == 28
    assert found["likeness"]["rulers"]["lesions"]["all"]["both"]["kid"]["value"] is not None
    assert found["classifier"]["reason"] and is_reason(found["utility"])
    check_page(run)


def test_one_class(phantoms, tmp_path):
    rows = [row | {"dx": "nv"} for row in rows_of(phantoms)]
    run = finished(phantoms, tmp_path / "runs", **{"data.metadata": table(tmp_path / "one.csv", rows), "sample.number": 60})
    found = metrics_of(run)
    check_schema(found)
    assert found["likeness"]["mix"] == {"nv": 60} and set(found["diversity"]["classes"]) == {"nv"}
    ruler = found["likeness"]["rulers"]["lesions"]
    assert ruler["classes"]["nv"] == ruler["all"] and ruler["all"]["both"]["kid"]["value"] is not None
    assert "fewer than two classes" in found["classifier"]["reason"] and is_reason(found["utility"])
    assert all(about["recall"] is None for by in found["fairness"]["slices"].values() for about in by.values())
    check_page(run)


def test_grey_images_and_a_class_that_is_never_held_out(phantoms, tmp_path):
    (tmp_path / "grey").mkdir()
    rows = rows_of(phantoms)
    for row in rows:
        picture = Image.open(phantoms / "images" / f"{row['image_id']}.jpg").convert("L")
        picture.save(tmp_path / "grey" / f"{row['image_id']}.png")
        row["split"] = "train" if row["dx"] == "vasc" else ("train", "val", "test", "test")[int(row["lesion_id"][-1]) % 4]
    splits = [{"image": row["image_id"], "split": row.pop("split")} for row in rows]
    changes = {"data.images": tmp_path / "grey", "data.metadata": table(tmp_path / "grey.csv", rows), "data.channels": 1}
    run = finished(phantoms, tmp_path / "runs", **changes, **{"data.splits": table(tmp_path / "splits.csv", splits)})
    found = metrics_of(run)
    check_schema(found)
    assert found["data"]["channels"] == 1 and found["data"]["generated"]["vasc"] == 4
    assert found["likeness"]["mix"] == {name: 4 for name in found["data"]["generated"] if name != "vasc"}
    assert "vasc" not in found["classifier"]["recall"] and "vasc" not in found["utility"]["test"]["classes"]
    assert "skin_tone" not in found["fairness"]["slices"] and "Grey images" in found["fairness"]["note"]
    assert len(neighbours(run)) == 28
    check_page(run)


# Several sets, remote sets and sets that cannot be written


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def two_sets(phantoms, tmp_path_factory) -> Path:
    """Returns a finished run on two packed sets, which lie beside it as a/shards and b/shards."""
    folder = tmp_path_factory.mktemp("sets")
    rows = rows_of(phantoms)
    first = set(sorted({row["lesion_id"] for row in rows})[::2])
    for name, members in (("a", first), ("b", {row["lesion_id"] for row in rows} - first)):
        own = table(folder / f"{name}.csv", [row for row in rows if row["lesion_id"] in members])
        command = ["pack", "--images", str(phantoms / "images"), "--metadata", str(own), "--out", str(folder / name / "shards")]
        settings = ["--size", "32", "data.val=0.2", "data.test=0.4", "data.shard_samples=30", "data.format=png"]
        assert main([*command, *settings, "data.max_rejected=0.9"]) == 0
    return finished(phantoms, folder / "runs", **{"inputs.shards": f"[{folder / 'a'}, {folder / 'b'}]"})


def test_two_sets_keep_their_own_caches(two_sets):
    found, folder = metrics_of(two_sets), two_sets.parents[1]
    check_schema(found)
    for name in ("a", "b"):
        entries = json.loads((folder / name / "shards" / "manifest.json").read_text())["shards"]
        assert len([path for path in cache_of(folder / name) if "classifier" not in path]) == len(entries) >= 3
    assert not any(name.startswith("features") for name in cache_of(two_sets))
    assert len(found["data"]["sets"]) == 2


def test_remote_sets_are_cached_in_the_run(two_sets, tmp_path):
    """Of the same sets over HTTP, the run holds the cache, and the figures are the same."""
    copy = copy_of(two_sets, tmp_path)
    handler = functools.partial(QuietHandler, directory=str(two_sets.parents[1]))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_port}/{name}/shards" for name in ("a", "b")]
        evaluate(copy, f"inputs.shards=[{', '.join(urls)}]")
        server.shutdown()
    assert figures_of(copy) == figures_of(two_sets)
    in_the_run = [name for name in cache_of(copy) if name.startswith("features/")]
    beside = [name for part in "ab" for name in cache_of(two_sets.parents[1] / part)]
    assert len(in_the_run) == len(beside), "each shard has its own file, and there is one classifier"


@needs_users()
def test_sets_and_codes_that_cannot_be_written(two_sets, tmp_path):
    copy = copy_of(two_sets, tmp_path)
    shutil.rmtree(copy / "codes" / "features", ignore_errors=True)
    for name in ("a", "b"):
        shutil.copytree(two_sets.parents[1] / name, tmp_path / name, ignore=shutil.ignore_patterns("features"))
    read_only = [tmp_path / "a", tmp_path / "b", copy / "codes"]
    lines = [f"mount --bind {path} {path}; mount -o remount,ro,bind {path}" for path in read_only]
    sets = f"[{tmp_path / 'a'}, {tmp_path / 'b'}]"
    command = f"'{sys.executable}' -m launch evaluate {copy / 'config.yaml'} runs={copy.parent} 'inputs.shards={sets}'"
    script = "\n".join(["set -eu", *lines, command])
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert figures_of(copy) == figures_of(two_sets)
    assert cache_of(copy) and all(name.startswith("features/") for name in cache_of(copy))
    assert not any(cache_of(path) for path in read_only[:2])


@pytest.mark.skipif(not has_lite(0), reason="needs the weights of EfficientNet-Lite0")
def test_both_rulers_and_the_fine_tuned_judge(phantoms, tmp_path):
    run = finished(phantoms, tmp_path / "runs", **{"evaluate.features.backbone": "auto"})
    found = metrics_of(run)
    check_schema(found)
    assert list(found["likeness"]["rulers"]) == ["imagenet", "lesions"]
    assert found["classifier"]["about"].startswith("fine-tuned") and found["made"]["backbone"] == "EfficientNet-Lite0"
    values = [ruler["all"]["both"]["kid"]["value"] for ruler in found["likeness"]["rulers"].values()]
    assert np.isfinite(values).all() and values[0] != values[1]
    assert sum("classifier" in name for name in cache_of(run)) == 2
    assert json.dumps(found["verdict"]).count("only one ruler") == 0
    check_page(run)
