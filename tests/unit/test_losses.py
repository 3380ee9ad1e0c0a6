"""Reconstruction losses: 0 for equal images, larger for larger errors, with a gradient where images differ."""

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import vgg16

from hpc.errors import UserError
from lesiongen.data.similarity import ms_ssim, ssim
from lesiongen.tokenizers.losses import LossConfig, ReconstructionLoss


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """Returns the path of random weights in the format of `lpips_weights`."""
    torch.manual_seed(0)
    tensors = {k: v for k, v in vgg16(weights=None).state_dict().items() if k.startswith("features.")}
    tensors |= {f"lin{i}.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(tensors, path)
    return str(path)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("term", ["mse", "nmse", "l1", "ssim", "ms_ssim", "perceptual", "lpips"])
def test_each_term(term, channels, weights):
    config = LossConfig(**({"mse": 0.0} | {term: 1.0}), lpips_weights=weights)
    loss = ReconstructionLoss(config, variance=0.05)
    torch.manual_seed(1)
    x = torch.rand(2, channels, 32, 32) * 2 - 1
    noise = torch.randn_like(x)
    assert float(loss(x, x)[0]) == pytest.approx(0, abs=1e-5)
    values = [float(loss((x + s * noise).clamp(-1, 1), x)[0]) for s in (0.05, 0.2, 0.6)]
    assert values == sorted(values) and values[0] > 0
    y = (x + 0.1 * noise).requires_grad_()
    total, terms = loss(y, x)
    total.backward()
    assert y.grad.abs().sum() > 0
    assert terms.keys() >= {"mse", term}
    assert not list(loss.parameters()), "frozen weights must not be parameters, or the engine would train them"


def test_the_perceptual_distance_sees_blur_that_mse_does_not():
    """Of two errors with equal MSE, blur and noise of low contrast, a blurred texture must be the worse one."""
    from torchvision.transforms.v2.functional import gaussian_blur

    torch.manual_seed(0)
    texture = torch.nn.functional.interpolate(torch.randn(4, 3, 32, 32), scale_factor=2).clamp(-1, 1) * 0.3
    blurred = gaussian_blur(texture, [7, 7], [2.0, 2.0])
    shifted = texture + (blurred - texture).square().mean().sqrt()  # another colour, the same texture
    loss = ReconstructionLoss(LossConfig(mse=0.0, perceptual=1.0), variance=0.05)
    (of_blur, blur), (of_shift, shift) = loss(blurred, texture), loss(shifted, texture)
    assert float(blur["mse"]) == pytest.approx(float(shift["mse"]), rel=1e-3)
    assert float(of_blur) > 2 * float(of_shift)


def test_nmse_is_mse_over_the_datas_variance():
    x, y = torch.rand(2, 3, 16, 16) * 2 - 1, torch.rand(2, 3, 16, 16) * 2 - 1
    loss, terms = ReconstructionLoss(LossConfig(mse=0.0, nmse=1.0), variance=0.05)(y, x)
    assert float(loss) == pytest.approx(float(terms["mse"]) / 4 / 0.05)


def test_ms_ssim_at_one_scale_is_ssim():
    a, b = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16) * 0.5 + 0.25
    assert torch.allclose(ms_ssim(a, b), ssim(a, b).clamp(min=0), atol=1e-6)
    assert torch.allclose(ms_ssim(a, a), torch.ones(2), atol=1e-5)
    with pytest.raises(ValueError, match="11 pixels"):
        ms_ssim(a[..., :8, :8], b[..., :8, :8])


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="lpips_weights"):
        LossConfig(lpips=1.0)
    with pytest.raises(ValueError, match="above 0"):
        LossConfig(mse=0.0)
    save_file({"other": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="does not hold LPIPS"):
        ReconstructionLoss(LossConfig(lpips=1.0, lpips_weights=str(tmp_path / "x.safetensors")), 0.05)
