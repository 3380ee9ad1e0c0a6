"""Tokenizers: tests that every kind must pass. Also the choice of tokens from logits."""

import numpy as np
import pytest
import torch

from hpc.config import from_plain, to_plain
from lesiongen.experiment import TokenizerConfig
from lesiongen.priors.sampling import TokenChooser
from lesiongen.tokenizers import make
from lesiongen.tokenizers.vqvae import VQVAEConfig
from lesiongen.tokenizers.vqvae2 import VQVAE2Config

TOKENIZERS = [
    (VQVAEConfig(stride=4, hidden=8, residual_layers=1, residual_hidden=4, dim=4, entries=8), 1),
    (VQVAEConfig(stride=8, taper=False, norm="group", output="tanh", hidden=8, residual_layers=0, dim=4, entries=8), 1),
    *(
        (VQVAE2Config(strides=strides, hidden=8, residual_layers=1, residual_hidden=4, dim=4, entries=8, checkpoint=ckpt), 3)
        for strides, ckpt in [((4,), False), ((4, 2), False), ((2, 2, 2), True), ((2, 2, 2, 2), False)]
    ),
    (VQVAE2Config(hidden=8, dim=4, entries=27, quantizer="fsq", fsq_levels=(3, 3, 3)), 3),
    (VQVAE2Config(hidden=8, dim=4, entries=8, quantizer="gradient", kmeans=True), 3),
    (VQVAEConfig(hidden=8, dim=4, entries=8, quantizer="cosine", estimator="rotation"), 3),
]


@pytest.mark.parametrize(("config", "channels"), TOKENIZERS)
class TestTokenizer:
    def test_images_to_codes_and_back(self, config, channels):
        net, x = make(config, channels, batch=2).eval(), torch.randn(2, channels, 32, 32)
        y, levels = net(x)
        assert y.shape == x.shape
        codes = net.encode(x)
        assert {n: c.shape[-1] for n, c in codes.items()} == config.grids(32)
        assert list(levels) == list(reversed(config.names))
        assert torch.allclose(net.decode_codes(codes), y, atol=1e-5)
        assert torch.allclose(net.decode({n: q.x for n, q in levels.items()}), y, atol=1e-5)
        for name in config.names:
            book = net.codebook(name)
            assert book.shape == (config.entries, config.dim)
            assert torch.allclose(book[codes[name]].movedim(-1, 1), levels[name].x, atol=1e-5)
        with pytest.raises(ValueError, match="multiple of"):
            config.grids(33)

    def test_a_step_reaches_every_weight(self, config, channels):
        net, x = make(config, channels, batch=4).train(), torch.randn(4, channels, 32, 32)
        net.initialise(x)
        y, levels = net(x, torch.arange(4), torch.arange(4))
        (y.square().mean() + sum(q.loss for q in levels.values())).backward()
        assert [n for n, p in net.named_parameters() if p.grad is None] == []
        found = net.update(torch.cat([levels[n].statistics for n in net.names]))
        assert found.keys() == {f"{m}/{n}" for m in ("usage", "perplexity", "revived") for n in net.names}

    def test_its_config_comes_back_from_yaml(self, config, channels):
        assert from_plain(TokenizerConfig, {"model": to_plain(config)}).model == config


def test_choice_draws_what_the_logits_say():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20_000, 1)
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    expected = logits[0].softmax(0)
    drawn = np.bincount(TokenChooser()(logits, u), minlength=4) / 20_000
    assert np.allclose(drawn, expected, atol=0.02)
    assert set(TokenChooser(top_k=2)(logits, u).tolist()) == {0, 1}
    assert set(TokenChooser(top_p=0.5)(logits, u).tolist()) == {0}
    cold = np.bincount(TokenChooser(temperature=0.1)(logits, u), minlength=4)
    assert cold[0] > 19_900
    assert TokenChooser()(logits[:1], torch.tensor([0.999999999])).item() <= 3
