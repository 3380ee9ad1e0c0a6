"""Noise of codes in polishing: which codes are replaced, by which, and how many."""

import pytest
import torch

from lesiongen.experiment import PolishConfig
from lesiongen.tokenizers import make
from lesiongen.tokenizers.code_noise import NEIGHBOURS, CodeNoise
from lesiongen.tokenizers.vqvae import VQVAEConfig
from lesiongen.tokenizers.vqvae2 import VQVAE2Config

SMALL = {"hidden": 8, "residual_layers": 1, "residual_hidden": 4, "dim": 4}


def tokenizer(config=None):
    torch.manual_seed(0)
    return make(config or VQVAEConfig(**SMALL, entries=64), 3, batch=1)


def codes_of(net, images: int = 200, size: int = 128) -> dict[str, torch.Tensor]:
    """Returns random codes of images."""
    return {name: torch.randint(net.entries, (images, side, side)) for name, side in net.config.grids(size).items()}


@pytest.mark.parametrize("quantizer", ["ema", "cosine", "fsq"])
def test_codes_are_replaced_by_their_nearest(quantizer):
    net = tokenizer(VQVAEConfig(**SMALL, entries=64, quantizer=quantizer, fsq_levels=(4, 4, 4)))
    before = codes_of(net)
    after = CodeNoise(net, 1.0)(before, torch.arange(200))
    vectors = net.codebook("codes")
    pairs = torch.stack([before["codes"].flatten(), after["codes"].flatten()], 1)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    distances = torch.cdist(vectors, vectors)
    nearer = (distances[pairs[:, 0]] < distances[pairs[:, 0], pairs[:, 1]][:, None] - 1e-6).sum(1)
    assert len(pairs) > 1000 and nearer.max() <= NEIGHBOURS  # the code itself is nearer too
    assert len(pairs[pairs[:, 0] == pairs[0, 0], 1].unique()) > NEIGHBOURS / 2


def test_from_none_to_the_share_of_the_codes_are_replaced():
    net = tokenizer(VQVAE2Config(**SMALL, entries=64))
    before = codes_of(net)
    after = CodeNoise(net, 0.3)(before, torch.arange(200))
    for name in net.names:
        changed = (before[name] != after[name]).float().mean((1, 2))
        assert 0.13 < changed.mean() < 0.17 and changed.min() < 0.02 and 0.27 < changed.max() < 0.4
    same = CodeNoise(net, 0.0)(before, torch.arange(200))
    assert all(torch.equal(before[name], same[name]) for name in net.names)


def test_the_number_of_an_image_decides_whatever_the_batch():
    net = tokenizer()
    before = codes_of(net, 4)
    noise = CodeNoise(net, 1.0)
    together = noise(before, torch.tensor([7, 8, 9, 10]))["codes"]
    alone = noise({"codes": before["codes"][2:3]}, torch.tensor([9]))["codes"]
    assert torch.equal(together[2:3], alone)
    assert not torch.equal(together, noise(before, torch.tensor([17, 18, 19, 20]))["codes"])


def test_small_codebooks():
    for entries in (2, 5):
        net = tokenizer(VQVAEConfig(**SMALL, entries=entries))
        after = CodeNoise(net, 1.0)(codes_of(net), torch.arange(200))["codes"]
        assert after.min() >= 0 and after.max() < entries


def test_share_must_be_a_share():
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        PolishConfig(code_noise=1.5)
