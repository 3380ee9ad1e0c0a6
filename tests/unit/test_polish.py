"""The objective of polishing: every kind of tokenizer, grey images, bf16; only the decoder learns."""

import pytest
import torch

from lesiongen.tokenizers import make
from lesiongen.tokenizers.losses import LossConfig, ReconstructionLoss
from lesiongen.tokenizers.polish import Objective
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
def test_only_the_decoder_learns(kind, channels, precision):
    torch.manual_seed(0)
    tokenizer = make(KINDS[kind], channels, batch=4)
    tokenizer.initialise(torch.rand(4, channels, 32, 32) * 2 - 1)
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    module = Objective(tokenizer, ReconstructionLoss(LossConfig(perceptual=0.02), 0.05))
    names = {name for name, _ in module.named_parameters()}
    assert names and all(name.startswith("net.decoder.") for name in names)
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    batch = {"image": torch.randint(0, 256, (4, channels, 32, 32), dtype=torch.uint8)}
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = module(batch)["loss"]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert {name for name, p in tokenizer.named_parameters() if p.grad is not None} <= {n.removeprefix("net.") for n in names}
    changed = {name for name, value in tokenizer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
