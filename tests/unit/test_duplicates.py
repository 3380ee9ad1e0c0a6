"""Near-duplicates: rescanned copies are found, other lesions are not, and appended images are compared with all images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from lesiongen.data import images
from lesiongen.ingest import duplicates, phantom
from lesiongen.ingest.duplicates import Pair


@pytest.fixture(scope="module")
def drawings() -> list[Image.Image]:
    """Returns 15 drawings, 3 of each class except two: naevi and dermatofibromas are drawn with too little detail to differ."""
    labels = [label for label in phantom.LABELS if label not in ("nv", "df")]
    return [Image.fromarray(phantom.draw(label, lesion, 0, 160)) for label in labels for lesion in range(3)]


def rescan(image: Image.Image, scale: float = 0.9, shift: int = 5, angle: float = 4, gain: float = 0.8) -> Image.Image:
    """Returns a copy that is rotated, cropped off-centre, smaller, darker, and a JPEG of low quality."""
    side = round(image.width * scale)
    first = (image.width - side) // 2 + shift
    copy = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor="pink").crop((first, first, first + side, first + side))
    buffer = io.BytesIO()
    ImageEnhance.Brightness(copy.resize((120, 120))).enhance(gain).save(buffer, "JPEG", quality=50)
    return Image.open(buffer).convert("RGB")


def find(pictures: list[Image.Image], **more) -> list[Pair]:
    thumbnails = np.stack([duplicates.thumbnail(picture) for picture in pictures])
    return duplicates.find_pairs([f"{i:03d}" for i in range(len(pictures))], thumbnails, progress=False, **more)


def names(pairs: list[Pair]) -> set[tuple[str, str]]:
    return {(pair.a, pair.b) for pair in pairs}


@pytest.mark.parametrize("copy", [rescan, ImageOps.mirror, lambda x: x.rotate(90), lambda x: rescan(x.rotate(180), 0.95, 0)])
def test_copies_are_found_and_nothing_else(drawings, copy):
    count = len(drawings)
    pairs = find(drawings + [copy(drawing) for drawing in drawings[::3]])
    assert names(pairs) == {(f"{3 * i:03d}", f"{count + i:03d}") for i in range(len(drawings[::3]))}
    assert all(duplicates.THRESHOLD <= pair.score <= 1.0001 for pair in pairs)
    assert pairs == sorted(pairs, key=lambda pair: -pair.score)


def test_find_repeats_itself(drawings):
    pictures = [*drawings[:6], rescan(drawings[2])]
    assert find(pictures, threshold=0.3) == find(pictures, threshold=0.3) != []


def test_old_images_are_not_compared_again(drawings):
    pictures = [*drawings[:6], rescan(drawings[0]), drawings[0], drawings[3]]
    assert names(find(pictures)) == {("000", "006"), ("000", "007"), ("003", "008"), ("006", "007")}
    assert names(find(pictures, new_from=8)) == {("003", "008")}
    assert names(find(pictures, new_from=7)) == {("003", "008"), ("000", "007"), ("006", "007")}
    assert find(pictures, new_from=len(pictures)) == find(pictures[:1]) == []


def test_flat_images_match_nothing():
    rng = np.random.default_rng(0)
    flat = [Image.new("RGB", (100, 80), colour) for colour in ("black", "white", "pink", "pink")]
    noisy = [Image.fromarray(rng.integers(198, 202, (64, 64, 3), dtype=np.uint8)) for _ in range(4)]
    assert find(flat + noisy) == []


def test_thumbnail_is_the_central_square():
    wide = Image.new("RGB", (300, 100), "black")
    wide.paste("white", (100, 0, 150, 100))
    thumbnail = duplicates.thumbnail(wide)
    assert thumbnail.shape == (64, 64) and thumbnail.dtype == np.uint8
    assert (thumbnail[:, :32] == 255).all() and (thumbnail[:, 32:] == 0).all()
    assert np.array_equal(duplicates.thumbnail(wide.convert("L")), thumbnail)


def test_wrong_input_is_refused():
    thumbnails = np.zeros((2, 64, 64), np.uint8)
    for ids, array in ((["a"], thumbnails), (["a", "a"], thumbnails), (["a", "b"], thumbnails.astype(float))):
        with pytest.raises(ValueError, match="ids"):
            duplicates.find_pairs(ids, array, progress=False)


def test_sheet_shows_pairs(drawings):
    pairs = [Pair("000", "001", 0.9)] * 6
    sheet = duplicates.draw_pairs(pairs, lambda name: drawings[int(name)], limit=5, side=40)
    assert sheet.dtype == torch.uint8 and sheet.shape == (3, 2 * 56 + 2, 4 * 82 + 2)
    assert duplicates.draw_pairs([], lambda name: drawings[0]).shape[0] == 3


def test_rescanned_photographs_are_found(real_images):
    """Images 0000157 to 0000232 of the ISIC archive come again, rescanned, among 0014600 to 0015500. A person found 48."""

    def old(name: str) -> bool:
        return 157 <= int(name[5:]) <= 232

    paths = sorted((real_images / "isic-cc0" / "images").glob("*.jpg"))
    paths = [path for path in paths if old(path.stem) or 14600 <= int(path.stem[5:]) <= 15500]
    if not any(old(path.stem) for path in paths):
        pytest.skip("the ISIC images are not on this machine")
    thumbnails = np.stack([duplicates.thumbnail(images.decode(path.read_bytes())) for path in paths])
    pairs = duplicates.find_pairs([path.stem for path in paths], thumbnails, progress=False)
    across = [pair for pair in pairs if old(pair.a) and not old(pair.b)]
    assert len(across) >= 40 and len(pairs) - len(across) <= 3, pairs
