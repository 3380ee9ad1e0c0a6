"""Priors: tests that every kind must pass, and tests of single kinds."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml

from hpc.config import from_plain, to_yaml
from lesiongen import priors
from lesiongen.priors import make
from lesiongen.priors import prior as module
from lesiongen.priors.gated_pixelcnn import GatedPixelCNNConfig
from lesiongen.priors.gpt import GPTConfig, apply_rotary, rotary_table
from lesiongen.priors.pixelcnn import PixelCNNConfig
from lesiongen.priors.pixelsnail import PixelSNAILConfig
from lesiongen.priors.prior import Prior
from lesiongen.priors.sampling import TokenChooser, uniform_numbers

COMMON = {"layers": 2, "width": 32, "dropout": 0.1, "token_dropout": 0.1}
PRIORS = {
    "gpt": GPTConfig(heads=2, **COMMON),
    "gpt modulated": GPTConfig(heads=2, modulate=True, **COMMON),
    "pixelcnn": PixelCNNConfig(kernel=5, **COMMON),
    "gated_pixelcnn": GatedPixelCNNConfig(kernel=5, **COMMON),
    "pixelsnail": PixelSNAILConfig(residual_blocks=2, heads=2, kernel=3, **COMMON),
    "pixelsnail without attention": PixelSNAILConfig(residual_blocks=1, attention=False, kernel=5, **COMMON),
}
assert {config.kind for config in PRIORS.values()} == priors.PRIORS.keys(), "a kind of prior is missing in PRIORS"
NONE = torch.zeros(1, 0, dtype=torch.long)  # no facts


def prior(name: str, upper: bool = False, grid: tuple[int, int] = (4, 3), **changes) -> Prior:
    torch.manual_seed(0)
    above = ((7, (2, 2)),) if upper else ()
    net = make(replace(PRIORS[name], **changes), grid=grid, entries=11, facts={"label": 5, "sex": 2}, upper=above)
    for p in net.parameters():  # larger than the initial weights, so that differences show
        torch.nn.init.normal_(p, std=0.2)
    return net


def condition(upper: bool = False):
    """Returns the facts of three samples, and their codes of the coarser level if `upper`."""
    return torch.tensor([[0, 1], [4, -1], [-1, 0]]), [torch.randint(0, 7, (3, 2, 2))] if upper else []


def gradients(net: Prior, codes: torch.Tensor, facts: torch.Tensor, above: list) -> tuple[float, dict]:
    torch.manual_seed(1)  # dropout
    net.zero_grad()
    loss = net.token_losses(codes, facts, above).mean()
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in net.named_parameters()}


def test_a_modulated_gpt_starts_as_the_identity_and_learns_every_modulation():
    torch.manual_seed(0)
    net = make(PRIORS["gpt modulated"], grid=(4, 3), entries=11, facts={"label": 5}).eval()
    codes, context = torch.randint(0, 11, (2, 12)), net.context(torch.tensor([[0], [4]]), [])
    inputs = F.pad(net.tokens(codes[:, :-1]), (0, 0, 1, 0)) + context
    assert torch.equal(net.features(codes, context), net.norm(inputs))
    net.train()
    for _ in range(2):  # the gains are 0 at first, so shifts and scales have a gradient from the second step on
        loss = net.token_losses(codes.view(2, 4, 3), torch.tensor([[0], [4]]), []).mean()
        gradients = torch.autograd.grad(loss, [block.modulation.weight for block in net.blocks])
        with torch.no_grad():
            for block, gradient in zip(net.blocks, gradients, strict=True):
                block.modulation.weight -= gradient
    for gradient in gradients:
        assert all(part.abs().sum() > 0 for part in gradient.chunk(6))


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("name", PRIORS)
class TestPrior:
    def test_causality(self, name, upper):
        net = prior(name, upper).eval()
        facts, above = condition(upper)
        codes = torch.randint(0, 11, (3, 12))
        logits = net(codes, net.context(facts, above))
        for t in range(12):
            changed = codes.clone()
            changed[:, t] = (changed[:, t] + 1) % 11
            other = net(changed, net.context(facts, above))
            assert torch.equal(other[:, : t + 1], logits[:, : t + 1])
            assert t == 11 or not torch.allclose(other[:, t + 1 :], logits[:, t + 1 :])

    def test_cached_equals_uncached(self, name, upper):
        net = prior(name, upper).eval()
        facts, above = condition(upper)
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
        facts, above = condition(upper)
        codes = torch.randint(0, 11, (3, 12))

        def moved(facts, above) -> torch.Tensor:
            """Returns how much the logits of each position differ from `base`, [B, T]."""
            return (net(codes, net.context(facts, above)) - base).abs().amax(-1)

        base = net(codes, net.context(facts, above))
        for fact in range(2):
            other = facts.clone()
            other[:, fact] = (other[:, fact] + 1) % 2
            assert (moved(other, above) > 1e-3).all()
        if upper:
            assert (moved(facts, [(above[0] + 1) % 7]) > 1e-3).all()

    def test_token_losses_are_the_cross_entropies_of_the_logits(self, name, upper):
        net = prior(name, upper).eval()
        facts, above = condition(upper)
        codes = torch.randint(0, 11, (3, 4, 3))
        logits = net(codes.flatten(1), net.context(facts, above))
        expected = F.cross_entropy(logits.transpose(1, 2), codes.flatten(1), reduction="none")
        assert torch.allclose(net.token_losses(codes, facts, above), expected, atol=1e-5)

    def test_guidance_one_changes_nothing_and_more_does(self, name, upper):
        net = prior(name, upper).eval()
        facts, above = condition(upper)
        numbers = uniform_numbers(0, range(3), (4, 3))
        plain = net.sample(facts, above, numbers, TokenChooser())
        assert torch.equal(plain, net.sample(facts, above, numbers, TokenChooser(), guidance=lambda t: 1.0))
        assert not torch.equal(plain, net.sample(facts, above, numbers, TokenChooser(), guidance=lambda t: 4.0))

    def test_a_sample_does_not_depend_on_its_batch(self, name, upper):
        net = prior(name, upper).eval()
        facts, above = condition(upper)
        numbers = uniform_numbers(0, range(3), (4, 3))
        together = net.sample(facts, above, numbers, TokenChooser())
        alone = net.sample(facts[1:2], [a[1:2] for a in above], numbers[1:2], TokenChooser())
        assert torch.equal(together[1:2], alone)

    @pytest.mark.parametrize("given", [0, 1, 5, 11, 12])
    def test_a_prompt_of_its_own_first_tokens_gives_the_same_sample(self, name, upper, given):
        net = prior(name, upper).eval()
        facts, above = condition(upper)
        numbers = uniform_numbers(0, range(3), (4, 3))

        def strength(t: int) -> float:
            return 3.0

        free = net.sample(facts, above, numbers, TokenChooser(), strength)
        numbers[:, :given] = 0.0  # the numbers of given tokens are not used
        assert torch.equal(free, net.sample(facts, above, numbers, TokenChooser(), strength, free.flatten(1)[:, :given]))
        if 0 < given < 12:  # another prompt is kept, and what follows depends on it
            other = (free.flatten(1)[:, :given] + 1) % 11
            found = net.sample(facts, above, numbers, TokenChooser(), strength, other).flatten(1)
            assert torch.equal(found[:, :given], other)
            logits = net(found, net.context(facts, above))
            without = net(found, net.context(torch.full_like(facts, -1), above))
            chosen = [TokenChooser()((without + 3 * (logits - without))[:, t], numbers[:, t]) for t in range(given, 12)]
            assert torch.equal(found[:, given:], torch.stack(chosen, 1))

    def test_gradients_reach_every_parameter(self, name, upper):
        facts, above = condition(upper)
        _, found = gradients(prior(name, upper).train(), torch.randint(0, 11, (3, 4, 3)), facts, above)
        assert [n for n, g in found.items() if not g.abs().sum() > 0] == []

    def test_recomputed_activations_give_the_same_gradients(self, name, upper):
        facts, above = condition(upper)
        codes = torch.randint(0, 11, (3, 4, 3))
        loss, expected = gradients(prior(name, upper).train(), codes, facts, above)
        calls = []
        net = prior(name, upper, checkpoint=True).train()
        net.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        again, found = gradients(net, codes, facts, above)
        assert len(calls) == 2
        assert again == loss
        assert all(torch.equal(found[n], g) for n, g in expected.items())

    def test_a_loss_in_chunks_is_the_same(self, name, upper, monkeypatch):
        facts, above = condition(upper)
        codes = torch.randint(0, 11, (3, 4, 3))
        net = prior(name, upper).train()
        loss, expected = gradients(net, codes, facts, above)
        monkeypatch.setattr(module, "MAX_LOGITS", 5 * 11)  # 36 tokens in chunks of 5
        chunked, found = gradients(net, codes, facts, above)
        assert chunked == pytest.approx(loss, rel=1e-6)
        for n, g in expected.items():
            assert torch.allclose(found[n], g, rtol=1e-4, atol=1e-6), n


@pytest.mark.parametrize("name", PRIORS)
class TestEachPrior:
    @pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (2, 6), (6, 2)])
    def test_any_grid(self, name, grid):
        net = prior(name, upper=True, grid=grid).eval()
        facts, above = condition(upper=True)
        seen = []

        def note(logits, uniform):
            seen.append(logits)
            return TokenChooser()(logits, uniform)

        codes = net.sample(facts, above, uniform_numbers(0, range(3), grid), note)
        assert codes.shape == (3, *grid)
        logits = net(codes.flatten(1), net.context(facts, above))
        assert (torch.stack(seen, 1) - logits).abs().max() < 1e-5

    def test_no_position_sees_itself_or_what_follows(self, name):
        net = prior(name, grid=(3, 5)).eval()
        for t in range(15):
            assert not influence(net, t)[t:].any()

    def test_its_config_comes_back_from_yaml(self, name):
        config = PRIORS[name]
        assert from_plain(type(config), yaml.safe_load(to_yaml(config))) == config

    def test_it_learns_a_simple_language(self, name):
        """Every code equals the label. The bits per token must fall far below those of a uniform guess."""
        torch.manual_seed(0)
        config = replace(PRIORS[name], layers=1, dropout=0.0, token_dropout=0.0)
        net = make(config, grid=(3, 3), entries=5, facts={"label": 5})
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(60):
            label = torch.randint(0, 5, (32,))
            loss = net.token_losses(label[:, None, None].expand(-1, 3, 3), label[:, None], []).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() / math.log(2) < 0.3

    def test_it_learns_from_the_codes_before(self, name):
        """Every code equals the code above it, and there are no facts. So all rows except the first can be predicted."""
        torch.manual_seed(0)
        config = replace(PRIORS[name], layers=2, dropout=0.0, token_dropout=0.0)
        net = make(config, grid=(3, 3), entries=4, facts={})
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for step in range(160):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 160)
            codes = torch.randint(0, 4, (32, 1, 3)).expand(-1, 3, 3)
            found = net.token_losses(codes, NONE.expand(32, 0), [])
            optimizer.zero_grad()
            found.mean().backward()
            optimizer.step()
        assert found[:, 3:].mean().item() / math.log(2) < 0.5


def influence(net: Prior, t: int) -> torch.Tensor:
    """Returns how much the features of position t depend on each token, [T]: sums of absolute gradients."""
    embeddings = []
    hook = net.tokens.register_forward_hook(lambda *args: args[2].retain_grad() or embeddings.append(args[2]))
    codes = torch.arange(net.length)[None] % 11
    net.features(codes, net.context(torch.zeros(1, len(net.facts), dtype=torch.long), []))[:, t].sum().backward()
    hook.remove()
    found = embeddings[0].grad.abs().sum(-1)[0]
    return torch.nn.functional.pad(found, (0, net.length - len(found)))


def sees(name: str, **changes) -> torch.Tensor:
    """Returns which tokens the prediction in the middle of a 5×7 grid depends on, [5, 7]."""
    net = prior(name, grid=(5, 7), layers=4, kernel=3, **changes).double().eval()
    return influence(net, 2 * 7 + 3).view(5, 7) > 0


def test_gated_pixelcnn_sees_all_that_came_before():
    """Four 3×3 layers reach every token of the 5×7 grid."""
    assert torch.equal(sees("gated_pixelcnn").flatten(), torch.arange(35) < 2 * 7 + 3)


def test_pixelcnn_has_a_blind_spot():
    row = [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0], [0] * 7, [0] * 7]
    assert sees("pixelcnn").int().tolist() == row


def test_attention_leaves_pixelsnail_no_blind_spot():
    before = torch.arange(35) < 2 * 7 + 3
    assert not torch.equal(sees("pixelsnail", attention=False).flatten(), before)
    assert torch.equal(sees("pixelsnail").flatten(), before)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (PixelCNNConfig, {"kernel": 4}, "must be odd"),
        (PixelCNNConfig, {"width": 33}, "must be even"),
        (GatedPixelCNNConfig, {"kernel": 1}, "at least 3"),
        (PixelSNAILConfig, {"heads": 7}, "multiple of 2 × heads"),
        (PixelSNAILConfig, {"residual_blocks": 0}, "at least 1"),
        (GPTConfig, {"heads": 7}, "multiple of 4 × heads"),
    ],
)
def test_a_config_says_what_to_change(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_rotation_is_the_same_by_complex_and_by_real_numbers():
    table, x = rotary_table((3, 2), 8), torch.randn(2, 6, 2, 8)
    assert torch.allclose(
        apply_rotary(x, table).double(), apply_rotary(x.double(), table), atol=1e-6
    )  # only fp32 input uses complex numbers


def test_rotated_scores_depend_on_the_way_between_two_positions_alone():
    q, k = torch.randn(2, 8, dtype=torch.double)
    at = [apply_rotary(x.expand(1, 12, 1, 8), rotary_table((4, 3), 8))[0, :, 0].view(4, 3, 8) for x in (q, k)]
    score = {(a, b): float(at[0][a] @ at[1][b]) for a in ((0, 0), (1, 1), (2, 0)) for b in ((1, 1), (2, 2), (3, 1))}
    assert score[(0, 0), (1, 1)] == pytest.approx(score[(1, 1), (2, 2)]) == pytest.approx(score[(2, 0), (3, 1)])
    assert score[(0, 0), (1, 1)] != pytest.approx(score[(0, 0), (2, 2)], abs=1e-3)
