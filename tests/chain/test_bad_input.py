"""Each mistake in the input gives one clear message and exit code 2, or a listed rejection. Earlier results stay unchanged."""

import csv
import io
import json
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from PIL import Image

from launch.__main__ import main
from tests.conftest import DEMO, tiny

HEADER = ["image_id", "lesion_id", "dx"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Returns a folder with 60 small images of two classes and their CSV."""
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(60):
        Image.new("RGB", (20, 24), (i * 4, 100, 50)).save(tmp_path / "images" / f"i{i}.jpg")
        rows.append([f"i{i}", f"l{i // 2}", "nv" if i % 3 else "mel"])
    write_csv(tmp_path / "m.csv", HEADER, rows)
    return tmp_path


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def rows_of(folder: Path) -> list[list[str]]:
    return list(csv.reader((folder / "m.csv").open()))[1:]


def pack(folder: Path, *more: str, images: str = "images", metadata: str = "m.csv") -> int:
    base = [
        "pack",
        "--images",
        str(folder / images),
        "--metadata",
        str(folder / metadata),
        "--out",
        str(folder / "out" / "shards"),
    ]
    return main([*base, "--size", "16", "data.val=0.2", "data.test=0.2", "data.processes=1", *more])


def rejected(folder: Path) -> dict[str, str]:
    lines = (folder / "out" / "shards" / "rejected.jsonl").read_text().splitlines()
    return {entry["image"]: entry["reason"] for entry in map(json.loads, lines)}


def refused(capsys, *words: str) -> None:
    """Checks that stderr holds exactly one message of the command, all these words, and no traceback."""
    error = capsys.readouterr().err
    assert all(w in error for w in words), error
    assert "Traceback" not in error
    message = [line for line in error.splitlines() if line.startswith("lesiongen: ")]
    assert len(message) == 1, error


def test_good_input_packs(folder):
    assert pack(folder) == 0
    manifest = json.loads((folder / "out" / "shards" / "manifest.json").read_text())
    assert sum(s["count"] for s in manifest["shards"]) == 60
    assert manifest["classes"] == ["mel", "nv"]
    assert main(["verify", str(folder / "out")]) == 0


def test_packing_twice_gives_the_same_bytes(folder):
    assert pack(folder) == 0
    first = {p.name: p.read_bytes() for p in (folder / "out" / "shards").glob("*[rs]*") if p.name not in ("stage.json",)}
    shutil.rmtree(folder / "out")
    assert pack(folder, "data.processes=2") == 0
    assert {p.name: p.read_bytes() for p in (folder / "out" / "shards").glob("*[rs]*") if p.name != "stage.json"} == first


@pytest.mark.parametrize(
    ("images", "metadata", "words"),
    [("nowhere", "m.csv", ["nowhere", "does not exist"]), ("images", "no.csv", ["no.csv", "No such file"])],
)
def test_missing_paths(folder, capsys, images, metadata, words):
    assert pack(folder, images=images, metadata=metadata) == 2
    refused(capsys, *words)


def test_an_empty_folder(folder, capsys):
    (folder / "empty").mkdir()
    assert pack(folder, images="empty") == 2
    refused(capsys, "holds no images")


def test_a_csv_without_the_id_column(folder, capsys):
    write_csv(folder / "m.csv", ["picture", "dx"], [["i0", "nv"]])
    assert pack(folder) == 2
    refused(capsys, "no known id column", "picture, dx", "data.columns.image=picture")


def test_other_columns_can_be_mapped(folder):
    write_csv(folder / "m.csv", ["picture", "what"], [[r[0] + ".jpg", r[2]] for r in rows_of(folder)])
    assert pack(folder, "data.columns.image=picture", "data.columns.dx=what") == 0


def test_a_binary_csv(folder, capsys):
    (folder / "m.csv").write_bytes(b"\xff\xfe\x00image_id" * 50)
    assert pack(folder) == 2
    refused(capsys, "not a CSV file in UTF-8")


def test_rows_and_images_that_do_not_match_are_counted(folder, capsys):
    write_csv(folder / "m.csv", HEADER, [*rows_of(folder)[1:], ["ghost", "l", "nv"], ["i5", "l", "nv"]])
    assert pack(folder) == 0
    assert rejected(folder) == {
        "ghost": "no image file for this row",
        "i0": "no row in the metadata",
        "i5": "listed again on line 62",
    }


def test_too_many_rejections_stop_the_stage(folder, capsys):
    write_csv(folder / "m.csv", HEADER, rows_of(folder)[:40])
    assert pack(folder) == 2
    refused(capsys, "20 of 60", "max_rejected=0.05", "rejected.jsonl")
    assert len(rejected(folder)) == 20
    assert not (folder / "out" / "shards" / "manifest.json").exists()
    assert pack(folder, "data.max_rejected=0.5") == 0


def bomb(side: int) -> bytes:
    """Returns a PNG of 60 bytes that claims side × side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_broken_images_are_rejected_and_listed(folder):
    whole = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(whole, "JPEG")
    broken = {
        "i1": whole.getvalue()[: len(whole.getvalue()) // 2],
        "i2": b"this is no image",
        "i3": b"",
        "i4": bomb(50_000),
        "i5": bomb(9_000),
    }
    for name, content in broken.items():
        (folder / "images" / f"{name}.jpg").write_bytes(content)
    assert pack(folder, "data.max_rejected=0.1") == 0
    found = rejected(folder)
    assert found.keys() == broken.keys()
    assert "decompression bomb" in found["i4"]
    assert "9000×9000 pixels are more than" in found["i5"]
    assert "not a JPEG" in found["i2"]


def test_odd_but_good_images_are_kept(folder):
    Image.new("CMYK", (30, 30)).save(folder / "images" / "i1.jpg")
    Image.new("L", (30, 30)).save(folder / "images" / "i2.jpg")
    (folder / "images" / "i3.jpg").unlink()
    Image.new("P", (30, 30)).save(folder / "images" / "i3.png")
    assert pack(folder) == 0
    assert not rejected(folder) if (folder / "out" / "shards" / "rejected.jsonl").exists() else True


def test_an_unknown_label_is_counted(folder, capsys):
    rows = rows_of(folder)
    rows[7][2] = "tulip"
    write_csv(folder / "m.csv", HEADER, rows)
    assert pack(folder, "data.classes=[mel,nv]") == 0
    assert rejected(folder) == {"i7": "unknown label 'tulip'"}


def test_an_empty_class(folder, capsys):
    assert pack(folder, "data.classes=[mel,nv,df]") == 2
    refused(capsys, "class 'df'", "no image")


def test_an_empty_split(folder, capsys):
    assert pack(folder, "data.val=0.001") == 2
    refused(capsys, "val split would be empty", "30 lesions")


def test_two_images_with_one_id(folder, capsys):
    (folder / "images" / "sub").mkdir()
    shutil.copy(folder / "images" / "i2.jpg", folder / "images" / "sub" / "i1.jpg")
    assert pack(folder) == 2
    refused(capsys, "share the id 'i1'")


def test_no_csv_means_one_class(folder):
    out = ["--out", str(folder / "out" / "shards"), "--size", "16"]
    assert main(["pack", "--images", str(folder / "images"), *out, "data.val=0.2", "data.test=0.2"]) == 0
    manifest = json.loads((folder / "out" / "shards" / "manifest.json").read_text())
    assert manifest["classes"] == ["lesion"]
    assert sum(manifest["groups"].values()) == 60


def test_other_settings_for_finished_shards_are_refused(folder, capsys):
    assert pack(folder) == 0
    before = (folder / "out" / "shards" / "manifest.json").read_bytes()
    assert pack(folder, "data.quality=50") == 2
    refused(capsys, "quality: 95 → 50", "--fresh")
    assert (folder / "out" / "shards" / "manifest.json").read_bytes() == before


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a small file system, which the test fills up. Yields (path, resize)."""

    def mount(*options: str) -> int:
        return subprocess.run(["mount", "-t", "tmpfs", "-o", *options, "tmpfs", str(path)], capture_output=True).returncode

    path = tmp_path / "disk"
    path.mkdir()
    if not shutil.which("mount") or mount("size=96k"):
        pytest.skip("a small file system needs root and mount")
    yield path, lambda size: mount(f"remount,size={size}")
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_and_then_a_larger_one(folder, small_disk, capfd):
    disk, resize = small_disk
    arguments = [
        "pack",
        "--images",
        str(folder / "images"),
        "--metadata",
        str(folder / "m.csv"),
        "--out",
        str(disk / "r" / "shards"),
    ]
    arguments += ["--size", "16", "data.val=0.2", "data.test=0.2"]
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert "the disk is full" in error
    assert "Traceback" not in error
    assert not (disk / "r" / "shards" / "manifest.json").exists()
    assert resize("8m") == 0
    assert main(arguments) == 0


@pytest.mark.parametrize("size", ["400k", "700k"])
def test_a_disk_that_fills_up_in_training(packed, phantoms, small_disk, capfd, size):
    """The disk fills up while a checkpoint or a log is written. When there is room again, the same command must resume."""
    disk, resize = small_disk
    assert resize(size) == 0
    more = [f"inputs.shards={packed}", "tokenizer.train.save_every=32", "tokenizer.train.samples=96"]
    arguments = ["train", "tokenizer", DEMO, *tiny(phantoms, disk), *more]
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert "the disk is full" in error
    assert resize("64m") == 0
    assert main(arguments) == 0


def test_usage(folder, capsys):
    assert main(["pack", "--images", str(folder)]) == 2
    assert main(["status", str(folder)]) == 2
    assert main(["verify", str(folder / "images")]) == 2
    refused_lines = capsys.readouterr().err.count("lesiongen: ")
    assert refused_lines == 3
    with pytest.raises(SystemExit) as usage:
        main(["fly"])
    assert usage.value.code == 2
