"""The loss of polishing: the energy score is smallest for draws like the images; draws and image are shifted together."""

import pytest
import torch
import torch.nn.functional as F

from lesiongen.tokenizers.polish_loss import SHIFT, PolishLoss, PolishLossConfig, _shifted

TERMS = ("pixels", "features", "style", "mean", "excess")


def only(term: str) -> PolishLoss:
    """Returns the loss whose one term of weight 1 is `term`."""
    return PolishLoss(PolishLossConfig(**{name: float(name == term) for name in TERMS}))


def test_a_shift_moves_the_whole_image_and_reflects_its_edges():
    x = torch.rand(64, 3, 16, 24)
    shifted = _shifted(x, torch.arange(64))
    padded = F.pad(x, [SHIFT] * 4, mode="reflect")
    found = set()
    for number in range(64):
        crops = {
            (dy, dx): padded[number, :, dy : dy + 16, dx : dx + 24]
            for dy in range(2 * SHIFT + 1)
            for dx in range(2 * SHIFT + 1)
        }
        found |= {offset for offset, crop in crops.items() if torch.equal(crop, shifted[number])}
    assert len(found) > 30 and {dy for dy, _ in found} == {dx for _, dx in found} == set(range(2 * SHIFT + 1))


def test_a_shift_does_not_depend_on_the_batch():
    x, numbers = torch.rand(4, 1, 16, 16), torch.tensor([7, 2**40, 0, 5])
    assert torch.equal(_shifted(x, numbers)[1:2], _shifted(x[1:2], numbers[1:2]))


def test_draws_are_shifted_as_their_image_is():
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    loss = only("pixels")
    assert loss(x, torch.cat([x, x]), x, torch.arange(4))[0] < 1e-3
    assert loss(x, torch.cat([x.roll(1, 0), x.roll(2, 0)]), x, torch.arange(4))[0] > 0.1


def test_the_image_without_texture_is_measured_by_its_squared_error():
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    draws, mean = torch.cat([x, x]), x + 0.5
    (without, _), (loss, terms) = (PolishLoss(PolishLossConfig(mean=weight))(mean, draws, x) for weight in (0.0, 8.0))
    assert torch.isclose(terms["mean"], torch.tensor(0.25)) and torch.isclose(loss - without, torch.tensor(2.0))


def test_rare_wild_texture_is_led_back():
    """The score of one wild draw of many has next to no gradient, because the other draw is not wild; the penalty has one."""
    torch.manual_seed(0)
    x = 0.1 * torch.randn(4, 3, 32, 32)
    pulls = {}
    for excess in (0.0, 100.0):
        draws = 0.1 * torch.randn(8, 3, 32, 32)
        draws[0, :, 10, 10] = 1.0
        draws.requires_grad_()
        PolishLoss(PolishLossConfig(features=0, style=0, excess=excess))(0 * x, draws, x)[0].backward()
        pulls[excess] = float(draws.grad[0, 0, 10, 10])
    assert pulls[100.0] > 10 * abs(pulls[0.0])


def test_excess_teaches_the_texture_alone():
    """The gradient of large texture does not reach the decoder's image, to which the texture is added."""
    mean = torch.zeros(2, 3, 32, 32, requires_grad=True)
    texture = torch.full((4, 3, 32, 32), 0.9, requires_grad=True)
    losses = [
        PolishLoss(PolishLossConfig(features=0, style=0, mean=0, excess=excess))(
            mean, mean.repeat(2, 1, 1, 1) + texture, mean.detach()
        )[0]
        for excess in (0.0, 100.0)
    ]
    (losses[1] - losses[0]).backward()
    assert torch.isclose(losses[1] - losses[0], torch.tensor(25.0))
    assert texture.grad.min() > 0 and mean.grad.abs().max() < 1e-6 * texture.grad.max()


@pytest.mark.parametrize("term", ["pixels", "features", "style"])
def test_draws_of_the_images_distribution_have_the_best_score(term):
    """Grain is better than a few bold dots of the same mean and variance, and than none."""
    generator = torch.Generator().manual_seed(0)

    def grain(number):
        return 0.1 * torch.randn(number, 1, 64, 64, generator=generator).expand(-1, 3, -1, -1)

    def dots(number):
        return (grain(number).abs() > 0.28) * grain(number).sign() * 1.4

    x = grain(16)
    loss = only(term)
    found = [float(loss(x, draws, x)[0]) for draws in (grain(32), dots(32), torch.zeros(32, 3, 64, 64))]
    assert found[0] < 0.97 * min(found[1:])


@pytest.mark.parametrize("term", ["pixels", "features", "style"])
def test_the_score_is_smallest_for_draws_like_the_images(term):
    torch.manual_seed(0)
    loss = only(term)
    x, a, b = (0.3 * torch.randn(64, 3, 32, 32) for _ in range(3))
    found = {scale: float(loss(x, scale * torch.cat([a, b]), x)[0]) for scale in (0.0, 0.5, 1.0, 1.5)}
    assert min(found, key=found.get) == 1.0, "the mean is not the best, nor are too quiet or too loud draws"
    assert found[1.0] < loss.worst


def test_style_sees_that_images_differ_as_wholes():
    """Images are grainy or smooth as wholes. Draws with both in one image have the right mean of grain, but not its spread."""
    torch.manual_seed(0)
    loss = only("style")

    def grain(mixed: bool) -> torch.Tensor:
        amount = torch.rand(64, 1, 8, 8) if mixed else torch.rand(64, 1, 1, 1).expand(-1, -1, 8, 8)
        return 0.5 * amount.repeat_interleave(4, 2).repeat_interleave(4, 3) * torch.randn(64, 3, 32, 32)

    images = grain(mixed=False)
    likely, mixed = (float(loss(images, torch.cat([grain(kind), grain(kind)]), images)[0]) for kind in (False, True))
    assert likely < mixed


def test_equal_draws_have_a_finite_gradient():
    x, y = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32, requires_grad=True)
    PolishLoss(PolishLossConfig())(y, torch.cat([y, y]), x)[0].backward()
    assert y.grad.isfinite().all() and y.grad.any()


def test_wrong_weights_are_refused():
    for weights in ({"pixels": -1.0}, {"mean": -1.0}, {"excess": -1.0}, {"pixels": 0.0, "features": 0.0, "style": 0.0}):
        with pytest.raises(ValueError, match="pixels, features, style, mean and excess"):
            PolishLossConfig(**weights)
