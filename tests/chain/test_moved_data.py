"""The shards are known by the contents of the images and tables, not by their paths; what has changed since is told."""

import json
import os
import shutil
from pathlib import Path

import pytest

from hpc import errors
from launch.__main__ import main
from lesiongen.data.packed import Packed
from lesiongen.ingest import contents
from tests.conftest import DEMO, tiny


@pytest.fixture
def data(phantoms, tmp_path) -> Path:
    """A copy of the drawn lesions, packed into the run tmp_path/runs/tiny."""
    shutil.copytree(phantoms, tmp_path / "data")
    assert main(["pack", DEMO, *tiny(tmp_path / "data", tmp_path / "runs")]) == 0
    return tmp_path / "data"


@pytest.fixture
def again(data, tmp_path, capsys):
    """again("key=value", …) packs again with other settings and returns the exit code and the output."""

    def call(*overrides: str, verb: tuple[str, ...] = ("pack", DEMO)) -> tuple[int, str]:
        capsys.readouterr()
        code = main([*verb, *tiny(data, tmp_path / "runs"), *overrides])
        output = capsys.readouterr()
        return code, output.out + output.err

    return call


def shards(tmp_path: Path) -> dict[str, bytes]:
    folder = tmp_path / "runs" / "tiny" / "shards"
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith("files")}


def added(data: Path, number: int = 3) -> list[str]:
    """Adds copies of images under new names to the folder. Returns the rows of a table for them."""
    lines = (data / "metadata.csv").read_text().splitlines()
    rows = []
    for line in lines[1 : 1 + number]:
        image = next(word for word in line.split(",") if (data / "images" / f"{word}.jpg").exists())
        shutil.copy(data / "images" / f"{image}.jpg", data / "images" / f"new_{image}.jpg")
        rows.append(line.replace(image, f"new_{image}"))
    return rows


@pytest.mark.parametrize("how", ["moved", "renamed", "copied", "table moved", "table renamed", "both moved"])
def test_the_same_contents_elsewhere_are_the_same_data(data, again, tmp_path, how, monkeypatch):
    before, images, table = shards(tmp_path), data / "images", data / "metadata.csv"
    new_images = {"moved": tmp_path / "else" / "images", "both moved": tmp_path / "else" / "images"}.get(how, images)
    new_images = {"renamed": data / "photographs", "copied": data / "copy"}.get(how, new_images)
    new_table = {"table moved": tmp_path / "else" / "metadata.csv", "table renamed": data / "t.csv"}.get(how, table)
    new_table = tmp_path / "else" / "metadata.csv" if how == "both moved" else new_table
    (tmp_path / "else").mkdir()
    if how == "copied":
        shutil.copytree(images, new_images, copy_function=shutil.copy)  # with times of its own
    elif new_images != images:
        images.rename(new_images)
    if new_table != table:
        table.rename(new_table)
    overrides = [f"data.images={new_images}", f"data.metadata={new_table}"]
    code, said = again(*overrides)
    assert code == 0 and "done already" in said and "WARNING" not in said
    assert shards(tmp_path) == before
    # The second time, no image is read.
    read = []
    monkeypatch.setattr(contents, "_digest", lambda path: read.append(path) or "")
    assert again(*overrides)[0] == 0 and not read


def test_other_contents_elsewhere_are_other_data(data, again, tmp_path):
    shutil.copytree(data / "images", tmp_path / "other")
    victim = next((tmp_path / "other").iterdir())
    content = bytearray(victim.read_bytes())
    content[-3] ^= 1
    victim.write_bytes(content)
    code, said = again(f"data.images={tmp_path / 'other'}")
    assert code == errors.USAGE and "was made with other settings or inputs: images" in said


def test_a_changed_table_is_a_difference(data, again):
    text = (data / "metadata.csv").read_text()
    (data / "metadata.csv").write_text(text.replace("mel", "nv", 1))
    code, said = again()
    assert code == errors.USAGE and "as it was when packed (add new rows with pack --append)" in said
    os.utime(data / "metadata.csv")
    (data / "metadata.csv").write_text(text)
    assert again()[0] == 0, "the same content at another time is the same"
    (data / "metadata.csv").unlink()
    assert again()[0] == 0, "shards do not need their table any more"


def test_added_images_are_told_and_appended(data, again, tmp_path):
    rows = added(data)
    for verb in (("pack", DEMO), ("status", str(tmp_path / "runs" / "tiny"))):
        code, said = (0, again()[1]) if verb[0] == "pack" else (0, status(tmp_path))
        assert code == 0 and "images since packing: 3 added" in said and "pack --append" in said
    with open(data / "metadata.csv", "a") as file:
        file.write("\n".join(rows) + "\n")
    assert again()[0] == errors.USAGE
    number = sum(sum(c.values()) for c in Packed([tmp_path / "runs" / "tiny" / "shards"]).counts.values())
    assert again("--append")[0] == 0
    assert sum(sum(c.values()) for c in Packed([tmp_path / "runs" / "tiny" / "shards"]).counts.values()) == number + 3
    code, said = again()
    assert code == 0 and "since packing" not in said
    (data / "images").rename(data / "moved")
    assert again(f"data.images={data / 'moved'}")[0] == 0


def status(tmp_path: Path) -> str:
    from launch.status import format_status
    from lesiongen.experiment import load

    return format_status(load(str(tmp_path / "runs" / "tiny")))


def test_changed_and_removed_images_are_told(data, again, tmp_path):
    images = sorted((data / "images").iterdir())
    images[0].unlink()
    shutil.copy(images[1], images[2])
    os.utime(images[3])
    code, said = again()
    assert code == 0 and "WARNING: images since packing: 1 changed, 1 removed" in said
    shutil.rmtree(data / "images")
    assert again()[0] == 0


def test_a_set_without_lists_is_compared_by_its_paths(data, again, tmp_path):
    (tmp_path / "runs" / "tiny" / "shards" / "files.json").unlink()
    added(data)
    code, said = again()
    assert code == 0 and "since packing" not in said
    (data / "metadata.csv").write_text((data / "metadata.csv").read_text() + "\n")
    assert again()[0] == 0
    (data / "images").rename(data / "moved")
    assert again(f"data.images={data / 'moved'}")[0] == errors.USAGE
    assert again("--append", f"data.images={data / 'moved'}")[0] == 0
    assert again()[0] == 0, "the recorded path is still the set's own"


def test_a_damaged_list_is_none(data, again, tmp_path):
    path = tmp_path / "runs" / "tiny" / "shards" / "files.json"
    assert len(json.loads(path.read_text())["images"]) > 80
    path.write_text("{")
    assert again()[0] == 0
