"""Quantizers and models: contracts over the registries."""

import math

import numpy as np
import pytest
import torch

from lesiongen.models.gpt import GPT, PRIORS, GPTConfig
from lesiongen.models.quantize import QUANTIZERS
from lesiongen.models.vqvae2 import VQVAE2, VQVAE2Config
from lesiongen.sampling import Choice, uniforms

B, D, K = 8, 4, 16


def clusters(shift: float = 0.0) -> torch.Tensor:
    """[B, D, 4, 4] vectors around K distinct points."""
    g = torch.Generator().manual_seed(0)
    points = torch.randn(K, D, generator=g) * 3
    index = torch.arange(B * 16) % K
    noise = torch.randn(B * 16, D, generator=g) * 0.01
    return (points[index] + noise + shift).view(B, 4, 4, D).movedim(-1, 1)


@pytest.mark.parametrize("name", QUANTIZERS)
class TestQuantizer:
    def make(self, name):
        return QUANTIZERS[name](K, D, B)

    def train(self, quantizer, z, steps, parts=1):
        for step in range(steps):
            slot, position = torch.arange(B), torch.arange(B) + step * B
            pieces = [torch.arange(B)[i::parts] for i in range(parts)]
            statistics = sum(quantizer(z[p], slot[p], position[p]).statistics for p in pieces)
            metrics = quantizer.update(statistics)
        return metrics

    def test_codebook_is_fp32_buffers(self, name):
        quantizer = self.make(name)
        assert not list(quantizer.parameters())
        assert all(b.dtype == torch.float32 for b in quantizer.buffers())
        assert set(quantizer.state_dict()) == {n for n, _ in quantizer.named_buffers()}

    def test_forward_writes_no_buffer(self, name):
        quantizer = self.make(name)
        before = {k: v.clone() for k, v in quantizer.named_buffers()}
        quantizer(clusters(), torch.arange(B), torch.arange(B))
        assert all(torch.equal(v, before[k]) for k, v in quantizer.named_buffers())

    def test_finds_the_clusters_and_uses_every_code(self, name):
        quantizer, z = self.make(name), clusters()
        metrics = self.train(quantizer, z, 200)
        assert metrics["usage"] == 1.0
        assert metrics["perplexity"] > 0.8 * K  # two codes may share a cluster
        assert quantizer(z).loss < 0.5

    def test_dead_codes_come_back_after_a_jump(self, name):
        quantizer = self.make(name)
        self.train(quantizer, clusters(), 100)
        assert self.train(quantizer, clusters(shift=50.0), 400)["usage"] > 0.9

    def test_parts_of_a_batch_sum_to_the_whole(self, name):
        whole, parted = self.make(name), self.make(name)
        self.train(whole, clusters(), 5)
        self.train(parted, clusters(), 5, parts=4)
        assert torch.allclose(whole.codebook, parted.codebook, atol=1e-5)

    def test_nearest_is_the_nearest(self, name):
        quantizer, z = self.make(name), torch.randn(50, D)
        brute = torch.cdist(z, quantizer.codebook).argmin(1)
        assert torch.equal(quantizer.nearest(z), brute)

    def test_gradients_pass_straight_through(self, name):
        quantizer = self.make(name)
        z = clusters().requires_grad_()
        quantizer(z).x.sum().backward()
        assert torch.equal(z.grad, torch.ones_like(z))

    def test_stays_fp32_under_autocast(self, name):
        with torch.autocast("cpu", torch.bfloat16):
            found = self.make(name)(clusters(), torch.arange(B), torch.arange(B))
        assert found.statistics.dtype == found.x.dtype == torch.float32
        assert found.statistics[:K].sum() == B * 16


@pytest.mark.parametrize(("strides", "channels"), [((4,), 1), ((4, 2), 3), ((2, 2, 2), 3)])
def test_vqvae2_encodes_and_decodes(strides, channels):
    config = VQVAE2Config(strides=strides, hidden=8, residual_layers=1, residual_hidden=4, dim=4, entries=8)
    net = VQVAE2(config, channels, batch=2).eval()
    x = torch.randn(2, channels, 32, 32)
    y, levels = net(x)
    assert y.shape == x.shape
    codes = net.encode(x)
    assert {n: c.shape[-1] for n, c in codes.items()} == config.grids(32)
    assert list(levels) == list(reversed(config.names))
    assert torch.allclose(net.decode_codes(codes), y, atol=1e-5)
    with pytest.raises(ValueError, match="multiple of"):
        config.grids(33)


def prior(name: str, upper: bool) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(layers=2, heads=2, width=32, dropout=0.1, token_dropout=0.1)
    net = PRIORS[name](config, (4, 3), 11, 5, ((7, (2, 2)),) if upper else ())
    for p in net.parameters():  # larger than at the start, so that differences would show
        torch.nn.init.normal_(p, std=0.2)
    return net


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("name", PRIORS)
class TestPrior:
    def condition(self, upper):
        return torch.tensor([0, 4, -1]), [torch.randint(0, 7, (3, 2, 2))] if upper else []

    def test_causality(self, name, upper):
        net = prior(name, upper).eval()
        label, above = self.condition(upper)
        codes = torch.randint(0, 11, (3, 12))
        logits = net(codes, net.context(label, above))
        for t in range(12):
            changed = codes.clone()
            changed[:, t] = (changed[:, t] + 1) % 11
            other = net(changed, net.context(label, above))
            assert torch.equal(other[:, : t + 1], logits[:, : t + 1])
            assert t == 11 or not torch.allclose(other[:, t + 1], logits[:, t + 1])

    def test_cached_equals_uncached(self, name, upper):
        net = prior(name, upper).eval()
        label, above = self.condition(upper)
        seen = []

        def greedy(logits, _):
            seen.append(logits)
            return logits.argmax(-1)

        codes = net.sample(label, above, torch.zeros(3, 12), greedy)
        logits = net(codes.flatten(1), net.context(label, above))
        assert (torch.stack(seen, 1) - logits).abs().max() < 1e-5
        assert torch.equal(codes.flatten(1), logits.argmax(-1))

    def test_conditions_matter(self, name, upper):
        net = prior(name, upper).eval()
        label, above = self.condition(upper)
        codes = torch.randint(0, 11, (3, 4, 3))
        base = net.log_likelihood(codes, label, above)
        assert not torch.allclose(base, net.log_likelihood(codes, (label + 1) % 5, above))
        if upper:
            assert not torch.allclose(base, net.log_likelihood(codes, label, [(above[0] + 1) % 7]))

    def test_loss_is_minus_log_likelihood_without_dropout(self, name, upper):
        net = prior(name, upper).eval()
        label, above = self.condition(upper)
        codes = torch.randint(0, 11, (3, 4, 3))
        assert net.loss(codes, label, above).item() == pytest.approx(-net.log_likelihood(codes, label, above).mean().item())

    def test_guidance_one_changes_nothing_and_more_does(self, name, upper):
        net = prior(name, upper).eval()
        label, above = self.condition(upper)
        numbers = uniforms(0, range(3), (4, 3))
        plain = net.sample(label, above, numbers, Choice())
        assert torch.equal(plain, net.sample(label, above, numbers, Choice(), guidance=1.0))
        assert not torch.equal(plain, net.sample(label, above, numbers, Choice(), guidance=4.0))

    def test_a_sample_does_not_depend_on_its_batch(self, name, upper):
        net = prior(name, upper).eval()
        label, above = self.condition(upper)
        numbers = uniforms(0, range(3), (4, 3))
        together = net.sample(label, above, numbers, Choice())
        alone = net.sample(label[1:2], [a[1:2] for a in above], numbers[1:2], Choice())
        assert torch.equal(together[1:2], alone)


def test_a_prior_learns_a_simple_language():
    """Rows that repeat their label: bits fall well below a uniform guess's."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(layers=1, heads=2, width=32, dropout=0.0), (3, 3), 5, 5)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(60):
        label = torch.randint(0, 5, (32,))
        loss = net.loss(label[:, None, None].expand(-1, 3, 3), label, [])
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
