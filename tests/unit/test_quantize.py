"""Quantizers: tests that every kind must pass, and tests of single kinds."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lesiongen.tokenizers import quantize
from lesiongen.tokenizers.kmeans import kmeans, nearest
from lesiongen.tokenizers.quantize import QUANTIZERS
from lesiongen.tokenizers.quantizer import Quantizer, QuantizerConfig, rotate_onto
from lesiongen.tokenizers.vqvae2 import VQVAE2, VQVAE2Config

B, D, K = 8, 4, 16
BOOKS = [name for name in QUANTIZERS if name != "fsq"]
AVERAGED = ["ema", "cosine"]
LEVELS = {"fsq_levels": (4, 4)}  # 4 · 4 = K codes


def make(name: str, **more) -> Quantizer:
    torch.manual_seed(0)
    return quantize.build(QuantizerConfig(quantizer=name, dim=D, entries=K, **LEVELS, **more), B)


def clusters(shift: float = 0.0, number: int = K) -> torch.Tensor:
    """Returns vectors close to `number` distinct points, [B, D, 4, 4]."""
    g = torch.Generator().manual_seed(0)
    points = torch.randn(number, D, generator=g) * 3
    noise = torch.randn(B * 16, D, generator=g) * 0.01
    return (points[torch.arange(B * 16) % number] + noise + shift).view(B, 4, 4, D).movedim(-1, 1)


def train(quantizer, z, steps: int, parts: int = 1) -> dict[str, float]:
    """Trains as the training loop does: sums the statistics of the parts of a batch, then calls update() once."""
    trained = list(quantizer.parameters())
    adam = torch.optim.Adam(trained, lr=0.01) if trained else None
    for step in range(steps):
        slot, position = torch.arange(B), torch.arange(B) + step * B
        pieces = [torch.arange(B)[i::parts] for i in range(parts)]
        out = [quantizer(z[p], slot[p], position[p]) for p in pieces]
        if adam:
            adam.zero_grad()
            sum(q.loss for q in out).backward()
            adam.step()
        metrics = quantizer.update(sum(q.statistics for q in out))
    return metrics


@pytest.mark.parametrize("name", QUANTIZERS)
class TestEvery:
    def test_forward_writes_nothing(self, name):
        quantizer = make(name)
        before = copy.deepcopy(quantizer.state_dict())
        quantizer(clusters(), torch.arange(B), torch.arange(B)).x.sum()
        assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())

    def test_x_is_what_the_codes_stand_for(self, name):
        found = make(name)(clusters())
        assert found.codes.shape == (B, 4, 4) and found.codes.min() >= 0 and found.codes.max() < K
        looked_up = make(name).lookup(found.codes)
        assert torch.equal(looked_up, found.x) if name in BOOKS else torch.allclose(looked_up, found.x, atol=1e-6)

    def test_a_gradient_reaches_the_encoder(self, name):
        quantizer, z = make(name), clusters().requires_grad_()
        found = quantizer(z)
        (found.x.square().sum() + found.loss).backward()
        assert z.grad.isfinite().all() and (z.grad.abs().sum(1) > 0).all()
        trained = {k for k, p in quantizer.named_parameters() if p.grad is not None}
        assert trained == {k for k, _ in quantizer.named_parameters()}
        assert ("book.weight" in trained) == (name == "gradient")

    def test_parts_of_a_batch_sum_to_the_whole(self, name):
        z, every = clusters(), torch.arange(B)
        whole = make(name)(z, every, every).statistics
        halves = sum(make(name)(z[p], every[p], every[p]).statistics for p in (every[::2], every[1::2]))
        assert whole.shape == (make(name).statistics_size,) and torch.allclose(whole, halves, atol=1e-4)

    def test_update_is_the_same_on_every_rank(self, name):
        one = make(name)
        other, z = copy.deepcopy(one), clusters()
        for step in range(5):
            statistics = one(z, torch.arange(B), torch.arange(B) + step * B).statistics
            assert one.update(statistics.clone()) == other.update(statistics.clone())
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())

    def test_update_says_how_codes_are_used(self, name):
        counts = torch.zeros(make(name).statistics_size)
        counts[:4] = 1.0
        metrics = make(name).update(counts)
        assert metrics["usage"] == 0.25 and metrics["perplexity"] == pytest.approx(4) and "revived" in metrics

    def test_stays_fp32_under_autocast(self, name):
        z, every = clusters().requires_grad_(), torch.arange(B)
        plain = make(name)(z, every, every)
        with torch.autocast("cpu", torch.bfloat16):
            found = make(name)(z, every, every)
        assert found.statistics.dtype == found.x.dtype == found.loss.dtype == torch.float32
        assert torch.equal(found.x, plain.x) and torch.equal(found.codes, plain.codes) and found.loss == plain.loss
        assert found.statistics[:K].sum() == B * 16

    def test_a_nan_reaches_the_loss_and_stops_nothing(self, name):
        z, every = clusters(), torch.arange(B)
        z[0, 0] = torch.nan
        found = make(name)(z, every, every)
        assert not (found.x.sum() + found.loss).isfinite()
        assert found.codes.min() >= 0 and found.codes.max() < K

    def test_initialise_uses_every_code(self, name):
        quantizer, z = make(name), clusters()
        quantizer.initialise(z)
        statistics = quantizer(z, torch.arange(B), torch.arange(B)).statistics
        if name in BOOKS:
            assert (statistics[:K] == B * 16 / K).all()
            assert quantizer.update(statistics)["revived"] == 0


@pytest.mark.parametrize("name", BOOKS)
class TestCodebook:
    def test_nearest_is_the_nearest(self, name, monkeypatch):
        monkeypatch.setattr("lesiongen.tokenizers.kmeans.MAX_DISTANCES", {"cpu": 7 * K})
        quantizer = make(name)
        z = quantizer.to_code_space(torch.randn(50, D))
        assert torch.equal(quantizer.nearest(z), torch.cdist(z, quantizer.codebook).argmin(1))

    def test_finds_the_clusters_and_uses_every_code(self, name):
        quantizer, z = make(name), clusters()
        metrics = train(quantizer, z, 400 if name == "gradient" else 100)
        assert metrics["usage"] == 1.0 and metrics["perplexity"] > 0.8 * K
        assert quantizer(z).loss < (0.25 if name == "gradient" else 0.125)

    def test_straight_through_passes_gradients_as_they_are(self, name):
        z = clusters().requires_grad_()
        make(name)(z).x.sum().backward()
        expected = torch.ones_like(z)
        if name == "cosine":
            (expected,) = torch.autograd.grad(F.normalize(z, dim=1).sum(), z)
        assert torch.allclose(z.grad, expected, atol=1e-6)

    def test_rotation_changes_the_gradient_alone(self, name):
        z, upstream = clusters(), torch.arange(B * D * 16.0).view(B, D, 4, 4)
        plain, rotated = z.clone().requires_grad_(), z.clone().requires_grad_()
        one, other = make(name)(plain), make(name, estimator="rotation")(rotated)
        assert torch.equal(one.x, other.x) and torch.equal(one.codes, other.codes) and one.loss == other.loss
        one.x.backward(upstream), other.x.backward(upstream)
        assert not torch.allclose(plain.grad, rotated.grad)


def test_rotation_is_the_papers():
    """R rotates z's direction onto q's and does not change vectors orthogonal to both. The gradient is |q|/|z| Rᵀg."""
    torch.manual_seed(0)
    z, q, g = torch.randn(3, 6, 5, dtype=torch.float64).unbind()
    z.requires_grad_()
    y = rotate_onto(z, q)
    assert torch.allclose(y, q)
    y.backward(g)
    for i in range(6):
        e, t = (F.normalize(v[i], dim=0).detach()[:, None] for v in (z, q))
        r = F.normalize(e + t, dim=0)
        rotation = torch.eye(5, dtype=torch.float64) - 2 * r @ r.T + 2 * t @ e.T
        assert torch.allclose(rotation @ rotation.T, torch.eye(5, dtype=torch.float64))
        scale = q[i].norm() / z[i].norm().detach()
        assert torch.allclose(z.grad[i], scale * rotation.T @ g[i])


@pytest.mark.parametrize("name", AVERAGED)
class TestAveraged:
    def test_codebook_is_fp32_buffers(self, name):
        quantizer = make(name)
        assert not list(quantizer.parameters())
        assert all(b.dtype == torch.float32 for b in quantizer.buffers())
        assert set(quantizer.state_dict()) == {n for n, _ in quantizer.named_buffers()}

    def test_dead_codes_come_back_after_a_jump(self, name):
        quantizer = make(name)
        train(quantizer, clusters(), 100)
        jumped = clusters().flip(1) if name == "cosine" else clusters(shift=50.0)
        assert train(quantizer, jumped, 400)["usage"] > 0.9

    def test_recovers_from_collapse(self, name):
        """While all vectors are equal, one code stays in use. When vectors differ again, most codes must be used."""
        quantizer = make(name)
        assert train(quantizer, torch.ones(B, D, 4, 4), 100)["perplexity"] == pytest.approx(1)
        assert train(quantizer, clusters(), 200)["perplexity"] > 0.8 * K

    def test_codes_never_used_stay_where_they_are_without_revival(self, name):
        quantizer = make(name, revive_below=0.0)
        before = quantizer.codebook.clone()
        assert train(quantizer, clusters(number=2), 3)["revived"] == 0
        unused = quantizer.count == 0
        assert unused.any() and torch.equal(quantizer.codebook[unused], before[unused])

    def test_parts_of_a_batch_train_as_the_whole(self, name):
        whole, parted = make(name), make(name)
        train(whole, clusters(), 5), train(parted, clusters(), 5, parts=4)
        assert torch.allclose(whole.codebook, parted.codebook, atol=1e-5)


def test_cosine_codes_have_length_one():
    quantizer = make("cosine")
    train(quantizer, clusters(), 10)
    assert torch.allclose(quantizer.codebook.norm(dim=1), torch.ones(K))


def test_the_gradient_codebook_learns_by_equation_3():
    """The loss that pulls codes to vectors has weight 1; the loss that pulls vectors to codes has weight `commitment`."""
    quantizer, z = make("gradient", commitment=0.25), clusters().requires_grad_()
    found = quantizer(z)
    found.loss.backward()
    chosen = F.embedding(found.codes, quantizer.codebook.detach()).movedim(-1, 1)
    assert torch.allclose(z.grad, 0.25 * 2 * (z - chosen).detach() / z.numel(), atol=1e-7)
    pull = 2 * (chosen - z.detach()) / z.numel()
    expected = torch.zeros(K, D).index_add_(0, found.codes.flatten(), pull.movedim(1, -1).reshape(-1, D))
    assert torch.allclose(quantizer.book.weight.grad, expected, atol=1e-6)


@pytest.mark.parametrize("levels", [(8, 8, 8), (8, 5, 5, 5), (3, 4), (7,)])
def test_fsq_reaches_every_code(levels):
    """Vectors from the inverse of the paper's formula get every code once, and lookup() of the codes returns these vectors."""
    entries = torch.tensor(levels).prod().item()
    quantizer = quantize.build(QuantizerConfig(quantizer="fsq", dim=len(levels), entries=entries, fsq_levels=levels), 1)
    with torch.no_grad():
        for layer in (quantizer.down, quantizer.up):
            layer.weight.copy_(torch.eye(len(levels))), layer.bias.zero_()
    values = [torch.arange(n) - n // 2 for n in levels]
    q = torch.stack(torch.meshgrid(*values, indexing="ij"), -1).view(1, entries, 1, len(levels)).float()
    size = torch.tensor(levels)
    half, offset = (size - 1) * 1.001 / 2, (size + 1) % 2 / 2
    z = torch.atanh((q + offset) / half) - torch.atanh(offset / half)
    found = quantizer(z.movedim(-1, 1))
    assert torch.equal(found.codes.unique(), torch.arange(entries))
    assert torch.allclose(quantizer.lookup(found.codes).movedim(1, -1) * (size // 2), q, atol=1e-6)


@pytest.mark.parametrize("name", ["fsq", "cosine", "ema"])
def test_agrees_with_vector_quantize_pytorch(name):
    other = pytest.importorskip("vector_quantize_pytorch")
    z = clusters()
    if name == "fsq":
        ours, theirs = make(name), other.FSQ([4, 4], dim=D)
        theirs.project_in, theirs.project_out = ours.down, ours.up
        x, codes = theirs(z)
    else:
        ours = make(name)
        theirs = other.VectorQuantize(D, codebook_size=K, use_cosine_sim=name == "cosine", accept_image_fmap=True).eval()
        theirs.codebook = ours.codebook
        x, codes, _ = theirs(z)
    assert torch.equal(ours(z).codes, codes.long())
    assert torch.allclose(ours(z).x, x, atol=1e-5)


def test_kmeans_finds_separated_blobs():
    torch.manual_seed(0)
    points = torch.randn(32, 8) * 10
    z = points[torch.arange(3200) % 32] + torch.randn(3200, 8) * 0.1
    centres = kmeans(z, 32)
    assert (torch.cdist(points, centres).amin(1) < 0.1).all()
    assert torch.equal(centres, kmeans(z, 32))
    assert torch.bincount(nearest(z, centres), minlength=32).min() == 100


def test_kmeans_copes_with_few_distinct_vectors():
    z = torch.eye(4).repeat(10, 1)
    assert (torch.cdist(torch.eye(4), kmeans(z, 16)).amin(1) == 0).all()
    with pytest.raises(ValueError, match="as many vectors"):
        kmeans(z, 41)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_initialise_goes_from_coarse_to_fine(name):
    """k-means initialises each level from its vectors, which depend on the coarser levels' codes. Most codes must be used."""
    torch.manual_seed(0)
    config = VQVAE2Config(
        strides=(2, 2), hidden=8, residual_layers=1, residual_hidden=4, quantizer=name, dim=D, entries=K, **LEVELS
    )
    net, x = VQVAE2(config, 3, B), torch.rand(B, 3, 32, 32)
    net.initialise(x)
    for level, found in net(x)[1].items():
        assert name == "fsq" or len(found.codes.unique()) > 0.9 * K, level


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        ({"quantizer": "fsq", "entries": 100}, "set entries to 512"),
        ({"quantizer": "fsq", "fsq_levels": (2, 8)}, "at least 3"),
        ({"quantizer": "fsq", "kmeans": True}, "no codebook"),
        ({"entries": 1}, "at least 2"),
        ({"decay": 1.0}, "between 0 and 1"),
    ],
)
def test_a_wrong_config_says_what_to_change(wrong, advice):
    with pytest.raises(ValueError, match=advice):
        QuantizerConfig(**wrong)
