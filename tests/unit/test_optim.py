"""Learning-rate schedules, optimizers, and the half-life of averaged weights."""

import math

import pytest
import torch
from torch import nn

from hpc.config import from_plain
from hpc.errors import UserError
from hpc.train.optim import RAMPUP_RATIO, OptimConfig, average_decay, build_optimizer, learning_rate

NAMES = ("adamw", "adam", "sgd")


def rates(total=1_000, at=(0, 500, 999), **config):
    return [learning_rate(OptimConfig(lr=1.0, **config), seen, total) for seen in at]


def test_schedules_at_their_corners():
    assert rates() == [1, 1, 1]
    assert rates(warmup=100, at=(0, 49, 99, 100, 999)) == pytest.approx([0.01, 0.5, 1, 1, 1])
    assert rates(schedule="cosine", floor=0.1, at=(0, 500, 1_000, 2_000)) == pytest.approx([1, 0.55, 0.1, 0.1])
    assert rates(schedule="trapezoid", cooldown=0.3, at=(0, 700, 850, 1_000)) == pytest.approx([1, 1, 0.5, 0])
    assert rates(schedule="trapezoid", cooldown=0.0, at=(0, 1_000)) == [1, 1]


def test_a_piecewise_rate_changes_at_the_first_sample_of_each_part():
    at = (0, 333, 334, 666, 667, 999, 1_000, 5_000)
    assert rates(schedule="piecewise", pieces=(1.0, 0.5, 0.125), at=at) == [1, 1, 0.5, 0.5, 0.125, 0.125, 0.125, 0.125]
    assert rates(schedule="piecewise", pieces=(1.0, 0.5), warmup=10, at=(4, 500)) == pytest.approx([0.5, 0.5])
    assert rates(total=0, schedule="piecewise", pieces=(1.0, 0.5), at=(0,)) == [1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "piecewise"}, "pieces"),
        ({"pieces": [1, 0.5]}, "schedule: piecewise"),
        ({"schedule": "piecewise", "pieces": [1, -1]}, "at least 0"),
        ({"name": "lion"}, "adamw, adam, sgd"),
        ({"momentum": 1}, "momentum"),
        ({"eps": 0}, "eps"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(UserError, match=message):
        from_plain(OptimConfig, settings, "optim")


def trained(make, steps=4, skip=()):
    """Returns the weights of a small net after some steps with the optimizer make(net). `skip` lists the steps to skip."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    optimizer = make(net)
    for step in range(steps):
        torch.manual_seed(step)
        net(torch.randint(5, (8,))).square().sum().backward()
        optimizer.skip = step in skip
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("name", NAMES)
def test_optimizers_are_torchs_own(name):
    def theirs(net):
        decayed = [{"params": [net[1].weight], "weight_decay": 0.1}, {"params": [net[0].weight, net[1].bias]}]
        if name == "sgd":
            return torch.optim.SGD(decayed, lr=0.01, momentum=0.8, weight_decay=0.0)
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name]
        return kind(decayed, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)

    config = OptimConfig(name=name, lr=0.01, momentum=0.8, weight_decay=0.1)
    assert torch.allclose(trained(lambda net: build_optimizer(net, config)), trained(theirs), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_changes_nothing(name):
    def make(net):
        return build_optimizer(net, OptimConfig(name=name, lr=0.01))

    assert torch.equal(trained(make, steps=3), trained(make, steps=4, skip=(3,)))


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_on_where_it_was_saved(name):
    """Saves and loads through the optimizer's own state_dict(), as DeepSpeed does."""

    def restarting(net):
        optimizer = build_optimizer(net, OptimConfig(name=name, lr=0.01))
        step = optimizer.step

        def save_load_and_step():
            optimizer.load_state_dict(optimizer.state_dict())
            step()

        optimizer.step = save_load_and_step
        return optimizer

    assert torch.equal(trained(lambda net: build_optimizer(net, OptimConfig(name=name, lr=0.01))), trained(restarting))


@pytest.mark.parametrize("batch", [8, 64])
def test_after_its_half_life_a_weight_counts_half_whatever_the_batch(batch):
    start = 10_000_000
    remaining = math.prod(average_decay(6_400, start + seen, batch) for seen in range(0, 6_400, batch))
    assert remaining == pytest.approx(0.5)


def test_an_average_is_short_at_first():
    assert average_decay(6_400, 0, 64) == 0, "the average must not contain the initial weights"
    assert average_decay(6_400, 1_280, 64) == pytest.approx(0.5 ** (64 / (RAMPUP_RATIO * 1_280)))
    assert average_decay(0, 1_000_000, 64) == 0
    decays = [average_decay(6_400, seen, 64) for seen in range(0, 200_000, 640)]
    assert decays == sorted(decays) and decays[-1] == pytest.approx(0.5 ** (64 / 6_400))
