"""The search by pixels equals a plain comparison, and the thresholds are the held-out images' quantiles."""

import numpy as np
import pytest
import torch

from lesiongen.data.augment import dihedral
from lesiongen.evaluation.intervals import wilson
from lesiongen.evaluation.privacy import copies, nearest
from lesiongen.evaluation.privacy.nearest import Nearest
from lesiongen.evaluation.privacy.views import thumbnails


def noise(number: int, side: int = 32, channels: int = 3, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (number, channels, side, side), generator=rng, dtype=torch.uint8)


def nearest_images(queries: np.ndarray, images: np.ndarray) -> Nearest:
    """Finds the nearest of some thumbnails, by pixels."""
    found = Nearest.empty(len(queries))
    nearest._PixelQueries(queries, torch.device("cpu")).search(found, images, (0, 0), None)
    return found


def lesion_like(number: int, seed: int = 0) -> torch.Tensor:
    """Returns smooth images, which are harder to tell apart than noise."""
    coarse = noise(number, 8, seed=seed).float()
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("form", range(8))
@pytest.mark.parametrize("side", [32, 50])
def test_a_turned_copy_is_found(form, side, monkeypatch):
    monkeypatch.setattr(nearest, "VIEWS", 3)
    images = noise(20, side)
    found = nearest_images(thumbnails(dihedral(images[7:8], form)), thumbnails(images))
    assert found.row.tolist() == [[0, 0, 7]] and found.distance[0] < 1 / 255
    assert torch.equal(dihedral(images[7:8], int(found.form[0])), dihedral(images[7:8], form))


@pytest.mark.parametrize("channels", [1, 3])
def test_distances_equal_a_plain_comparison(channels, monkeypatch):
    monkeypatch.setattr(nearest, "VIEWS", 16)
    monkeypatch.setattr(nearest, "QUERIES", 5)
    images, queries = (lesion_like(number, seed)[:, :channels] for number, seed in ((50, 0), (12, 1)))
    queries = torch.cat([queries, (images[:3].int() + 1).clamp(max=255).to(torch.uint8)])  # almost copies
    found = nearest_images(queries.numpy(), images.numpy())
    forms = [dihedral(images, form).flatten(1).double() / 255 for form in range(8)]
    gaps = torch.stack([torch.cdist(queries.flatten(1).double() / 255, form) for form in forms])
    assert found.distance == pytest.approx(gaps.amin((0, 2)).numpy() / (channels * 32 * 32) ** 0.5)
    assert found.row[:, 2].tolist() == gaps.amin(0).argmin(1).tolist()
    assert found.form.tolist() == gaps.amin(2).argmin(0).tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_equal_codes_are_counted(dtype):
    rng = np.random.default_rng(0)
    queries, views = (rng.integers(0, 3, (number, 600)).astype(dtype) for number in (7, 11))
    matches = nearest._matches(np.ascontiguousarray(queries.T)[..., None], np.ascontiguousarray(views.T))
    assert matches.tolist() == (queries[:, None] == views[None]).sum(2).tolist()


def test_of_several_ranks_the_nearest_and_then_the_first_view_counts():
    parts = []
    for distance, row in (([0.5, 0.2, 0.3], (1, 0, 4)), ([0.4, 0.2, 0.3], (0, 2, 9))):
        parts.append({"pixels": Nearest(np.array(distance), np.array([row] * 3), np.zeros(3, np.int64))})
    combined = nearest._combined(parts)["pixels"]
    assert combined.distance.tolist() == [0.4, 0.2, 0.3]
    assert combined.row.tolist() == [[0, 2, 9]] * 3


def test_one_in_a_hundred_held_out_images_is_below_the_threshold():
    rng = np.random.default_rng(0)
    found = {kind: Nearest(rng.uniform(0.1, 1, 1000), np.zeros((1000, 3)), np.zeros(1000)) for kind in ("pixels", "codes top")}
    samples = {kind: Nearest(np.array([0.0, 0.05, 0.9]), np.zeros((3, 3)), np.zeros(3)) for kind in found}
    result = copies.Copies(samples, found, copies.thresholds(found), views=10, draws=2)
    metrics = result.metrics()
    for values in metrics["kinds"].values():
        assert values["held_out_rate"]["value"] == pytest.approx(0.01)
        assert (values["copies"], values["number"], values["least"], values["median"]) == (2, 3, 0, 0.05)
        assert (values["rate"]["low"], values["rate"]["high"]) == pytest.approx(wilson(2, 3))
    assert metrics["any"]["copies"] == 2 and metrics["any"]["held_out_rate"]["value"] == pytest.approx(0.02, abs=0.002)


def test_duplicates_among_held_out_images_do_not_hide_copies():
    duplicates = Nearest(np.zeros(10), np.zeros((10, 3)), np.zeros(10))
    limits = copies.thresholds({"pixels": duplicates, "features": duplicates})
    assert limits == {"pixels": 0, "features": 0}
    sample = Nearest(np.array([0.001]), np.zeros((1, 3)), np.zeros(1))
    found = copies.below({"pixels": sample, "features": sample}, limits)
    assert (found["pixels"].tolist(), found["features"].tolist()) == ([True], [False])  # less than one grey level


def test_typical_samples_are_no_copies():
    """They are nearer to the training views than any held-out image is, but as near to images that were never seen."""
    rng = np.random.default_rng(0)
    view, unseen = (rng.uniform(4, 6, 1000) for _ in range(2))
    held_out = Nearest(view, np.zeros((1000, 3)), np.zeros(1000), unseen)
    typical = Nearest(view / 4, np.zeros((1000, 3)), np.zeros(1000), unseen / 4)
    copied = Nearest(np.full(3, 1.0), np.zeros((3, 3)), np.zeros(3), np.full(3, 5.0))
    limits = copies.thresholds({"features": held_out})
    assert copies.below({"features": typical}, limits)["features"].mean() == pytest.approx(0.01, abs=0.002)
    assert copies.below({"features": copied}, limits)["features"].all()


def test_an_image_that_equals_both_is_no_copy():
    both = Nearest(np.array([0.0, 0.0, 0.5]), np.zeros((3, 3)), np.zeros(3), np.array([0.0, 0.5, 0.0]))
    assert both.closeness[:2].tolist() == [1, 0] and both.closeness[2] > 1e6
