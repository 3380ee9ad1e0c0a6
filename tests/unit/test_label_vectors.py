"""Label vectors: what a polished decoder is told besides the codes."""

import pytest
import torch

from lesiongen.tokenizers import make
from lesiongen.tokenizers.code_noise import CodeNoise
from lesiongen.tokenizers.polish import Objective
from lesiongen.tokenizers.polish_loss import PolishLoss, PolishLossConfig
from lesiongen.tokenizers.texture import TextureConfig
from lesiongen.tokenizers.tokenizer import Tokenizer
from lesiongen.tokenizers.vqvae import VQVAEConfig
from lesiongen.tokenizers.vqvae2 import VQVAE2Config

SIZES = {"hidden": 16, "residual_layers": 1, "residual_hidden": 8, "dim": 8, "entries": 16}
KINDS = [VQVAEConfig(**SIZES), VQVAEConfig(output="tanh", **SIZES), VQVAE2Config(**SIZES)]
CLASSES = ("bkl", "mel", "nv")


def polished(model=KINDS[0], classes=CLASSES) -> tuple[Tokenizer, torch.Tensor]:
    """Returns a tokenizer with untrained texture and label vectors, and images that set its codebook."""
    torch.manual_seed(0)
    net, x = make(model, 3, batch=1), torch.rand(4, 3, 32, 32) * 2 - 1
    net.initialise(x)
    net.add_polish(TextureConfig(width=8), classes)
    return net.eval(), x


@pytest.mark.parametrize("model", KINDS)
def test_each_label_has_its_images(model):
    net, x = polished(model)
    codes, known = net.encode(x), torch.tensor([0, 1, 2, -1])
    plain = net.decode_codes(codes)
    assert torch.equal(net.decode_codes(codes, known), plain)  # untrained vectors add nothing
    torch.nn.init.normal_(net.label_vectors.table.weight[1])
    told = net.decode_codes(codes, known)
    assert torch.allclose(told[[0, 2, 3]], plain[[0, 2, 3]], atol=1e-6) and not torch.allclose(told[1], plain[1], atol=1e-3)
    assert torch.allclose(net.decode_codes(codes), plain, atol=1e-6)  # no label is known
    assert torch.allclose(net(x, label_B=known)[0], told, atol=1e-5)
    torch.nn.init.normal_(net.label_vectors.table.weight[3])
    assert not torch.allclose(net.decode_codes(codes), plain, atol=1e-3)


def test_label_numbers_are_those_of_the_decoder():
    """Whoever asks may number other classes in another order."""
    net, _ = polished()
    assert net.label_numbers(["nv", "", "bkl", "melon"]).tolist() == [2, -1, 0, -1]
    assert make(KINDS[0], 3, batch=1).label_numbers(["nv", ""]).tolist() == [-1, -1]


def test_the_decoder_learns_what_labels_say():
    """All images have one code; their lightness is that of their label, and in the mean of all images it is none of theirs."""
    net, x = polished()
    net.quantizers[0].codebook.zero_()
    objective = Objective(net, PolishLoss(PolishLossConfig(features=0, style=0, adversarial=0), classes=3), CodeNoise(net, 0.0))
    optimizer = torch.optim.Adam(objective.parameters(), 3e-3)
    lightness = torch.tensor([40, 120, 200, 120], dtype=torch.uint8)
    label = torch.tensor([0, 1, 2, -1]).repeat(4)
    image = lightness.repeat(4)[:, None, None, None].expand(-1, 3, 16, 16)
    for step in range(150):
        batch = {"image": image, "label": label, "position": torch.arange(16) + 16 * step}
        loss = objective(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = net.eval().decode_codes(net.encode(x[:, :, :16, :16]), torch.tensor([0, 1, 2, -1])).mean((1, 2, 3))
    assert torch.allclose(127.5 + 127.5 * found, lightness.float(), atol=10)


def test_images_without_any_label_are_polished_too():
    net, x = polished(classes=())
    objective = Objective(net, PolishLoss(PolishLossConfig(), classes=0), CodeNoise(net, 0.3))
    image = ((x + 1) * 127.5).to(torch.uint8)
    objective({"image": image, "label": torch.full((4,), -1), "position": torch.arange(4)})["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in objective.parameters())
    assert net.label_numbers(["", "nv"]).tolist() == [-1, -1]


def test_a_tenth_of_the_labels_is_left_out():
    net, x = polished()
    objective = Objective(net, PolishLoss(PolishLossConfig(features=0, style=0, adversarial=0), classes=3), CodeNoise(net, 0.0))
    told: list[torch.Tensor] = []
    net.label_vectors.register_forward_pre_hook(lambda module, args: told.append(args[0]))
    image = ((x + 1) * 127.5).to(torch.uint8)
    for step in range(100):
        objective({"image": image, "label": torch.full((4,), 2), "position": torch.arange(4) + 4 * step})
    whole = torch.cat(told)
    assert whole.unique().tolist() == [-1, 2] and 0.05 < (whole == -1).float().mean() < 0.15
    again = objective({"image": image, "label": torch.full((4,), 2), "position": torch.arange(4)})
    assert torch.equal(told[-1], told[0]) and again["loss"].isfinite()  # the position decides
