"""The energy score: draws and images are shifted together, each image its own way."""

import pytest
import torch
import torch.nn.functional as F

from lesiongen.tokenizers.energy import SHIFT, EnergyConfig, EnergyScore, _shifted


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
    score = EnergyScore(EnergyConfig(features=0, style=0, mean=0))
    assert score(torch.cat([x, x]), x, x, torch.arange(4))[0] < 1e-2
    assert score(torch.cat([x.roll(1, 0), x.roll(2, 0)]), x, x, torch.arange(4))[0] > 1


def test_the_image_without_texture_is_measured_by_its_squared_error():
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    draws, mean = torch.cat([x, x]), x + 0.5
    without, _ = EnergyScore(EnergyConfig(features=0, style=0, mean=0))(draws, mean, x)
    loss, terms = EnergyScore(EnergyConfig(features=0, style=0, mean=8))(draws, mean, x)
    assert torch.isclose(terms["mean"], torch.tensor(0.25)) and torch.isclose(loss - without, torch.tensor(2.0))


@pytest.mark.parametrize("term", ["pixels", "features", "style"])
def test_draws_of_the_images_distribution_have_the_best_score(term):
    """Grain is better than a few bold dots of the same mean and variance, and than none."""
    generator = torch.Generator().manual_seed(0)

    def grain(number):
        return 0.1 * torch.randn(number, 1, 64, 64, generator=generator).expand(-1, 3, -1, -1)

    def dots(number):
        return (grain(number).abs() > 0.28) * grain(number).sign() * 1.4

    x = grain(16)
    config = EnergyConfig(**{name: float(name == term) for name in ("pixels", "features", "style", "mean")})
    found = [float(EnergyScore(config)(draws, x, x)[0]) for draws in (grain(32), dots(32), torch.zeros(32, 3, 64, 64))]
    assert found[0] < 0.97 * min(found[1:])
