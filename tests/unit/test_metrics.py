"""Evaluation metrics equal values that were computed by hand or by a slower, simpler method."""

import numpy as np
import pytest
import torch

from lesiongen.data.similarity import psnr, ssim
from lesiongen.evaluation import classifier
from lesiongen.evaluation.codes import bigram_bits, usage_and_perplexity
from lesiongen.evaluation.fidelity import Judged, diversity, fidelity
from lesiongen.evaluation.image_sets import ArrayImages
from lesiongen.evaluation.intervals import balanced_accuracy, difference, share, wilson
from lesiongen.ingest.licences import strictest


def noise(number: int, side: int = 32, channels: int = 3, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (number, channels, side, side), generator=rng, dtype=torch.uint8)


def judged(labels: list[int], predicted: list[int], classes: int = 3, groups: list[int] | None = None) -> Judged:
    return Judged(np.array(labels), np.eye(classes)[predicted], np.array(groups or range(len(labels))))


def test_balanced_accuracy_is_the_mean_recall_of_classes_that_occur():
    found = balanced_accuracy(np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 2, 1, 0]), np.arange(6))
    assert found["value"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found["low"] < found["value"] < found["high"]


def test_diversity_averages_distances_within_classes():
    features = np.array([[0.0, 0], [3, 4], [6, 8], [0, 1], [0, 2], [0, 3], [9, 9]])
    labels = np.array([0, 0, 0, 1, 1, 1, 2])
    found = diversity({"real": features, "reconstructions": features, "samples": features / 2}, labels, ["a", "b", "c"])
    assert found["classes"]["a"]["real"]["value"] == pytest.approx((5 + 5 + 10) / 3)
    assert list(found["classes"]) == ["a", "b"]  # one image has no distance to another
    assert found["all"]["ratio"]["value"] == pytest.approx(0.5)
    assert diversity({"real": features[-1:], "samples": features[-1:]}, labels[-1:], ["a", "b", "c"])["reason"]


def test_rare_classes_come_as_often_and_every_member_before_any_twice():
    labels = torch.tensor([0] * 90 + [2] * 10)
    order = classifier.balanced_order(labels, 100, torch.Generator().manual_seed(0))
    assert torch.bincount(labels[order]).tolist() == [50, 0, 50]
    assert torch.bincount(order, minlength=100)[90:].tolist() == [5] * 10
    assert torch.bincount(order, minlength=100)[:90].max() == 1


def test_classifier_learns_what_can_be_told_apart_and_is_kept(tmp_path):
    labels = torch.arange(120) % 3
    labels[::10] = -1
    pictures = noise(120, 32, channels=1) // 4 + (labels.clamp(min=0) * 80).to(torch.uint8)[:, None, None, None]
    train, recipe = ArrayImages(pictures, labels), classifier.small_recipe(32, 960)

    def trained(folder: str, seed: int = 1) -> classifier.Classifier:
        return classifier.trained_classifier(recipe, train, 4, seed, tmp_path / folder, "shards", torch.device("cpu"))

    found = [trained("a"), trained("b"), trained("a")]  # the third is read from the cache
    scores = [net.probabilities(pictures.split(50), 120, "judge") for net in found]
    assert (scores[0].argmax(1) == labels)[labels >= 0].float().mean() > 0.95
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])  # equal seeds give equal classifiers
    assert len(list((tmp_path / "a").iterdir())) == 1
    assert found[0].backbone(pictures[:2]).shape == (2, classifier.FEATURES)
    # Another seed, and a damaged file, are trained again.
    assert not torch.equal(trained("a", seed=2).probabilities(pictures.split(50), 120, "judge"), scores[0])
    next((tmp_path / "b").iterdir()).write_bytes(b"damaged")
    assert torch.equal(trained("b").probabilities(pictures.split(50), 120, "judge"), scores[0])


def test_fidelity_compares_the_same_classes_and_says_why_it_cannot():
    sources = {
        "real": judged([0, 0, 0, 0, 2, 2, 2, -1], [0, 0, 1, 0, 2, 2, 2, 0]),
        "reconstructions": judged([0, 0, 0, 0, 2, 2, 2, -1], [0, 0, 1, 1, 2, 2, 2, 0]),
        "samples": judged([0, 0, 0, 1, 1, 1], [0, 0, 2, 1, 1, 1]),
    }
    found = fidelity(sources, ["a", "b", "c"], [0, 1, 2])
    assert list(found["recall"]) == ["a"]
    assert found["recall"]["a"]["samples"]["value"] == pytest.approx(2 / 3)
    assert found["recall"]["a"]["real"]["number"] == 4
    assert found["flips"]["value"] == pytest.approx(1 / 8)
    assert found["confusion"][0] == [2, 0, 1]
    assert "fewer than two classes" in fidelity(sources, ["a"], [0])["reason"]
    # A polished decoder that is told the label keeps it; what the codes keep is seen without.
    polish = {
        "without_label": judged([0, 0, 0, 0, 2, 2, 2, -1], [1, 1, 1, 1, 2, 2, 2, 0]),
        "before_polish": judged([0, 0, 0, 0, 2, 2, 2, -1], [0, 0, 1, 0, 2, 2, 2, 1]),
    }
    polished = fidelity(sources | polish, ["a", "b", "c"], [0, 1, 2])
    assert polished["flips"]["value"] == pytest.approx(3 / 8) and polished["recall"] == found["recall"]
    assert polished["flips_by_polish"]["value"] == pytest.approx(2 / 8)
    sources["samples"] = judged([1, 1], [1, 1])
    assert "no class has both" in fidelity(sources, ["a", "b", "c"], [0, 1, 2])["reason"]


def test_wilson_interval():
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I


def test_difference_of_two_shares():
    found = difference(share(56, 70), share(48, 80))  # Newcombe 1998, "Interval estimation for the difference", table II, (a)
    assert (found["value"], found["low"], found["high"]) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert difference(share(0, 1000), share(0, 1000))["low"] < 0
    assert difference({"value": 0.1, "low": None, "high": None}, share(1, 10))["low"] is None


def test_psnr():
    a = torch.zeros(2, 3, 16, 16)
    b = torch.stack([torch.full((3, 16, 16), 0.1), torch.zeros(3, 16, 16)])
    assert psnr(a, b).tolist() == pytest.approx([20, 100])


def test_ssim_against_a_plain_sum_over_windows():
    a, b = torch.rand(2, 1, 1, 14, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g) / g.sum() ** 2
    values = []
    for y in range(4):
        for x in range(3):
            p, q = (v[0, 0, y : y + 11, x : x + 11].numpy() for v in (a, b))
            mp, mq = (w * p).sum(), (w * q).sum()
            vp, vq, c = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + 1e-4) * (2 * c + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert float(ssim(a, b)) == pytest.approx(np.mean(values), rel=1e-6)
    assert float(ssim(a, a)) == pytest.approx(1)


def test_bigram_reaches_the_entropy_of_a_markov_chain():
    transition = np.array([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]])
    rng, codes = np.random.default_rng(0), np.zeros((200, 1, 200), np.uint8)
    for x in range(1, 200):
        u = rng.random(200)[:, None]
        codes[:, 0, x] = (u > transition[codes[:, 0, x - 1]].cumsum(1)).sum(1)
    left = np.bincount(codes[100:, 0, :-1].flatten(), minlength=3)
    entropy = (left / left.sum()) @ -(transition * np.log2(transition)).sum(1)
    assert bigram_bits(codes[:100], codes[100:], 3) == pytest.approx(entropy, abs=0.02)


def test_usage_and_perplexity():
    assert usage_and_perplexity(torch.tensor([5, 5, 0, 0])) == pytest.approx((0.5, 2))
    assert usage_and_perplexity(torch.tensor([1, 1, 1, 1])) == pytest.approx((1, 4))
    assert usage_and_perplexity(torch.tensor([9, 0, 0, 0])) == pytest.approx((0.25, 1))


@pytest.mark.parametrize(
    ("licences", "worst"),
    [
        (["CC-0", "CC-BY"], "CC-BY"),
        (["CC-BY-NC", "CC-BY-SA", "CC-0"], "CC-BY-NC"),
        (["CC BY-NC-SA 4.0", "CC-BY-NC"], "CC BY-NC-SA 4.0"),
        (["all rights reserved", "CC-BY-NC"], "all rights reserved"),
        (["CC-BY", "CC0 1.0"], "CC-BY"),
        (["CC0 1.0"], "CC0 1.0"),
        (["CC-0", "GPL 2.0"], "GPL 2.0"),
    ],
)
def test_strictest_licence(licences: list[str], worst: str):
    assert strictest(licences) == worst
    assert "not stated" in strictest([*licences, ""])
