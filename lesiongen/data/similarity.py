"""Image quality: RGB in [0, 1], per image."""

import torch
import torch.nn.functional as F


def psnr(a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, [B]; capped at 100 for equal images."""
    mse = (a_BCHW - b_BCHW).square().flatten(1).mean(1)
    return -10 * torch.log10(mse.clamp(min=1e-10))


def ssim(a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> torch.Tensor:
    """Structural similarity, [B]: Gaussian window of 11 pixels, σ = 1.5, no padding (Wang et al. 2004)."""
    luminance, contrast = _similarity(a_BCHW, b_BCHW)
    return (luminance * contrast).flatten(1).mean(1)


def ms_ssim(a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> torch.Tensor:
    """Multi-scale structural similarity, [B] (Wang, Simoncelli, Bovik 2003): five scales, or as many as leave the window
    room (five from 176 px, three from 44), with the paper's weights made to sum to one."""
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    scales = sum(min(a_BCHW.shape[-2:]) >> i >= 11 for i in range(len(weights)))
    if not scales:
        raise ValueError(f"MS-SSIM needs images of 11 pixels or more, not {tuple(a_BCHW.shape[-2:])}")
    out = 1.0
    for i, weight in enumerate(weights[:scales]):
        luminance, contrast = _similarity(a_BCHW, b_BCHW)
        value = luminance * contrast if i + 1 == scales else contrast
        # A negative mean has no fractional power; the ReLU is what every implementation uses.
        out = out * F.relu(value.flatten(1).mean(1)) ** (weight / sum(weights[:scales]))
        a_BCHW, b_BCHW = F.avg_pool2d(a_BCHW, 2), F.avg_pool2d(b_BCHW, 2)
    return out


def _similarity(a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of luminance and of contrast × structure."""
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
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance, (2 * covariance + c2) / (var_a + var_b + c2)
