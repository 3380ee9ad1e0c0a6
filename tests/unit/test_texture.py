"""Texture: noise that is a hash, the same for any batch."""

import pytest
import torch
from torch import nn

from lesiongen.tokenizers import make
from lesiongen.tokenizers.texture import TextureConfig, seeds_of, uniform
from lesiongen.tokenizers.vqvae import VQVAEConfig
from lesiongen.tokenizers.vqvae2 import VQVAE2Config

SIZES = {"hidden": 16, "residual_layers": 1, "residual_hidden": 8, "dim": 8, "entries": 16}


def test_noise_is_white_and_of_variance_one():
    noise = uniform(torch.arange(64), (4, 32, 32))
    assert noise.mean().abs() < 0.01 and abs(noise.std() - 1) < 0.01
    power = torch.fft.rfft2(noise).abs().square().mean((0, 1)) / 32**2
    assert power.min() > 0.7 and power.max() < 1.3
    between = torch.corrcoef(noise.flatten(1)) - torch.eye(64)
    assert between.abs().max() < 6 / noise[0].numel() ** 0.5


def test_noise_follows_the_seed_alone():
    together = uniform(torch.tensor([3, 2**32 - 1, 7]), (2, 5, 6))
    assert torch.equal(together[1:2], uniform(torch.tensor([2**32 - 1]), (2, 5, 6)))
    assert not torch.equal(together[0], together[2])


def test_every_code_and_its_place_decide_the_seed():
    codes = [torch.randint(512, (1, 8, 8)), torch.randint(512, (1, 4, 4))]
    moved = [codes[0].transpose(1, 2), codes[1]]
    changed = [codes[0], codes[1].clone()]
    changed[1][0, 3, 3] ^= 1
    seeds = [int(seeds_of(c)[0]) for c in (codes, moved, changed)]
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**32 for seed in seeds)
    many = seeds_of([torch.randint(4, (5_000, 2, 8))])
    assert len(many.unique()) > 4_990


@pytest.mark.parametrize("model", [VQVAEConfig(output="tanh", **SIZES), VQVAE2Config(**SIZES)])
@pytest.mark.parametrize("channels", [1, 3])
def test_codes_decide_the_image_in_any_batch(model, channels):
    torch.manual_seed(0)
    net = make(model, channels, batch=1)
    x = torch.rand(5, channels, 32, 32) * 2 - 1
    net.initialise(x)
    net.eval()
    plain = net.decode_codes(net.encode(x))
    net.add_polish(TextureConfig(width=8), "ab")
    assert torch.equal(net.decode_codes(net.encode(x)), plain)  # an untrained texture adds nothing
    nn.init.normal_(net.texture.last.weight, std=0.1)
    y, levels = net(x)
    codes = {name: q.codes for name, q in levels.items()}
    assert not torch.allclose(y, plain, atol=1e-3)
    assert torch.allclose(net.decode_codes(codes), y, atol=1e-5)
    assert torch.allclose(net.decode_codes({name: c[2:3] for name, c in codes.items()}), y[2:3], atol=1e-5)


def test_draws_of_one_image_differ():
    torch.manual_seed(0)
    net = make(VQVAEConfig(**SIZES), 3, batch=1)
    net.add_polish(TextureConfig(width=8), "ab")
    nn.init.normal_(net.texture.last.weight, std=0.1)
    vectors = {"codes": torch.randn(2, 8, 8, 8)}
    a, b = net.decode(vectors, torch.tensor([1, 2, 3, 4])).chunk(2)
    assert a.shape == b.shape == net.decode(vectors).shape and not torch.allclose(a, b, atol=1e-3)
    assert torch.allclose(net.decode(vectors, torch.tensor([3, 4])), b, atol=1e-6)


@pytest.mark.parametrize(("stride", "stages"), [(4, [4, 2, 1]), (8, [8, 4, 2, 1]), (16, [8, 4, 2, 1])])
def test_no_stage_is_coarser_than_the_grid(stride, stages):
    net = make(VQVAEConfig(stride=stride, **SIZES), 3, batch=1)
    net.add_polish(TextureConfig(width=8), "ab")
    assert net.texture.pixels == stages
    nn.init.normal_(net.texture.last.weight, std=0.1)
    grid = 32 // stride
    assert net.decode({"codes": torch.randn(2, 8, grid, grid)}, torch.tensor([1, 2])).shape == (2, 3, 32, 32)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="width and noise"):
        TextureConfig(width=0)
