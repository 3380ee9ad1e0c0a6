"""The critic of polishing: what it learns, and whom each of its two terms teaches."""

from collections.abc import Callable

import pytest
import torch

from lesiongen.tokenizers.polish_critic import Critic
from lesiongen.tokenizers.polish_features import Compared, PolishFeatures

SIZES, CLASSES = [6, 10], 2
NONE = torch.full((8,), -1)  # labels of a batch without labels
Make = Callable[[torch.Tensor], torch.Tensor]  # makes features of the images, or of draws, from those of the mean images


def compared(images: Make, draws: Make, number: int = 8) -> list[Compared]:
    """Returns features of two kinds."""
    found = []
    for size in SIZES:
        mean = torch.randn(number, size, 8, 8)
        found.append(Compared(torch.cat([draws(mean), draws(mean)]), images(mean), mean))
    return found


def noisy(mean: torch.Tensor) -> torch.Tensor:
    return mean + 0.3 * torch.randn_like(mean)


def in_pairs(mean: torch.Tensor) -> torch.Tensor:
    """Adds noise that each feature shares with its neighbour. Each feature by itself is distributed as with noisy()."""
    return mean + 0.3 * torch.randn_like(mean[:, ::2]).repeat_interleave(2, 1)


def opposite(mean: torch.Tensor) -> torch.Tensor:
    """Returns noise around the negative. All features together are distributed as with noisy(); given the mean they are not."""
    return noisy(-mean)


def train(images: Make, draws: Make, steps: int = 250) -> float:
    """Trains a critic. Returns its mean loss in the last tenth of the steps."""
    torch.manual_seed(0)
    critic, losses = Critic(SIZES, CLASSES), []
    optimizer = torch.optim.AdamW(critic.parameters(), 2e-3, betas=(0.9, 0.95))
    for _ in range(steps):
        loss, _ = critic(compared(images, draws), NONE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-steps // 10 :]) / (steps // 10)


@pytest.mark.parametrize("draws", [in_pairs, opposite, lambda mean: mean])
def test_it_tells_draws_from_images(draws):
    """Also where single features are right: they go together wrongly, or do not fit the mean image."""
    assert train(noisy, draws) < 0.5


def test_it_judges_whether_the_texture_fits_the_label():
    """Draws have the texture of the other class. All draws together are distributed as all images are."""
    torch.manual_seed(0)
    critic, losses = Critic(SIZES, CLASSES), {True: [], False: []}
    optimizer = torch.optim.AdamW(critic.parameters(), 2e-3, betas=(0.9, 0.95))
    label = torch.tensor([0, 1] * 4)
    strength = torch.tensor([0.1, 0.6])[label][:, None, None, None]
    for step in range(400):
        told = step % 2 == 0
        found = compared(
            lambda mean: mean + strength * torch.randn_like(mean), lambda mean: mean + strength.flip(0) * torch.randn_like(mean)
        )
        loss, _ = critic(found, label if told else NONE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[told].append(float(loss.detach()))
    assert sum(losses[True][-20:]) / 20 < 0.7 and sum(losses[False][-20:]) / 20 > 0.9


def test_it_cannot_tell_right_draws_from_images():
    assert train(noisy, noisy) > 0.9


def test_draws_learn_to_be_taken_for_images():
    """Both sides learn from one sum, with one optimizer. The draws' noise starts too weak by half."""
    torch.manual_seed(0)
    critic, scale = Critic(SIZES, CLASSES), torch.nn.Parameter(torch.tensor(0.5))
    optimizer = torch.optim.AdamW([*critic.parameters(), scale], 2e-3, betas=(0.9, 0.95))
    for _ in range(400):
        loss, adversarial = critic(compared(noisy, lambda mean: mean + scale * 0.3 * torch.randn_like(mean)), NONE)
        optimizer.zero_grad()
        (loss + 0.1 * adversarial).backward()
        optimizer.step()
    assert 0.8 < float(scale.detach()) < 1.2


def test_each_term_teaches_one_side():
    critic, found = Critic(SIZES, CLASSES), compared(noisy, in_pairs)
    draws = [kind.draws.requires_grad_() for kind in found]
    loss, adversarial = critic(found, NONE)
    weights = list(critic.parameters())
    of_loss = torch.autograd.grad(loss, [*weights, *draws], allow_unused=True, retain_graph=True)
    assert all(gradient is not None for gradient in of_loss[: len(weights)])
    assert all(gradient is None for gradient in of_loss[len(weights) :])
    of_adversarial = torch.autograd.grad(adversarial, [*weights, *draws], allow_unused=True)
    assert all(gradient is None for gradient in of_adversarial[: len(weights)])
    for gradient in of_adversarial[len(weights) :]:
        first, second = gradient.chunk(2)
        assert not first.any() and second.any()


def test_parts_of_a_batch_add_up():
    """The terms of a batch are the means of those of its halves, so micro-batches and ranks train as one batch does."""
    critic, found = Critic(SIZES, CLASSES), compared(noisy, in_pairs)
    label = torch.tensor([0, 1, -1, 1] * 2)
    whole = critic(found, label)
    halves = []
    for half in (slice(0, 4), slice(4, 8)):
        cut = [Compared(torch.cat([d[half] for d in k.draws.chunk(2)]), k.images[half], k.means[half]) for k in found]
        halves.append(critic(cut, label[half]))
    for term, *of_halves in zip(whole, *halves, strict=True):
        assert torch.isclose(term, sum(of_halves) / 2, atol=1e-6)


def test_features_of_the_mean_image_are_those_of_the_same_part():
    """Where the mean image is the image, and both draws are too, all three have the same features."""
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    for kind in PolishFeatures("test")(torch.cat([x, x]), x, torch.arange(4), x):
        assert torch.allclose(kind.means, kind.images, atol=1e-4)
        assert torch.allclose(kind.draws, kind.images.repeat(2, 1, 1, 1), atol=1e-4)


def test_features_of_the_mean_image_get_no_gradient():
    x, mean = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32, requires_grad=True)
    found = PolishFeatures("test")(torch.cat([x, x]), x, torch.arange(2), mean)
    assert not any(kind.means.requires_grad for kind in found)
