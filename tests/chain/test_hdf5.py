"""SLICE-3D (ISIC 2024) as Kaggle distributes it: train-image.hdf5, one record of JPEG bytes for each id, beside a table."""

import csv
import io
import sys

import h5py
import numpy as np
import pytest
from PIL import Image

from hpc import errors
from launch.__main__ import main
from lesiongen.data import hdf5
from lesiongen.data.packed import Packed
from lesiongen.ingest.folders import count_images

NUMBER = 48


@pytest.fixture
def kaggle(tmp_path):
    """A folder with train-image.hdf5 and train-metadata.csv of 48 tiles: 24 lesions of 12 patients."""
    folder = tmp_path / "isic-2024-challenge"
    folder.mkdir()
    with h5py.File(folder / "train-image.hdf5", "w") as file:
        for i in range(NUMBER):
            buffer = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 255, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "JPEG")
            content = buffer.getvalue()
            # Kaggle's records are numpy voids; other writers store arrays of bytes or byte strings.
            values = (np.void(content), np.frombuffer(content, np.uint8), np.bytes_(content))
            file.create_dataset(f"ISIC_{i:07d}", data=values[i % 3])
    header = ["isic_id", "target", "patient_id", "age_approx", "lesion_id", "iddx_full", "iddx_1", "iddx_2", "iddx_3"]
    rows = [
        [f"ISIC_{i:07d}", "0", f"IP_{i // 4}", "40", f"IL_{i // 2}", "x", "Benign", "", ("Nevus", "")[i % 2]]
        for i in range(NUMBER)
    ]
    with open(folder / "train-metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


def pack(kaggle, images, out, *more):
    given = ["--images", str(images), "--metadata", str(kaggle / "train-metadata.csv"), "--out", str(out), "--size", "16"]
    return main(["pack", *given, "data.val=0.2", "data.test=0.2", *more])


@pytest.mark.parametrize("named", ["file", "folder"])
def test_records_are_packed_as_files_are(kaggle, tmp_path, named, capsys):
    images = kaggle / "train-image.hdf5" if named == "file" else kaggle
    assert pack(kaggle, images, tmp_path / "s", "data.max_rejected=0") == 0
    rows = list(Packed([tmp_path / "s"]).catalog())
    assert len(rows) == NUMBER == count_images(str(images))
    assert {row["dx"] for row in rows} == {"Nevus", "Benign"} and {row["patient"] for row in rows} == {
        f"IP_{i}" for i in range(12)
    }
    assert "train-metadata.csv: SLICE-3D 2024, 48 rows" in capsys.readouterr().out
    # The same bytes as from files.
    for i in range(NUMBER):
        (tmp_path / "files").mkdir(exist_ok=True)
        name = f"ISIC_{i:07d}"
        (tmp_path / "files" / f"{name}.jpg").write_bytes(hdf5.read_bytes(kaggle / "train-image.hdf5" / name))
    assert pack(kaggle, tmp_path / "files", tmp_path / "t", "data.max_rejected=0") == 0
    for shard in (tmp_path / "s").glob("*.tar"):
        assert shard.read_bytes() == (tmp_path / "t" / shard.name).read_bytes()


def test_bad_records_are_rejected_and_image_files_come_first(kaggle, tmp_path, capsys):
    with h5py.File(kaggle / "train-image.hdf5", "a") as file:
        del file["ISIC_0000003"], file["ISIC_0000004"]
        file["ISIC_0000003"] = np.void(b"no image")
        file.create_group("ISIC_0000004")
    assert pack(kaggle, kaggle, tmp_path / "s") == 0
    rejected = (tmp_path / "s" / "rejected.jsonl").read_text()
    assert "ISIC_0000003" in rejected and "ISIC_0000004" in rejected and rejected.count("\n") == 2
    (kaggle / "image").mkdir()
    (kaggle / "image" / "ISIC_0000000.jpg").write_bytes(hdf5.read_bytes(kaggle / "train-image.hdf5" / "ISIC_0000000"))
    capsys.readouterr()
    assert pack(kaggle, kaggle, tmp_path / "t") == errors.USAGE  # one image is too few; the records are not mixed in
    assert "1 HDF5 files beside image files left out" in capsys.readouterr().out


def test_a_damaged_file_and_a_missing_library_are_one_line(kaggle, tmp_path, monkeypatch, capsys):
    (tmp_path / "x.hdf5").write_bytes(b"\x89HDF")
    assert pack(kaggle, tmp_path / "x.hdf5", tmp_path / "s") == errors.USAGE
    assert "cannot be read as HDF5" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "h5py", None)
    hdf5._open.cache_clear()
    assert pack(kaggle, kaggle, tmp_path / "s") == errors.USAGE
    said = capsys.readouterr().err
    assert "needs h5py. Install it: pip install 'lesiongen[hdf5]'" in said and "Traceback" not in said
