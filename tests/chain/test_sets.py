"""Several packed sets are read as one, from disk or over HTTP, in given proportions. Also runs grey images end to end."""

import csv
import functools
import http.server
import re
import threading
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpc.data.storage import CacheConfig
from hpc.errors import UserError
from launch.__main__ import main
from lesiongen import experiment
from lesiongen.data.augment import AugmentConfig
from lesiongen.data.balance import StreamConfig, order_for
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.ingest import phantom
from lesiongen.stages.pack import pack
from tests.conftest import DEMO, tiny


def table(folder: Path, name: str, rows: list[dict]) -> str:
    with open(folder / name, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return str(folder / name)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Path, Path]:
    """Returns two packed sets with different lesions. Each set lacks one class that the other one has."""
    folder = tmp_path_factory.mktemp("sets")
    phantom.write(folder, lesions_per_class=20, size=32, progress=False)
    rows = list(csv.DictReader((folder / "metadata.csv").read_text().splitlines()))
    labels = sorted({r["dx"] for r in rows})
    lesions = sorted({r["lesion_id"] for r in rows})
    first = {lesion for i, lesion in enumerate(lesions) if i % 3}
    rows_of_sets = {
        "a": [r for r in rows if r["lesion_id"] in first and r["dx"] != labels[-1]],
        "b": [r for r in rows if r["lesion_id"] not in first and r["dx"] != labels[0]],
    }
    for name, set_rows in rows_of_sets.items():
        own = {"images": str(folder / "images"), "metadata": table(folder, f"{name}.csv", set_rows), "size": 32, "val": 0.2}
        own |= {"test": 0.2, "shard_samples": 10, "max_rejected": 1.0}
        pack(experiment.make({"name": "x", "data": own}).data, folder / name)
    return folder / "a", folder / "b"


def keys(data: ImageShards, number: int, batch: int = 8, position: int = 0, **stream) -> list[tuple[str, int]]:
    """Returns (key, label) of the training samples at `number` positions, beginning at `position`."""
    batches = data.train(position, batch, batch, AugmentConfig(), 0, 0, StreamConfig(**stream))
    found = [pair for b in islice(batches, -(-number // batch)) for pair in zip(b["key"], b["label"].tolist(), strict=True)]
    return found[:number]


def test_a_union_is_a_data_set(sets):
    data = ImageShards(Packed(list(sets)), "train")
    assert len(data) == sum(len(ImageShards(Packed([s]), "train")) for s in sets)
    assert len(data.classes) == 7
    epoch = keys(data, len(data))
    assert len({key for key, _ in epoch}) == len(data)
    named = Counter(data.classes[label] for _, label in epoch)
    assert named == {c: n for c, n in Packed(list(sets)).counts["train"].items() if n}


@pytest.mark.parametrize("position", [0, 4096])
def test_balanced_classes(sets, position):
    data = ImageShards(Packed(list(sets)), "train")
    found = keys(data, 700, position=position, balance=1.0)
    counts = Counter(label for _, label in found)
    assert max(counts.values()) - min(counts.values()) <= 3
    for label in counts:  # each image comes once before any comes twice, within rounds; `position` may lie inside a round
        members = Counter(key for key, own in found if own == label)
        assert max(members.values()) - min(members.values()) <= (1 if position == 0 else 2)
        assert len(members) == sum(c == label for _, c in keys(data, len(data)))


def test_weighted_sets(sets):
    data = ImageShards(Packed(list(sets)), "train")
    own = [{key for key, _ in keys(ImageShards(Packed([s]), "train"), len(ImageShards(Packed([s]), "train")))} for s in sets]
    found = keys(data, 800, weights=(1, 3))
    assert abs(sum(key in own[0] for key, _ in found) - 200) <= 8
    both = keys(data, 800, weights=(1, 3), balance=1.0)
    assert abs(sum(key in own[0] for key, _ in both) - 200) <= 8
    assert sorted(keys(data, len(data), streams=8)) == sorted(keys(data, len(data))), "streams changed the epoch"
    with pytest.raises(UserError, match=r"stream\.streams=3 does not divide the batch of 8"):
        keys(data, 8, streams=3)
    with pytest.raises(UserError, match=r"3 numbers for sets of \d+, \d+ training images"):
        keys(data, 8, weights=(1, 1, 1))
    for balance in (0, 0.5):  # the first set has images for testing only
        with pytest.raises(UserError, match="2 numbers for sets of 0, 7 training images"):
            order_for([{}, {0: 7}], [0, 1], 8, 0, StreamConfig(weights=(1, 1), balance=balance), lambda *_: 0)
    with pytest.raises(UserError, match="2 numbers for sets of 0, 7 training images"):
        order_for([{0: 7}], [1], 8, 0, StreamConfig(weights=(1, 1)), lambda *_: 0)


def test_a_lesion_in_two_sets_and_splits_is_refused(sets, tmp_path):
    folder = sets[0].parent
    other = {"train": "val", "val": "test", "test": "train"}
    moved = [{"image": r["image_id"], "split": other[r["split"]]} for r in Packed([sets[0]]).catalog()]
    own = {"images": str(folder / "images"), "metadata": str(folder / "a.csv"), "size": 32, "max_rejected": 1.0}
    own["splits"] = table(tmp_path, "moved.csv", moved)
    pack(experiment.make({"name": "x", "data": own}).data, tmp_path / "c")
    with pytest.raises(UserError, match="would be known from training"):
        Packed([sets[0], tmp_path / "c"]).refuse_leaks()
    Packed(list(sets)).refuse_leaks()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def served(sets):
    handler = functools.partial(QuietHandler, directory=str(sets[0].parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_same_samples_over_http_and_staged(sets, served, tmp_path):
    local = ImageShards(Packed(list(sets)), "train")
    cache = CacheConfig(str(tmp_path / "cache"))
    remote = ImageShards(Packed([f"{served}/a", f"{served}/b"], cache), "train")
    assert keys(remote, 300) == keys(local, 300)
    assert remote.packed.digest() == local.packed.digest()
    staged = ImageShards(Packed(list(sets), CacheConfig(str(tmp_path / "staged"))), "train")
    assert keys(staged, 300, balance=0.5) == keys(local, 300, balance=0.5)
    for directory in ("cache", "staged"):
        assert len(list((tmp_path / directory).glob("*.tar-*"))) == len(local.entries)


def test_a_run_on_two_sets_over_http(sets, served, tmp_path):
    """Trains on remote sets with balanced streams. The same command again must find every stage done."""
    overrides = tiny(sets[0].parent, tmp_path / "runs")
    overrides += [f"inputs.shards=[{served}/a, {served}/b]", f"data.cache.directory={tmp_path / 'cache'}", "data.workers=1"]
    overrides += ["tokenizer.stream.balance=0.5", "priors.top.stream.balance=1.0", "priors.bottom.stream.weights=[1, 2]"]
    assert main(["run", DEMO, *overrides]) == 0
    assert main(["run", DEMO, *overrides]) == 0
    page = (tmp_path / "runs" / "tiny" / "report" / "report.html").read_text()
    assert all(re.search(rf"Set {n} \(.+\): \d+ images, \d+ lesions, \d+ patients, \d+ groups", page) for n in (1, 2))
    assert re.search(r'<tr><th scope="row">Patients</th><td>\d', page) and re.search(r"images of \d+ lesions, \d+ groups", page)
    assert not (tmp_path / "runs" / "tiny" / "shards").exists()


def test_one_channel_end_to_end(tmp_path):
    """Grey slices of several patients, as from a scanner: 16 bits per pixel, split by patient. The samples must be grey too."""
    (tmp_path / "slices").mkdir()
    rows = []
    phantom.write(tmp_path, lesions_per_class=12, size=32, progress=False)
    for i, row in enumerate(csv.DictReader((tmp_path / "metadata.csv").read_text().splitlines())):
        grey = np.array(Image.open(tmp_path / "images" / f"{row['image_id']}.jpg").convert("L")).astype(np.uint16) * 257
        Image.fromarray(grey).save(tmp_path / "slices" / f"s{i}.png")
        rows.append({"image_id": f"s{i}", "patient_id": row["lesion_id"], "diagnosis": ["tumour", "none"][i % 2]})
    metadata = table(tmp_path, "slices.csv", rows)
    own = {"data.images": tmp_path / "slices", "data.metadata": metadata, "data.channels": 1, "data.format": "png"}
    assert main(["run", DEMO, *tiny(tmp_path, tmp_path / "runs", **own)]) == 0
    run = tmp_path / "runs" / "tiny"
    data = ImageShards(Packed([run / "shards"]), "train")
    batch = next(data.held_out(4))
    assert batch["image"].shape == (4, 1, 32, 32)
    assert batch["image"].float().std() > 10
    sample = Image.open(next((run / "samples" / "images").rglob("*.png")))
    assert sample.mode == "L"
    assert (run / "report" / "report.html").exists()


def test_packed_sets_must_be_alike(sets, tmp_path):
    own = experiment.make(
        {"name": "x", "data": {"images": str(sets[0].parent / "images"), "size": 48, "val": 0.3, "test": 0.3}}
    )
    pack(replace(own.data, shard_samples=200), tmp_path / "other")
    with pytest.raises(UserError, match="Pack them alike"):
        Packed([sets[0], tmp_path / "other"])
