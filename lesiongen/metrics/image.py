"""Image quality: RGB in [0, 1], per image."""

import torch
import torch.nn.functional as F


def psnr(a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, [B]; capped at 100 for equal images."""
    mse = (a_BCHW - b_BCHW).square().flatten(1).mean(1)
    return -10 * torch.log10(mse.clamp(min=1e-10))


def ssim(a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> torch.Tensor:
    """Structural similarity, [B]: Gaussian window of 11 pixels, σ = 1.5, no padding (Wang et al. 2004)."""
    channels = a_BCHW.shape[1]
    x = torch.arange(11, device=a_BCHW.device, dtype=a_BCHW.dtype) - 5
    g = torch.exp(-(x**2) / (2 * 1.5**2))
    g = (g / g.sum()).expand(channels, 1, 1, 11)

    def blur(image):
        return F.conv2d(F.conv2d(image, g, groups=channels), g.transpose(2, 3), groups=channels)

    mean_a, mean_b = blur(a_BCHW), blur(b_BCHW)
    var_a = blur(a_BCHW**2) - mean_a**2
    var_b = blur(b_BCHW**2) - mean_b**2
    covariance = blur(a_BCHW * b_BCHW) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return value.flatten(1).mean(1)
