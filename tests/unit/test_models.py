"""Quantizers and models: contracts over the registries."""

import math

import numpy as np
import pytest
import torch

from hpc.config import build, plain
from lesiongen.experiment import TokenizerConfig
from lesiongen.models.gpt import GPTConfig
from lesiongen.models.prior import Prior
from lesiongen.models.prior import make as make_prior
from lesiongen.models.tokenizer import make
from lesiongen.models.vqvae import VQVAEConfig
from lesiongen.models.vqvae2 import VQVAE2Config
from lesiongen.sampling import Choice, uniforms

TOKENIZERS = [
    (VQVAEConfig(stride=4, hidden=8, residual_layers=1, residual_hidden=4, dim=4, entries=8), 1),
    (VQVAEConfig(stride=8, taper=False, norm="group", output="tanh", hidden=8, residual_layers=0, dim=4, entries=8), 1),
    *(
        (VQVAE2Config(strides=strides, hidden=8, residual_layers=1, residual_hidden=4, dim=4, entries=8, checkpoint=again), 3)
        for strides, again in [((4,), False), ((4, 2), False), ((2, 2, 2), True)]
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
        assert build(TokenizerConfig, {"model": plain(config)}).model == config


PRIORS = {"gpt": GPTConfig(layers=2, heads=2, width=32, dropout=0.1, token_dropout=0.1)}


def prior(name: str, upper: bool) -> Prior:
    torch.manual_seed(0)
    shape = {"grid": (4, 3), "entries": 11, "facts": {"label": 5, "sex": 2}, "upper": ((7, (2, 2)),) if upper else ()}
    net = make_prior(PRIORS[name], **shape)
    for p in net.parameters():  # larger than at the start, so that differences would show
        torch.nn.init.normal_(p, std=0.2)
    return net


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("name", PRIORS)
class TestPrior:
    def condition(self, upper):
        return torch.tensor([[0, 1], [4, -1], [-1, 0]]), [torch.randint(0, 7, (3, 2, 2))] if upper else []

    def test_causality(self, name, upper):
        net = prior(name, upper).eval()
        facts, above = self.condition(upper)
        codes = torch.randint(0, 11, (3, 12))
        logits = net(codes, net.context(facts, above))
        for t in range(12):
            changed = codes.clone()
            changed[:, t] = (changed[:, t] + 1) % 11
            other = net(changed, net.context(facts, above))
            assert torch.equal(other[:, : t + 1], logits[:, : t + 1])
            assert t == 11 or not torch.allclose(other[:, t + 1], logits[:, t + 1])

    def test_cached_equals_uncached(self, name, upper):
        net = prior(name, upper).eval()
        facts, above = self.condition(upper)
        seen = []

        def greedy(logits, _):
            seen.append(logits)
            return logits.argmax(-1)

        codes = net.sample(facts, above, torch.zeros(3, 12), greedy)
        logits = net(codes.flatten(1), net.context(facts, above))
        assert (torch.stack(seen, 1) - logits).abs().max() < 1e-5
        assert torch.equal(codes.flatten(1), logits.argmax(-1))

    def test_conditions_matter(self, name, upper):
        net = prior(name, upper).eval()
        facts, above = self.condition(upper)
        codes = torch.randint(0, 11, (3, 4, 3))
        base = net.log_likelihood(codes, facts, above)
        assert not torch.allclose(base, net.log_likelihood(codes, (facts + 1) % 2, above))
        if upper:
            assert not torch.allclose(base, net.log_likelihood(codes, facts, [(above[0] + 1) % 7]))

    def test_loss_is_minus_log_likelihood_without_dropout(self, name, upper):
        net = prior(name, upper).eval()
        facts, above = self.condition(upper)
        codes = torch.randint(0, 11, (3, 4, 3))
        assert net.loss(codes, facts, above).item() == pytest.approx(-net.log_likelihood(codes, facts, above).mean().item())

    def test_guidance_one_changes_nothing_and_more_does(self, name, upper):
        net = prior(name, upper).eval()
        facts, above = self.condition(upper)
        numbers = uniforms(0, range(3), (4, 3))
        plain = net.sample(facts, above, numbers, Choice())
        assert torch.equal(plain, net.sample(facts, above, numbers, Choice(), guidance=lambda t: 1.0))
        assert not torch.equal(plain, net.sample(facts, above, numbers, Choice(), guidance=lambda t: 4.0))

    def test_a_sample_does_not_depend_on_its_batch(self, name, upper):
        net = prior(name, upper).eval()
        facts, above = self.condition(upper)
        numbers = uniforms(0, range(3), (4, 3))
        together = net.sample(facts, above, numbers, Choice())
        alone = net.sample(facts[1:2], [a[1:2] for a in above], numbers[1:2], Choice())
        assert torch.equal(together[1:2], alone)


def test_a_prior_learns_a_simple_language():
    """Rows that repeat their label: bits fall well below a uniform guess's."""
    torch.manual_seed(0)
    net = make_prior(GPTConfig(layers=1, heads=2, width=32, dropout=0.0), grid=(3, 3), entries=5, facts={"label": 5})
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(60):
        label = torch.randint(0, 5, (32,))
        loss = net.loss(label[:, None, None].expand(-1, 3, 3), label[:, None], [])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() / math.log(2) < 0.3


def test_choice_draws_what_the_logits_say():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20_000, 1)
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    expected = logits[0].softmax(0)
    drawn = np.bincount(Choice()(logits, u), minlength=4) / 20_000
    assert np.allclose(drawn, expected, atol=0.02)
    assert set(Choice(top_k=2)(logits, u).tolist()) == {0, 1}
    assert set(Choice(top_p=0.5)(logits, u).tolist()) == {0}
    cold = np.bincount(Choice(temperature=0.1)(logits, u), minlength=4)
    assert cold[0] > 19_900
    assert Choice()(logits[:1], torch.tensor([0.999999999])).item() <= 3
