"""`lesiongen preview` draws the same contact sheet each time, from image files or from packed shards."""

from pathlib import Path

import pytest
from PIL import Image

from hpc.errors import UserError
from lesiongen.experiment import load
from lesiongen.stages.preview import preview
from tests.conftest import DEMO, tiny


def test_preview_before_packing(phantoms, tmp_path):
    config = load(DEMO, tiny(phantoms, tmp_path))
    path = preview(config)
    assert path == tmp_path / "tiny" / "preview.png"
    first = path.read_bytes()
    sheet = Image.open(path)
    assert sheet.mode == "RGB" and sheet.height == 20 + 8 * 34 + 2
    assert preview(config, tmp_path / "again.png").read_bytes() == first
    other = preview(load(DEMO, tiny(phantoms, tmp_path, seed=1)), tmp_path / "other.png")
    assert other.read_bytes() != first


def test_a_second_block_where_encoding_augments_otherwise(phantoms, tmp_path):
    alike = Image.open(preview(load(DEMO, tiny(phantoms, tmp_path)), tmp_path / "a.png", rows=3, columns=2))
    config = load(DEMO, tiny(phantoms, tmp_path, **{"tokenizer.augment.rotate": 20, "data.channels": 1}))
    differing = Image.open(preview(config, tmp_path / "b.png", rows=3, columns=2))
    assert alike.height == differing.height == 20 + 3 * 34 + 2
    assert differing.width - alike.width == 2 * 34 + 2 + 12


def test_preview_of_packed_shards(packed, phantoms, tmp_path):
    own = load(DEMO, tiny(phantoms, packed.parent))
    given = load(DEMO, [*tiny(phantoms, tmp_path), f"inputs.shards=[{packed}]", "data.images=null", "data.metadata=null"])
    first = preview(own, tmp_path / "own.png").read_bytes()
    assert Image.open(tmp_path / "own.png").height == 20 + 8 * 34 + 2
    assert preview(given, tmp_path / "given.png").read_bytes() == first
    # With another size the shards are out of date, so preview reads the image files.
    fresh = load(DEMO, tiny(phantoms, packed.parent, **{"data.size": 48}))
    assert Image.open(preview(fresh, tmp_path / "fresh.png")).height == 20 + 8 * 50 + 2


def test_images_that_cannot_be_read_are_passed_over(tmp_path):
    folder = Path(tmp_path / "images")
    folder.mkdir()
    (folder / "bad.jpg").write_bytes(b"no image")
    settings = [f"runs={tmp_path}", f"data.images={folder}", "data.metadata=null"]
    with pytest.raises(UserError, match="None of the images"):
        preview(load(DEMO, settings))
    Image.new("RGB", (40, 40), "pink").save(folder / "good.png")
    assert Image.open(preview(load(DEMO, settings), rows=5)).height == 20 + 66 + 2
