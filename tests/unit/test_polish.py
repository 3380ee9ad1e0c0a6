"""Polishing: each kind of tokenizer, grey images, bf16; all its parts learn, from images that are not blurred."""

import pytest
import torch

from lesiongen.data.augment import augment
from lesiongen.experiment import PolishConfig
from lesiongen.tokenizers import make
from lesiongen.tokenizers.code_noise import CodeNoise
from lesiongen.tokenizers.polish import Objective
from lesiongen.tokenizers.polish_loss import PolishLoss, PolishLossConfig
from lesiongen.tokenizers.texture import TextureConfig
from lesiongen.tokenizers.vqvae import VQVAEConfig
from lesiongen.tokenizers.vqvae2 import VQVAE2Config

SIZES = {"hidden": 16, "residual_layers": 1, "residual_hidden": 8, "dim": 8, "entries": 16}
KINDS = {
    "vqvae": VQVAEConfig(**SIZES),
    "tanh": VQVAEConfig(output="tanh", **SIZES),
    "vqvae2": VQVAE2Config(**SIZES),
    "recomputed": VQVAE2Config(checkpoint=True, **SIZES),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_all_parts_learn(kind, channels, precision):
    torch.manual_seed(0)
    tokenizer = make(KINDS[kind], channels, batch=4)
    tokenizer.initialise(torch.rand(4, channels, 32, 32) * 2 - 1)
    tokenizer.add_polish(TextureConfig(width=8), "abc")
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    module = Objective(tokenizer, PolishLoss(PolishLossConfig(), 3, channels), CodeNoise(tokenizer, 0.3))
    filters = [value for value in module.loss.critic.parameters() if value.dim() == 4]
    critic = [value.detach().clone() for value in filters]
    names = {name for name, _ in module.named_parameters()}
    assert {".".join(name.split(".")[:2]) for name in names} == {
        "net.decoder",
        "net.texture",
        "net.label_vectors",
        "loss.critic",
    }
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    image = torch.randint(0, 256, (4, channels, 32, 32), dtype=torch.uint8)
    batch = {"image": image, "label": torch.tensor([0, 1, 2, -1]), "position": torch.arange(4)}
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            out = module(batch)
        losses.append(float(out["metrics"]["compared"]))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert {name for name, p in tokenizer.named_parameters() if p.grad is not None} <= {n.removeprefix("net.") for n in names}
    changed = {name for name, value in tokenizer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and {name.split(".")[0] for name in changed} == {"decoder", "texture", "label_vectors"}
    assert not any(torch.equal(*values) for values in zip(filters, critic, strict=True))


def test_the_decoder_learns_images_that_are_not_blurred():
    """The default views have the very pixels of the image: none is interpolated."""
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    pixels = image.flatten(1).sort(1).values
    views = [augment(image, 32, PolishConfig().augment, torch.Generator().manual_seed(seed)) for seed in range(16)]
    assert all(torch.equal(view.flatten(1).sort(1).values, pixels) for view in views)
    assert any(not torch.equal(view, views[0]) for view in views)


def test_the_held_out_loss_is_without_the_critic():
    """A critic changes from one evaluation to the next."""
    loss = PolishLoss(PolishLossConfig(), classes=0)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    found, terms = loss(x, x.repeat(2, 1, 1, 1), x, torch.arange(2))
    assert "style" in terms and not terms.keys() & {"critic", "adversarial"} and found == terms["compared"]
