"""Phantom lesions: drawings depend only on their arguments, views of a lesion are alike, classes differ, writing can resume."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lesiongen.ingest import phantom


def _colours(rgb_HWC: np.ndarray) -> np.ndarray:
    """Returns the mean colour of the middle, where the lesion is, and the median colour of the margin, which is skin, [6]."""
    size = len(rgb_HWC)
    middle = rgb_HWC[size // 4 : -size // 4, size // 4 : -size // 4].mean((0, 1))
    margin = np.concatenate([rgb_HWC[:3], rgb_HWC[-3:], rgb_HWC[:, :3].swapaxes(0, 1), rgb_HWC[:, -3:].swapaxes(0, 1)])
    return np.concatenate([middle, np.median(margin, (0, 1))])


def _histogram(rgb_HWC: np.ndarray) -> np.ndarray:
    """Returns the square roots of the shares of 4×4×4 colours, [64]."""
    bins = rgb_HWC.astype(int) // 64 @ np.array([16, 4, 1])
    return np.sqrt(np.bincount(bins.ravel(), minlength=64) / bins.size)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("label", phantom.LABELS)
def test_draw_is_a_pure_function(label):
    first = phantom.draw(label, 3, 1, 48)
    assert first.shape == (48, 48, 3) and first.dtype == np.uint8
    np.random.seed(0)
    assert np.array_equal(first, phantom.draw(label, 3, 1, 48))
    for other in ({"lesion": 4}, {"view": 0}, {"seed": 1}):
        arguments = {"label": label, "lesion": 3, "view": 1, "size": 48} | other
        assert not np.array_equal(first, phantom.draw(**arguments)), other


@pytest.mark.parametrize("label", phantom.LABELS)
def test_size_changes_the_resolution_only(label):
    for lesion in range(4):
        fine, coarse = phantom.draw(label, lesion, 0, 128), phantom.draw(label, lesion, 0, 64)
        reduced = np.asarray(Image.fromarray(fine).reduce(2), float)
        assert np.abs(reduced - coarse).mean() < 3


def test_views_of_a_lesion_are_alike_but_not_copies():
    for label in phantom.LABELS:
        seen = np.stack([[_colours(phantom.draw(label, n, view, 32)) for view in (0, 1)] for n in range(20)])
        between = np.linalg.norm(seen[:, None, 0] - seen[None, :, 1], axis=-1)  # [lesion, other lesion]
        own, others = np.diag(between), between[~np.eye(20, dtype=bool)]
        assert own.min() > 0
        assert np.median(own) < 0.7 * np.median(others), label  # the ratio is about 1 for unrelated drawings


def test_nearest_class_mean_tells_the_classes_apart():
    """Compares colours only, not shapes. Chance is 1/7."""
    train = [np.mean([_histogram(phantom.draw(label, n, 0, 32)) for n in range(20)], 0) for label in phantom.LABELS]
    hits = []
    for truth, label in enumerate(phantom.LABELS):
        for n in range(20, 40):
            distances = np.linalg.norm(np.stack(train) - _histogram(phantom.draw(label, n, 0, 32)), axis=1)
            hits.append(distances.argmin() == truth)
    assert np.mean(hits) > 0.6


def test_hair_rulers_and_rims_are_the_exception():
    """The border of most pictures is skin; few have a dark rim. Skin tones range from light to dark."""
    rims, tones = 0, []
    for n in range(150):
        rgb_HWC = phantom.draw("nv", n, 0, 24)
        rims += rgb_HWC[[0, 0, -1, -1], [0, -1, 0, -1]].max() < 40
        tones.append(np.median(rgb_HWC[[0, -1]].mean(-1)))
    assert 0 < rims < 20
    tones = np.array(tones)[np.array(tones) > 60]
    assert np.quantile(tones, 0.95) - np.quantile(tones, 0.05) > 50


def test_write_gives_a_table_like_ham10000s(tmp_path):
    path = phantom.write(tmp_path, lesions_per_class=15, size=16, progress=False)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert path == tmp_path / "metadata.csv"
    columns = "lesion_id,image_id,dx,age,sex,localization,copyright_license,attribution"
    assert ",".join(rows[0]) == columns
    assert {row["image_id"] + ".jpg" for row in rows} == {p.name for p in (tmp_path / "images").iterdir()}
    assert len({row["image_id"] for row in rows}) == len(rows)
    lesions = Counter((row["lesion_id"], row["dx"], row["age"], row["sex"], row["localization"]) for row in rows)
    assert len(lesions) == len({row["lesion_id"] for row in rows}) == 15 * 7  # all views of a lesion have the same facts
    assert set(lesions.values()) == {1, 2, 3} and 1.7 < np.mean(list(lesions.values())) < 2.3
    assert Counter(dx for _, dx, *_ in lesions) == {label: 15 for label in phantom.LABELS}
    ages = [row["age"] for row in rows]
    assert "" in ages and all(0 < float(age) < 90 for age in ages if age)
    assert "unknown" in {row["localization"] for row in rows}
    assert {(row["copyright_license"], row["attribution"]) for row in rows} == {("CC-0", "lesiongen phantom")}


def test_the_file_is_the_drawing(tmp_path):
    phantom.write(tmp_path, lesions_per_class=1, size=64, seed=5, progress=False)
    for label in phantom.LABELS:
        with Image.open(tmp_path / "images" / f"PHANTOM5_{label}_00000_0.jpg") as image:
            drawn = phantom.draw(label, 0, 0, 64, seed=5).astype(float)
            assert np.abs(np.asarray(image, float) - drawn).mean() < 4


def test_write_is_idempotent_and_completes(tmp_path):
    arguments = {"lesions_per_class": 2, "size": 32, "progress": False}
    phantom.write(tmp_path / "whole", **arguments)
    whole = _bytes(tmp_path / "whole")
    phantom.write(tmp_path / "whole", **arguments)
    assert _bytes(tmp_path / "whole") == whole

    folder = tmp_path / "half"
    phantom.write(folder, lesions_per_class=1, size=32, progress=False)
    (folder / "metadata.csv").unlink()
    missing, cut, other, intact = sorted((folder / "images").iterdir())[:4]
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:200])
    Image.new("RGB", (48, 48)).save(other)
    before = intact.stat().st_mtime_ns
    phantom.write(folder, **arguments)
    assert _bytes(folder) == whole
    assert intact.stat().st_mtime_ns == before  # an intact image is not drawn again


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"melanoma.*akiec, bcc"):
        phantom.draw("melanoma", 0, 0)
    with pytest.raises(ValueError, match="≥ 0"):
        phantom.draw("mel", -1, 0)
    with pytest.raises(ValueError, match="16 px"):
        phantom.draw("mel", 0, 0, size=8)
    with pytest.raises(ValueError, match="at least 1"):
        phantom.write(tmp_path, lesions_per_class=0, progress=False)
