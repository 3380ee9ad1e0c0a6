"""Evaluation metrics equal values that were computed by hand or by a slower, simpler method."""

import math

import numpy as np
import pytest
import torch

from lesiongen.data.augment import dihedral
from lesiongen.data.similarity import psnr, ssim
from lesiongen.evaluation import classifier, copies
from lesiongen.evaluation.codes import bigram_bits, usage_and_perplexity
from lesiongen.ingest.licences import strictest


def noise(number: int, side: int = 32, channels: int = 3, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (number, channels, side, side), generator=rng, dtype=torch.uint8)


def test_balanced_accuracy_is_the_mean_recall_of_classes_that_occur():
    true = torch.tensor([0, 0, 0, 0, 1, 1, -1])
    predicted = torch.tensor([0, 0, 0, 2, 1, 0, 1])
    assert classifier.balanced_accuracy(true, predicted, 3) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert classifier.confusion(true, predicted, 3).tolist() == [[3, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert math.isnan(classifier.balanced_accuracy(torch.tensor([-1]), torch.tensor([0]), 3))


def test_diversity_averages_distances_within_classes():
    features = torch.tensor([[0.0, 0], [3, 4], [0, 0], [0, 0], [9, 9]])
    assert classifier.within_class_diversity(features, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx(2.5)
    assert classifier.within_class_diversity(features[2:4], torch.tensor([1, 1])) == 0
    assert math.isnan(classifier.within_class_diversity(features, torch.tensor([0, 1, 2, 3, -1])))


def test_rare_classes_come_as_often_and_every_member_before_any_twice():
    labels = torch.tensor([0] * 90 + [2] * 10)
    order = classifier.balanced_order(labels, 100, torch.Generator().manual_seed(0))
    assert torch.bincount(labels[order]).tolist() == [50, 0, 50]
    assert torch.bincount(order, minlength=100)[90:].tolist() == [5] * 10
    assert torch.bincount(order, minlength=100)[:90].max() == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_classifier_learns_what_can_be_told_apart(channels: int):
    labels = torch.arange(120) % 3
    labels[::10] = -1
    pictures = noise(120, 32, channels) // 4 + (labels.clamp(min=0) * 80).to(torch.uint8)[:, None, None, None]
    trained = [classifier.train_classifier(pictures, labels, 4, 1280, seed=1) for _ in range(2)]
    predicted, features = classifier.predict(trained[0], pictures)
    assert classifier.balanced_accuracy(labels, predicted, 4) > 0.95
    assert features.shape == (120, 256)
    assert torch.equal(features, classifier.predict(trained[1], pictures)[1])  # equal seeds give equal classifiers


def test_fidelity_compares_the_same_classes_and_says_why_it_cannot():
    net = classifier.Classifier(3, 3).eval()
    pictures = {"samples": noise(6), "real": noise(8, seed=1)}
    labels = {"samples": torch.tensor([0, 0, 0, 1, 1, 1]), "real": torch.tensor([0, 0, 0, 0, 2, 2, 2, -1])}
    fidelity, diversity = classifier.compare(net, pictures, labels, ["a", "b", "c"], common=[0], per_class=2)
    assert fidelity["number"] == {"samples": 3, "real": 4}
    assert list(fidelity["recall"]) == diversity["classes"] == ["a"]
    assert (fidelity["ratio"] is None) == (fidelity["real"] == 0)
    labels["samples"] = torch.tensor([0, 1, 1, 1, 1, 1])
    assert "two samples" in classifier.compare(net, pictures, labels, ["a", "b", "c"], [0], 2)[1]["reason"]


@pytest.mark.parametrize("form", range(8))
@pytest.mark.parametrize("side", [32, 50])
def test_a_turned_copy_is_found(form: int, side: int):
    train = noise(20, side)
    found = copies.nearest(dihedral(train[7:8], form), train, chunk=3)
    assert found.index.tolist() == [7]
    assert float(found.distance) < 1e-6
    assert torch.equal(dihedral(train[found.index], int(found.form)), dihedral(train[7:8], form))


def test_copies_are_counted_and_noise_is_not():
    train, fresh, held_out = noise(50), noise(20, seed=1), noise(40, seed=2)
    jitter = noise(5, seed=3) // 64
    samples = torch.cat([fresh, (train[:5] // 2 * 2).clamp(max=250) + jitter])
    below = copies.threshold(copies.nearest(held_out, train).distance)
    found = copies.nearest(samples, train, chunk=7)
    rate = copies.copy_rate(found.distance, below)
    assert (rate["copies"], rate["number"]) == (5, 25)
    assert found.index[20:].tolist() == [0, 1, 2, 3, 4]
    gaps = [copies.small(samples[:1]) - copies.small(dihedral(train, form)) for form in range(8)]
    plain = min(float(gap.square().mean((1, 2, 3)).min()) for gap in gaps)
    assert float(found.distance[0]) == pytest.approx(plain**0.5, rel=1e-5)


def test_duplicates_among_held_out_images_do_not_hide_copies():
    assert copies.threshold(torch.zeros(10)) == copies.INVISIBLE > 0


def test_wilson_interval():
    assert copies.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert copies.wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert copies.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I


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
