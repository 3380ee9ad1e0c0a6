"""The rulers fail where they must: on real images that are blurred, noisy, mislabelled, repeated, or lack a class."""

import csv

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as T

from lesiongen.data import images
from lesiongen.data.augment import centre
from lesiongen.data.efficientnet_lite import has_lite
from lesiongen.evaluation import distances
from lesiongen.evaluation.backbone import Backbone, FeaturesConfig, load_backbone
from lesiongen.evaluation.fidelity import diversity
from lesiongen.evaluation.intervals import balanced_accuracy
from lesiongen.evaluation.likeness import draw_repeated
from tests.conftest import SHARED

pytestmark = [
    pytest.mark.skipif(not (SHARED / "ham10000").is_dir(), reason="needs the real images in ../shared/data"),
    pytest.mark.skipif(not has_lite(0), reason="needs the weights of EfficientNet-Lite0"),
]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(FeaturesConfig(), lambda: None)


@pytest.fixture(scope="module")
def real() -> tuple[torch.Tensor, np.ndarray]:
    """420 real images at 64 px, 60 of each class, one of each lesion, in random order; and their labels."""
    with open(SHARED / "ham10000" / "mini.csv", newline="") as file:
        rows = {row["lesion_id"]: row for row in csv.DictReader(file)}.values()
    rows = [list(rows)[i] for i in np.random.default_rng(0).permutation(len(rows))]
    classes = sorted({row["dx"] for row in rows})
    pictures = [images.read(SHARED / "ham10000" / "images" / f"{row['image_id']}.jpg") for row in rows]
    tensors = [centre(images.to_tensor(images.resize_short_side(picture, 64)), 64) for picture in pictures]
    return torch.stack(tensors), np.array([classes.index(row["dx"]) for row in rows])


@pytest.fixture(scope="module")
def halves(backbone: Backbone, real) -> tuple[np.ndarray, np.ndarray]:
    """Features of the two halves of the images."""
    features = backbone.over(real[0].split(64))
    return features[::2], features[1::2]


def compared(generated: np.ndarray, halves) -> dict:
    return distances.compare(generated, halves[1], np.arange(len(generated)), np.arange(len(halves[1])))


def values(found: list[dict], name: str) -> list[float]:
    return [figures[name]["value"] for figures in found]


def test_the_floor_contains_zero(halves):
    floor = compared(halves[0], halves)
    assert floor["kid"]["low"] < 0 < floor["kid"]["high"]
    assert min(floor[name]["value"] for name in ("precision", "recall", "coverage")) > 0.7


@pytest.mark.parametrize("harm", ["blur", "noise"])
def test_distance_grows_with_blur_and_noise(harm: str, backbone: Backbone, real, halves):
    pictures = real[0][::2]

    def harmed(strength: int) -> torch.Tensor:
        if harm == "blur":
            return T.gaussian_blur(pictures, [2 * strength + 1] * 2, [0.6 * strength] * 2)
        noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
        return (pictures + 6 * strength * noise).clamp(0, 255).to(torch.uint8)

    found = [compared(backbone.over(harmed(strength).split(64)), halves) for strength in (1, 2, 4)]
    found = [compared(halves[0], halves), *found]
    for name in ("kid", "frechet"):
        assert values(found, name) == sorted(values(found, name)), name
    assert values(found, "recall")[-1] < values(found, "recall")[0] - 0.2
    assert found[-1]["kid"]["low"] > found[0]["kid"]["high"]  # the intervals tell them apart


def test_repeated_images_cost_diversity_and_coverage(real, halves):
    labels, rng = real[1][::2], np.random.default_rng(0)

    def repeated(share: float) -> np.ndarray:
        """Returns indices of images, of which each class keeps a share and repeats it."""
        out = np.arange(len(labels))
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            out[members] = draw_repeated(members[: max(1, round(share * len(members)))], len(members), rng)
        return out

    found = [compared(halves[0][repeated(share)], halves) for share in (1, 0.4, 0.1)]
    assert values(found, "coverage") == sorted(values(found, "coverage"), reverse=True)
    assert values(found, "coverage")[-1] < 0.6 * values(found, "coverage")[0]
    jittered = halves[0] + np.random.default_rng(1).normal(0, 1e-3, halves[0].shape).astype(np.float32)
    spread = []
    for share in (1, 0.4, 0.1):
        of_sources = {"real": halves[0], "reconstructions": halves[0], "samples": jittered[repeated(share)]}
        spread.append(diversity(of_sources, labels, [str(c) for c in range(7)])["all"]["ratio"]["value"])
    assert spread[0] == pytest.approx(1, abs=0.02)


def test_mode_collapse_costs_diversity(real, halves):
    labels = real[1][::2]
    ratios = []
    for pull in (0, 0.3, 0.8):  # each image moves towards the mean of its class
        means = np.stack([halves[0][labels == label].mean(0) for label in labels])
        sources = {"real": halves[0], "reconstructions": halves[0], "samples": (1 - pull) * halves[0] + pull * means}
        ratios.append(diversity(sources, labels, [str(c) for c in range(7)])["all"]["ratio"]["value"])
    assert ratios == pytest.approx([1, 0.7, 0.2], abs=0.01)


def test_missing_classes_cost_recall_and_coverage(real, halves):
    labels, of_real = real[1][::2], real[1][1::2]

    def scores(dropped: list[int]) -> dict[str, np.ndarray]:
        kept = torch.from_numpy(halves[0][~np.isin(labels, dropped)]).double()
        found = distances.neighbour_scores(kept, torch.from_numpy(halves[1]).double())
        return {name: found[name].numpy() for name in ("recall", "coverage")}

    complete = scores([])
    # The real images of a class are reached less often if the class is missing.
    for name, least in (("recall", 0.01), ("coverage", 0.04)):
        before = np.mean([complete[name][of_real == c].mean() for c in range(7)])
        after = np.mean([scores([c])[name][of_real == c].mean() for c in range(7)])
        assert after < before - least, name
    # The more classes are missing, the lower the figure over all images.
    coverage = [scores(list(range(first, 7)))["coverage"].mean() for first in (7, 5, 3, 1)]
    assert coverage == sorted(coverage, reverse=True)
    assert coverage[-1] < coverage[0] - 0.2


def test_wrong_labels_cost_balanced_accuracy(real, halves):
    from sklearn.linear_model import LogisticRegression

    labels, rng = real[1], np.random.default_rng(0)
    probe = LogisticRegression(C=1e-3, max_iter=500).fit(halves[1], labels[1::2])
    probabilities = probe.predict_proba(halves[0])
    found = []
    for share in (0, 0.3, 0.6, 1):
        wrong = rng.random(len(halves[0])) < share
        asked = np.where(wrong, rng.integers(7, size=len(wrong)), labels[::2])
        found.append(balanced_accuracy(asked, probabilities.argmax(1), np.arange(len(asked)))["value"])
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.3 > 0.2 > found[-1]
