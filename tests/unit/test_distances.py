"""Distances between sets of features equal those of torchmetrics and of simple computations, and have honest intervals."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from lesiongen.evaluation import distances
from lesiongen.evaluation.intervals import bootstrap, resampled_weights, share


def features(number: int, dim: int = 64, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(shift, 1, (number, dim))).clip(0).astype(np.float32)


@pytest.mark.parametrize(("n", "m", "dim"), [(90, 70, 160), (300, 260, 24)])  # fewer and more images than features
def test_frechet_distance_equals_that_of_torchmetrics(n: int, m: int, dim: int):
    x, y = (torch.from_numpy(features(k, dim, s, seed)).double() for k, s, seed in ((n, 0.0, 0), (m, 0.2, 1)))
    theirs = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert distances.frechet(x, y) == pytest.approx(float(theirs), abs=1e-3)
    assert distances.frechet(x, x) == pytest.approx(0, abs=1e-4)


def test_kernel_distance_equals_that_of_torchmetrics_on_the_same_draw():
    x, y = (torch.from_numpy(features(150, seed=s, shift=0.3 * s)).double() for s in (0, 1))
    kernels = (distances._kernel(a, b) for a, b in ((x, x), (y, y), (x, y)))
    assert distances._mmd(*kernels) == pytest.approx(float(poly_mmd(x, y)))
    assert distances.kid(x, y) == pytest.approx(distances.kid(x, y))  # the draws depend on the seed alone
    assert distances.kid(x, y) != distances.kid(x, y, seed=1)


def test_neighbour_figures_by_hand():
    x = torch.tensor([[0.0], [1], [2], [3], [4], [5], [6], [100]]).double()
    y = torch.tensor([[0.5], [1.5], [2.5], [3.5], [4.5], [5.5], [6.5], [7.5]]).double()
    scores = distances.neighbour_scores(x, y)
    assert scores["precision"].tolist() == [1] * 7 + [0]  # 100 is outside every ball
    assert scores["recall"].tolist() == [1] * 8  # 7.5 is inside the wide balls of x
    assert scores["coverage"].tolist() == [1] * 8


def test_repeated_images_are_no_neighbours():
    rare = features(4, seed=3)
    y = torch.from_numpy(np.concatenate([features(60), np.repeat(rare, 15, 0)])).double()
    x = torch.from_numpy(features(60, seed=1)).double()
    # With repetitions as neighbours, the balls around the rare images would have the radius 0 and nothing would cover them.
    assert distances.neighbour_scores(x, y)["coverage"][60:].mean() > 0.5


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held = sum(
        figure["low"] <= 0 <= figure["high"]
        for seed in range(20)
        for figure in [
            distances.compare(features(200, seed=seed), features(200, seed=100 + seed), np.arange(200), np.arange(200), seed)[
                "kid"
            ]
        ]
    )
    assert held >= 15  # of 20 pairs of one distribution


def test_photographs_of_one_lesion_count_as_one():
    values = np.repeat([0.0, 1.0] * 10, 10)
    apart = bootstrap(lambda w: float((w * values).sum() / w.sum()), np.arange(200))
    together = bootstrap(lambda w: float((w * values).sum() / w.sum()), np.repeat(np.arange(20), 10))
    assert apart["value"] == together["value"] == 0.5
    assert together["high"] - together["low"] > 2 * (apart["high"] - apart["low"])
    weights = resampled_weights(np.repeat(np.arange(20), 10), 5, 0)
    assert (weights.reshape(5, 20, 10) == weights.reshape(5, 20, 10)[:, :, :1]).all()


def test_sets_too_small_have_no_figures():
    found = distances.compare(features(10), features(300), np.arange(10), np.arange(300))
    assert found["number"] == 10
    assert found["kid"]["value"] is None
    assert share(0, 0)["value"] is None
    assert share(0, 50)["high"] > 0.05
