"""The loss of polishing: the energy score is smallest for draws like the images; one part of draws and image is compared."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor, FakeTensorMode

from lesiongen.tokenizers import polish_features
from lesiongen.tokenizers.polish_features import ZOOM, PolishFeatures, enlarged_part
from lesiongen.tokenizers.polish_loss import PolishLoss, PolishLossConfig, _score_of_each

TERMS = ("pixels", "features", "style", "mean", "adversarial", "excess")


def numbers(x: torch.Tensor) -> torch.Tensor:
    """Returns a number for each image of a batch."""
    return torch.arange(len(x))


def unlabelled(x: torch.Tensor) -> torch.Tensor:
    """Returns the labels of a batch of images without labels."""
    return torch.full((len(x),), -1)


def only(term: str) -> PolishLoss:
    """Returns the loss whose one term of weight 1 is `term`."""
    return PolishLoss(PolishLossConfig(**{name: float(name == term) for name in TERMS}), classes=0)


def test_an_enlarged_part_lies_within_the_image_and_is_enlarged_by_up_to_two():
    """Of an image whose pixels are their own places, the enlarged part shows where each of its pixels was."""
    down, right = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    part = enlarged_part(torch.stack([down, right]).repeat(256, 1, 1, 1), torch.arange(256))
    steps = {"down": part[:, 0].diff(dim=1)[:, 4:-4], "right": part[:, 1].diff(dim=2)[:, :, 4:-4]}
    for step in steps.values():
        assert (step.amax((1, 2)) - step.amin((1, 2))).max() < 1e-4, "it is not enlarged evenly"
        zoom = 1 / step.mean((1, 2))
        assert zoom.min() > 0.999 and zoom.max() < ZOOM + 1e-3 and zoom.std() > 0.2
    assert torch.allclose(steps["down"].mean((1, 2)), steps["right"].mean((1, 2)), atol=1e-4), "it is stretched"
    assert part.min() > -0.001 and part[:, 0].max() < 47.001 and part[:, 1].max() < 63.001
    left, enlarged = part[:, 1, 0, 0], 1 / steps["right"].mean((1, 2)) > 1.7
    assert left[enlarged].min() < 3 and left[enlarged].max() > 22, "parts do not reach both edges"


def test_an_enlarged_part_does_not_depend_on_the_batch():
    x, seeds = torch.rand(4, 1, 16, 16), torch.tensor([7, 2**40, 0, 5])
    assert torch.allclose(enlarged_part(x, seeds)[1:2], enlarged_part(x[1:2], seeds[1:2]), atol=1e-6)


def test_the_same_part_of_draws_and_image_is_compared():
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    loss = only("features")
    assert loss(x, torch.cat([x, x]), x, numbers(x))[0] < 1e-3
    assert loss(x, torch.cat([x.roll(1, 0), x.roll(2, 0)]), x, numbers(x))[0] > 0.1


def checkerboard_and_grain(colour: tuple[float, ...]) -> list[torch.Tensor]:
    """Returns images with grain, draws with grain of the same distribution, and these draws with a faint checkerboard."""
    torch.manual_seed(0)
    smooth = F.interpolate(0.3 * torch.randn(16, 3, 8, 8), (64, 64), mode="bicubic")
    x, *draws = (smooth + 0.035 * torch.randn(16, 1, 64, 64) + 0.011 * torch.randn(16, 3, 64, 64) for _ in range(3))
    place = torch.arange(64)
    checkerboard = ((place[:, None] + place) % 2 * 2 - 1) * torch.tensor(colour)[:, None, None]
    likely = torch.cat(draws)
    return [x, likely, likely + 0.03 * checkerboard]


@pytest.mark.parametrize("colour", [(1.0, 1.0, 1.0), (1.0, -1.0, 0.0)])
def test_coefficients_see_a_checkerboard(colour):
    x, likely, wrong = checkerboard_and_grain(colour)
    features = PolishFeatures("test")
    of_likely, of_wrong = (_score_of_each(*features(draws, x, numbers(x))[0][:2]) for draws in (likely, wrong))
    assert of_wrong > 1.1 * of_likely


def test_enlarged_the_network_sees_a_grey_checkerboard_better(monkeypatch):
    x, likely, wrong = checkerboard_and_grain((1.0, 1.0, 1.0))
    features = PolishFeatures("test")

    def increase():
        scores = []
        for draws in (wrong, likely):
            layers = features(draws, x, numbers(x))[1:]
            scores.append(sum(_score_of_each(*map(polish_features.style, layer[:2])) for layer in layers))
        return float(scores[0] / scores[1] - 1)

    enlarged = increase()
    monkeypatch.setattr(polish_features, "enlarged_part", lambda x, number: x)
    assert enlarged > 1.3 * increase()


def test_draws_of_a_black_image_cost_less_than_the_limit():
    x = torch.full((2, 3, 64, 64), -1.0)
    draws = (x.repeat(2, 1, 1, 1) + 0.1 * torch.randn(4, 3, 64, 64)).requires_grad_()
    loss = PolishLoss(PolishLossConfig(), classes=0)
    loss(x, draws, x, numbers(x), unlabelled(x))[0].backward()
    assert loss(x, draws, x, numbers(x))[0] < loss.worst / 10 and draws.grad.isfinite().all()


def test_planning_leaves_nothing_behind():
    """The planner computes the loss of tensors without values; a real loss is a number afterwards."""
    x = torch.rand(2, 3, 32, 32)
    loss = PolishLoss(PolishLossConfig(), classes=0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        assert isinstance(loss(fake, torch.cat([fake, fake]), fake, numbers(fake), unlabelled(fake))[0], FakeTensor)
    assert loss(x, torch.cat([x, x]), x, numbers(x), unlabelled(x))[0].detach().isfinite()


def test_the_image_without_texture_is_measured_by_its_squared_error():
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    draws, mean = torch.cat([x, x]), x + 0.5
    without, (loss, terms) = (
        PolishLoss(PolishLossConfig(mean=weight, adversarial=0), classes=0)(mean, draws, x, numbers(x)) for weight in (0.0, 8.0)
    )
    assert torch.isclose(terms["mean"], torch.tensor(0.25)) and torch.isclose(loss - without[0], torch.tensor(2.0))


def test_rare_wild_texture_is_led_back():
    """The score of one wild draw of many has next to no gradient, because the other draw is not wild; the penalty has one."""
    torch.manual_seed(0)
    x = 0.1 * torch.randn(4, 3, 32, 32)
    pulls = {}
    for excess in (0.0, 100.0):
        draws = 0.1 * torch.randn(8, 3, 32, 32)
        draws[0, :, 10, 10] = 1.0
        draws.requires_grad_()
        PolishLoss(PolishLossConfig(features=0, style=0, adversarial=0, excess=excess), classes=0)(0 * x, draws, x, numbers(x))[
            0
        ].backward()
        pulls[excess] = float(draws.grad[0, 0, 10, 10])
    assert pulls[100.0] > 10 * abs(pulls[0.0])


def test_excess_teaches_the_texture_alone():
    """The gradient of large texture does not reach the decoder's image, to which the texture is added."""
    mean = torch.zeros(2, 3, 32, 32, requires_grad=True)
    texture = torch.full((4, 3, 32, 32), 0.9, requires_grad=True)
    losses = [
        PolishLoss(PolishLossConfig(features=0, style=0, mean=0, adversarial=0, excess=excess), classes=0)(
            mean, mean.repeat(2, 1, 1, 1) + texture, mean.detach(), numbers(mean)
        )[0]
        for excess in (0.0, 100.0)
    ]
    (losses[1] - losses[0]).backward()
    assert torch.isclose(losses[1] - losses[0], torch.tensor(25.0))
    assert texture.grad.min() > 0 and mean.grad.abs().max() < 1e-6 * texture.grad.max()


def test_mixtures_see_which_features_go_together():
    """Each feature of both draws is distributed as the image's; in one the features go together as in the image."""
    torch.manual_seed(0)

    def features(number: int, together: bool) -> torch.Tensor:
        common, own = torch.randn(number, 1, 8, 8), torch.randn(number, 24, 8, 8)
        return 0.8**0.5 * common + 0.2**0.5 * own if together else own

    x, likely, wrong = features(256, True), features(512, True), features(512, False)
    assert abs(_score_of_each(wrong, x) - _score_of_each(likely, x)) < 0.006
    mixed = PolishFeatures("test").mixed
    assert _score_of_each(mixed(wrong), mixed(x)) > _score_of_each(mixed(likely), mixed(x)) + 0.015


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
    found = [float(loss(x, draws, x, numbers(x))[0]) for draws in (grain(32), dots(32), torch.zeros(32, 3, 64, 64))]
    assert found[0] < 0.97 * min(found[1:])


@pytest.mark.parametrize("term", ["pixels", "features", "style"])
def test_the_score_is_smallest_for_draws_like_the_images(term):
    torch.manual_seed(0)
    loss = only(term)
    x, a, b = (0.3 * torch.randn(64, 3, 32, 32) for _ in range(3))
    found = {scale: float(loss(x, scale * torch.cat([a, b]), x, numbers(x))[0]) for scale in (0.0, 0.5, 1.0, 1.5)}
    assert min(found, key=found.get) == 1.0, "the mean is not the best, nor are too quiet or too loud draws"
    assert found[1.0] < loss.worst


def test_style_sees_that_images_differ_as_wholes():
    """Images are grainy or smooth as wholes. Draws with both in one image have the right mean of grain, but not its spread."""
    torch.manual_seed(0)
    loss = only("style")

    def grain(in_patches: bool) -> torch.Tensor:
        amount = torch.rand(64, 1, 8, 8) if in_patches else torch.rand(64, 1, 1, 1).expand(-1, -1, 8, 8)
        return 0.5 * amount.repeat_interleave(4, 2).repeat_interleave(4, 3) * torch.randn(64, 3, 32, 32)

    images = grain(in_patches=False)
    draws = [torch.cat([grain(kind), grain(kind)]) for kind in (False, True)]
    likely, in_patches = (float(loss(images, both, images, numbers(images))[0]) for both in draws)
    assert likely < in_patches


def test_equal_draws_have_a_finite_gradient():
    x, y = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32, requires_grad=True)
    PolishLoss(PolishLossConfig(), classes=0)(y, torch.cat([y, y]), x, numbers(x), unlabelled(x))[0].backward()
    assert y.grad.isfinite().all() and y.grad.any()


def test_wrong_weights_are_refused():
    for weights in (
        {"pixels": -1.0},
        {"mean": -1.0},
        {"adversarial": -1.0},
        {"excess": -1.0},
        {"pixels": 0.0, "features": 0.0, "style": 0.0},
    ):
        with pytest.raises(ValueError, match="each weight must be at least 0"):
            PolishLossConfig(**weights)
