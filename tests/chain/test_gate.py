"""Planted copies of training views are found, named and replaced, on codes that a tokenizer made of phantoms."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpc.data.codestore import CodeStore
from hpc.dist import Topology
from hpc.errors import UserError
from launch import sampling
from launch.__main__ import main
from launch.rank import rank_main
from lesiongen import experiment
from lesiongen.data.augment import dihedral
from lesiongen.data.efficientnet_lite import has_lite
from lesiongen.data.images import to_float
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.evaluation import feature_cache
from lesiongen.evaluation.backbone import FeaturesConfig, load_backbone
from lesiongen.evaluation.privacy import copies
from lesiongen.evaluation.privacy.candidates import Candidates
from lesiongen.evaluation.privacy.gate import gate_metrics
from lesiongen.evaluation.reconstructions import decode
from lesiongen.priors.code_sampler import Codes
from lesiongen.tokenizers.export import load_tokenizer
from tests.conftest import DEMO, tiny
from tests.dist import gate_cases

TRAINING = {"samples": 1600, "eval_every": 1600, "save_every": 1600, "optim.lr": 2e-3, "optim.warmup": 160}
VIEWS = [(0, 0, 3), (2, 1, 5), (1, 2, 7)]  # (draw, shard, ordinal) of the views that are planted; draws 1 and 2 are augmented
GATE = "sample.gate={likelihood: 1, attempts: 4, features: false}"


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory) -> Path:
    """Returns a run with codes whose decoded images look like the phantoms, and barely trained priors."""
    runs = tmp_path_factory.mktemp("gate")
    changes = {f"tokenizer.train.{key}": value for key, value in TRAINING.items()}
    changes |= {"tokenizer.model.entries": 128, "encode.draws": 3, "sample.number": 10, "sample.batch": 4}
    overrides = tiny(phantoms, runs, **changes)
    for verb in (["pack"], ["train", "tokenizer"], ["encode"], ["train", "prior"]):
        assert main([*verb, DEMO, *overrides]) == 0
    return runs / "tiny"


@pytest.fixture(scope="module")
def net(run):
    return load_tokenizer(run / "tokenizer", torch.device("cpu"))[0]


def codes_of(run: Path, rows: list[tuple[int, int, int]], split: str = "train") -> dict[str, np.ndarray]:
    columns = CodeStore(run / "codes").gather_rows(split, rows, ["codes.top", "codes.bottom"])
    return {level: columns[f"codes.{level}"] for level in ("top", "bottom")}


def true_ids(run: Path, rows: list[tuple[int, int, int]]) -> list[str]:
    """Returns the image ids of training views from the shards themselves, not from the catalogs."""
    split = ImageShards(Packed([run / "shards"]), "train")
    reader = split.reader()
    return [json.loads(reader.read(shard, ordinal)["json"])["image_id"] for _, shard, ordinal in rows]


def samples_in(run: Path, folder: Path, *overrides: str) -> int:
    return main(["sample", str(run / "config.yaml"), "--out", str(folder), *overrides])


def plant(run: Path, plain: Path, folder: Path) -> None:
    """Puts codes of training views in place of the first attempts at the samples 0, 2 and 5."""
    found = Candidates(plain).first_attempts()
    for member, row in zip((0, 2, 5), VIEWS, strict=True):
        for level, codes in codes_of(run, [row]).items():
            found.codes[level][member] = codes[0]
    for first in range(0, 10, 4):
        part = slice(first, first + 4)
        batch = Codes(found.indices[part], *({k: v[part] for k, v in d.items()} for d in (found.codes, found.bits)))
        Candidates(folder).save(0, batch)


def tree(folder: Path) -> dict[str, bytes]:
    """Returns the files of a directory of samples, without the stage's record."""
    skipped = ("stage.json", ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in skipped}


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory) -> Path:
    """Returns samples without a gate."""
    folder = tmp_path_factory.mktemp("samples") / "plain"
    assert samples_in(run, folder) == 0
    return folder


@pytest.fixture(scope="module")
def gated(run, plain, tmp_path_factory) -> Path:
    """Returns samples of which three first attempts are training views, after a gate."""
    folder = tmp_path_factory.mktemp("samples") / "gated"
    plant(run, plain, folder)
    assert samples_in(run, folder, GATE) == 0
    return folder


def test_planted_copies_are_found_by_each_kind_of_distance_and_named(run, net):
    backbone = load_backbone(FeaturesConfig(), lambda: None) if has_lite(0) else None
    views = gate_cases.views_of(str(run), Topology(), backbone)
    planted = codes_of(run, VIEWS)
    others = codes_of(run, [(0, 0, i) for i in range(12)], "test")
    turned = dihedral(decode(net, codes_of(run, [(0, 1, 2)]), [""]), 3)
    with torch.no_grad():
        of_turned = {level: grid.numpy() for level, grid in net.encode(to_float(turned)).items()}
    codes = {level: np.concatenate([planted[level], of_turned[level], others[level]]) for level in planted}
    images = torch.cat([decode(net, planted, [""] * 3), turned, decode(net, others, [""] * 12)])
    found = copies.measure(views, images.split(64), codes, seed=0)

    shards, ids = Packed([run / "shards"]), true_ids(run, [*VIEWS, (0, 1, 2)])
    for kind, nearest in found.samples.items():
        assert nearest.distance[:3] == pytest.approx(0, abs=1e-3), kind
        assert copies.image_ids(shards, nearest.row[:3]) == ids[:3], kind
    assert (found.samples["pixels"].distance[3], copies.image_ids(shards, found.samples["pixels"].row[3:4])) == (0, ids[3:])
    assert torch.equal(dihedral(decode(net, codes_of(run, [(0, 1, 2)]), [""]), int(found.samples["pixels"].form[3])), turned)
    metrics = found.metrics()
    assert (metrics["views"], metrics["draws"], metrics["held_out"]) == (len(views), 3, len(views.held_out(0)[0]))
    for kind in views.kinds:
        values = metrics["kinds"][kind]
        if kind != "codes top":  # so few codes that two lesions may have the same ones
            assert values["copies"] >= 3 + (kind == "pixels")
        assert values["least"] == pytest.approx(0, abs=1e-3)
        assert values["held_out_rate"]["value"] * metrics["held_out"] <= 1  # 1 % of so few images, rounded up
        assert values["copies"] - 3 - (kind == "pixels") <= 1, "held-out images are no copies"
    assert metrics["any"]["copies"] >= 4
    assert metrics["any"]["held_out_rate"]["value"] * metrics["held_out"] <= len(views.kinds)


@pytest.mark.parametrize("overrides", [[], [GATE]], ids=["plain", "gate"])
def test_samples_made_in_parts_are_those_made_at_once(run, plain, tmp_path, overrides):
    """Ranks that never meet make parts; one of them is missing, and the run that finishes makes up for it."""
    folder = tmp_path / "samples"
    config = experiment.load(str(run), overrides)
    sampling.begin_directory(config, folder)
    for rank in (0, 2):
        assert rank_main(config, "samples", Topology(rank=rank, world_size=3), folder, alone=True) == 0
    made = {path.name: path.stat().st_mtime_ns for path in folder.rglob("private/codes/*")}
    assert sorted(made) == ["000-000000.safetensors", "000-000008.safetensors"]
    assert len(list(folder.rglob("images/*/*.png"))) == (0 if overrides else 6)
    assert samples_in(run, folder, *overrides) == 0
    assert {name: (folder / "private" / "codes" / name).stat().st_mtime_ns for name in made} == made, "nothing is made twice"
    if overrides:
        assert samples_in(run, tmp_path / "whole", *overrides) == 0
    whole = tree(tmp_path / "whole" if overrides else plain)
    assert tree(folder) == whole
    # Parts of other samples are refused, and a finished directory is not begun again.
    other = experiment.load(str(run), [*overrides, "sample.temperature=0.9"])
    assert rank_main(other, "samples", Topology(rank=1, world_size=3), folder, alone=True) == 2
    with pytest.raises(UserError, match="holds these samples already"):
        sampling.begin_directory(config, folder)


def test_the_nearest_views_are_those_of_a_plain_comparison(run):
    views = gate_cases.views_of(str(run), Topology())
    held_out, _ = views.held_out(0)
    parts = [views.part(i) for i in range(len(views.files))]
    found = gate_cases.nearest(Topology(), str(run))
    pixels = torch.from_numpy(np.concatenate([part.pixels for part in parts])).double() / 255
    queries = torch.from_numpy(held_out.pixels).double() / 255
    every = torch.stack([torch.cdist(queries.flatten(1), dihedral(pixels, form).flatten(1)) for form in range(8)])
    plain = every.amin((0, 2)) / pixels[0].numel() ** 0.5
    assert found["pixels"][0] == pytest.approx(plain.numpy(), abs=1e-9)
    for level in views.levels:
        codes = np.concatenate([part.codes[level].reshape(len(part), -1) for part in parts])
        asked = held_out.codes[level].reshape(len(held_out), -1)
        gaps = (asked[:, None] != codes[None]).mean(2)
        assert found[f"codes {level}"][0] == pytest.approx(gaps.min(1))
        places = [
            (draw, shard, i) for draw, shard in views.files for i in range(views.store.entry("train", draw, shard)["count"])
        ]
        assert found[f"codes {level}"][1].tolist() == [list(places[i]) for i in gaps.argmin(1)], "of equal views the first"


def test_two_ranks_find_the_same_views(run, pools):
    one, (two, again) = gate_cases.nearest(Topology(), str(run)), pools(2).run(gate_cases.nearest, str(run))
    for kind in one:
        for expected, first, second in zip(one[kind], two[kind], again[kind], strict=True):
            assert np.array_equal(expected, first) and np.array_equal(expected, second)


def test_views_are_decoded_once_and_damaged_files_again(run, monkeypatch):
    views = gate_cases.views_of(str(run), Topology())
    path = views._train.paths[0]
    before = path.read_bytes()
    assert path.parent == run / "codes" / "features"
    decoded = []
    monkeypatch.setattr(
        feature_cache,
        "write_arrays",
        lambda path, columns, write=feature_cache.write_arrays: (decoded.append(path), write(path, columns)),
    )
    gate_cases.views_of(str(run), Topology())
    assert not decoded
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    gate_cases.views_of(str(run), Topology())
    assert decoded == [path] and path.read_bytes() == before


def test_a_gate_replaces_copies_and_keeps_the_rest(run, plain, gated):
    rows = list(csv.DictReader((gated / "metadata.csv").open()))
    before = list(csv.DictReader((plain / "metadata.csv").open()))
    assert [row["index"] for row in rows] == [str(i) for i in range(10)]
    assert [row["label"] for row in rows] == [row["label"] for row in before]
    candidates = Candidates(gated).rows()
    first = {int(row["index"]): row for row in candidates if row["attempt"] == "0"}
    for member, row, identity in zip((0, 2, 5), VIEWS, true_ids(run, VIEWS), strict=True):
        assert {"pixels", "codes bottom"} <= set(first[member]["reason"].split("; "))
        for kind in ("pixels", "codes top", "codes bottom"):
            assert (first[member][f"image-{kind}"], float(first[member][f"distance-{kind}"])) == (identity, 0)
        assert first[member]["draw-codes bottom"] == str(row[0])
        name = rows[member]["file"].removeprefix("images/").replace("/", "-")
        rejected = np.asarray(Image.open(gated / "private" / "rejected" / f"000-{name}"))
        view = decode(load_tokenizer(run / "tokenizer", torch.device("cpu"))[0], codes_of(run, [row]), [""])
        assert np.array_equal(rejected, view[0].numpy().transpose(1, 2, 0))
        assert not np.array_equal(rejected, np.asarray(Image.open(gated / rows[member]["file"])))
    for row, old in zip(rows, before, strict=True):  # a sample that passes is the sample without a gate
        if not first[int(row["index"])]["reason"]:
            assert (gated / row["file"]).read_bytes() == (plain / old["file"]).read_bytes()
            assert row["bits_per_token-top"] == old["bits_per_token-top"]
    metrics = gate_metrics(Candidates(gated))
    assert metrics["candidates"] == len(candidates) and metrics["replaced"] >= 3 and metrics["given_up"] == 0
    assert metrics["reasons"] == dict(Counter(r for row in candidates if row["reason"] for r in row["reason"].split("; ")))
    assert metrics["before"]["copies"]["any"]["value"] >= 0.3 and metrics["after"]["copies"]["any"]["value"] == 0
    assert gate_metrics(Candidates(plain)) is None


def test_codes_of_the_samples_decode_to_their_images(gated, net):
    rows = list(csv.DictReader((gated / "metadata.csv").open()))
    kept = Candidates(gated).accepted([int(row["index"]) for row in rows])
    for row, image in zip(rows, decode(net, kept.codes, [row["label"] for row in rows]), strict=True):
        shown = np.asarray(Image.open(gated / row["file"])).astype(int)
        assert np.abs(shown - image.numpy().transpose(1, 2, 0)).max() <= 1  # batches of another size round differently
        assert float(row["bits_per_token-top"]) == pytest.approx(kept.bits["top"][int(row["index"])], abs=1e-4)


@pytest.mark.parametrize("state", ["after the first codes", "after the first verdicts", "before the table"])
def test_a_killed_gate_goes_on_to_the_same_files(run, gated, tmp_path, state):
    folder = tmp_path / "killed"
    shutil.copytree(gated, folder)
    (folder / "metadata.csv").unlink()
    stage = folder / "stage.json"
    stage.write_text(json.dumps(json.loads(stage.read_text()) | {"done": False, "digest": None}))
    private = folder / "private"
    if state != "before the table":
        for path in private.glob("codes/001-*"):
            path.unlink()
        shutil.rmtree(folder / "images")
    if state == "after the first codes":
        for path in (private / "candidates.csv", private / "gate.json", private / "codes" / "000-000004.safetensors"):
            if path.name != "000-000004.safetensors":
                path.unlink()
        shutil.rmtree(private / "rejected")
    if state == "after the first verdicts":
        lines = (private / "candidates.csv").read_text().splitlines(keepends=True)
        (private / "candidates.csv").write_text("".join(lines[:11]))
        assert lines[10].startswith("9,0,")
    assert samples_in(run, folder, GATE) == 0
    assert tree(folder) == tree(gated)


def test_the_number_of_ranks_changes_nothing(run, plain, gated, tmp_path, pools):
    folder = tmp_path / "ranks"
    plant(run, plain, folder)
    digests = pools(2).run(gate_cases.gated, str(run), str(folder), [GATE])
    assert set(digests) == {json.loads((gated / "stage.json").read_text())["digest"]}
    assert tree(folder) == tree(gated)


def test_what_leaves_says_nothing_of_training_images(run, gated):
    identities = {row["image_id"] for row in Packed([run / "shards"]).catalog()}
    public = [path for path in gated.rglob("*") if path.is_file() and "private" not in path.parts and path.name != "stage.json"]
    assert {path.name for path in public} >= {"metadata.csv", "README.md", "contact.png"}
    for path in public:
        content = path.read_bytes()
        assert not any(identity.encode() in content for identity in identities), path
        assert not any(word in content for word in (b"distance", b"neighbour", b"attempt", b"rejected")), path
    assert "Do not share the folder `private/`" in (gated / "README.md").read_text()


def test_a_sample_whose_candidates_are_all_rejected_is_left_out(run, plain, tmp_path, capsys):
    folder = tmp_path / "one"
    plant(run, plain, folder)
    rules = GATE.replace("attempts: 4", "attempts: 1").replace("features: false", f"features: {has_lite(0)}".lower())
    assert samples_in(run, folder, rules) == 0
    rows = list(csv.DictReader((folder / "metadata.csv").open()))
    left_out = {0, 2, 5} & {int(row["index"]) for row in rows}
    assert not left_out and len(list((folder / "images").rglob("*.png"))) == len(rows) <= 7
    assert f"{10 - len(rows)} of 10 samples are left out" in capsys.readouterr().out
    assert gate_metrics(Candidates(folder))["given_up"] == 10 - len(rows)


def test_unlikely_samples_are_rejected(run, tmp_path):
    folder = tmp_path / "likely"
    rules = "sample.gate={pixels: false, features: false, codes: false, likelihood: 0.5, attempts: 50}"
    assert samples_in(run, folder, rules) == 0
    candidates = Candidates(folder)
    limits = candidates.limits()["bits"]
    for row in candidates.rows():
        expected = [f"likelihood {level}" for level in limits if float(row[f"bits_per_token-{level}"]) > limits[level]]
        assert row["reason"] == "; ".join(expected)
    assert any(row["reason"] for row in candidates.rows())


def test_a_generator_without_training_codes_cannot_gate(run, phantoms, tmp_path, capsys):
    published = tmp_path / "published" / "tiny"
    for part in ("tokenizer", "prior-top", "prior-bottom"):
        shutil.copytree(run / part, published / part)
    shutil.copy(run / "config.yaml", published)
    assert samples_in(published, tmp_path / "out", f"runs={published.parent}", "sample.gate={}") == 2
    assert "A published generator cannot gate without its training codes" in capsys.readouterr().err
    assert samples_in(published, tmp_path / "out", f"runs={published.parent}", "-n", "2") == 0
