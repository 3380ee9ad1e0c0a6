"""The bias of draws: errors that images share are seen, others are not; parts of a batch add up."""

import pytest
import torch

from lesiongen.tokenizers.polish_bias import HALF_LIFE, Bias

IMAGES = 8


def batch(shared: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns statistics of two kinds: of draws that differ from their images by noise and a shared error, and of these."""
    pairs = []
    for size, scale in ((6, 1.0), (10, 20.0)):
        x = scale * torch.randn(IMAGES, size)
        draws = x.repeat(2, 1) + scale * (shared + 0.5 * torch.randn(2 * IMAGES, size))
        pairs.append((draws, x))
    return pairs


def mean_term(bias: Bias, shared: float, batches: int = 400) -> float:
    """Returns the mean term of the second half of many batches, each of which is added to the averages."""
    terms = []
    for _ in range(batches):
        term, sums = bias(batch(shared))
        bias.update(sums)
        terms.append(float(term))
    return sum(terms[batches // 2 :]) / (batches // 2)


def test_only_errors_that_images_share_are_seen():
    """With the variance v among images, here 1 and 400, and a floor of a tenth of it, the term is e² / (1.1 v + e²)."""
    torch.manual_seed(0)
    assert abs(mean_term(Bias([6, 10]), 0.0)) < 0.01
    assert mean_term(Bias([6, 10]), 0.5) == pytest.approx(0.25 / (1.1 + 0.25), rel=0.1)


def test_there_is_no_term_before_the_first_update():
    term, _ = Bias([6, 10])(batch(0.5))
    assert term == 0


def test_the_gradient_leads_draws_back():
    torch.manual_seed(0)
    bias = Bias([6, 10])
    mean_term(bias, 0.5)
    pairs = [(draws.requires_grad_(), x) for draws, x in batch(0.5)]
    bias(pairs)[0].backward()
    for draws, _ in pairs:
        assert draws.grad.min() > 0 and torch.allclose(draws.grad, draws.grad[:1].expand_as(draws)), "draws are led unevenly"


def test_parts_of_a_batch_add_up():
    """Micro-batches and ranks change neither the term nor the averages."""
    torch.manual_seed(0)
    whole, parted = Bias([6, 10]), Bias([6, 10])
    for _ in range(3):
        pairs = batch(0.5)
        term, sums = whole(pairs)
        halves = [
            [
                (torch.cat([half[k] for half in (draws[:IMAGES].chunk(2), draws[IMAGES:].chunk(2))]), x.chunk(2)[k])
                for draws, x in pairs
            ]
            for k in (0, 1)
        ]
        terms, parts = zip(*map(parted, halves), strict=True)
        assert torch.isclose(sum(terms) / 2, term)
        whole.update(sums)
        parted.update(sum(parts))
        assert torch.allclose(whole.averages, parted.averages, rtol=1e-4) and torch.equal(whole.share, parted.share)


def test_old_errors_are_forgotten():
    torch.manual_seed(0)
    bias = Bias([6, 10])
    mean_term(bias, 0.5)
    before = bias.averages[0].norm()
    for _ in range(HALF_LIFE // IMAGES):
        bias.update(bias([(torch.cat([x, x]), x) for _, x in batch(0.0)])[1])
    assert torch.isclose(bias.averages[0].norm(), before / 2, rtol=1e-3)


@pytest.mark.parametrize("images", [1, 8])
def test_the_term_is_bounded_where_images_are_alike(images):
    """Also in the first batches, whose images are all that the averages have seen."""
    torch.manual_seed(0)
    bias, x = Bias([6]), torch.ones(images, 6)
    for _ in range(20):
        term, sums = bias([(x.repeat(2, 1) + 0.3 + 0.01 * torch.randn(2 * images, 6), x)])
        bias.update(sums)
        assert 0 <= term < 1.1
    assert term > 0.9
