"""Measure the similarity of two batches of images: PSNR, SSIM, MS-SSIM. Every function returns one value per image.

Images are float in [0, 1]. Shapes: B batch, C channels, H height, W width.
"""

import torch
import torch.nn.functional as F


def psnr(a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> torch.Tensor:
    """Returns the peak signal-to-noise ratio in dB, [B], capped at 100 dB; for equal images it would be infinite."""
    mse = (a_BCHW - b_BCHW).square().flatten(1).mean(1)
    return -10 * torch.log10(mse.clamp(min=1e-10))


def ssim(a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> torch.Tensor:
    """Returns the structural similarity, [B], with a Gaussian window of 11 pixels, σ = 1.5, no padding (Wang et al. 2004)."""
    luminance, contrast = _similarity(a_BCHW, b_BCHW)
    return (luminance * contrast).flatten(1).mean(1)


def ms_ssim(a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> torch.Tensor:
    """Returns the multi-scale structural similarity, [B] (Wang, Simoncelli, Bovik 2003).

    Uses the paper's five scales, or fewer if the images are too small for the 11-pixel window (five from 176 px, three from
    44 px). The weights of the scales in use are divided by their sum.

    Raises:
        ValueError: The images are smaller than the window.
    """
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    scales = sum(min(a_BCHW.shape[-2:]) >> i >= 11 for i in range(len(weights)))
    if not scales:
        raise ValueError(f"MS-SSIM needs images of at least 11×11 pixels, not {tuple(a_BCHW.shape[-2:])}")
    out = 1.0
    for i, weight in enumerate(weights[:scales]):
        luminance, contrast = _similarity(a_BCHW, b_BCHW)
        value = luminance * contrast if i + 1 == scales else contrast
        # The ReLU is usual in implementations: a negative mean has no fractional power.
        out = out * F.relu(value.flatten(1).mean(1)) ** (weight / sum(weights[:scales]))
        a_BCHW, b_BCHW = F.avg_pool2d(a_BCHW, 2), F.avg_pool2d(b_BCHW, 2)
    return out


def _similarity(a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the maps of SSIM's luminance term and of its contrast × structure term, [B, C, H - 10, W - 10]."""
    channels = a_BCHW.shape[1]
    x = torch.arange(11, device=a_BCHW.device, dtype=a_BCHW.dtype) - 5
    g = torch.exp(-(x**2) / (2 * 1.5**2))
    g = (g / g.sum()).expand(channels, 1, 1, 11)

    def blur(image: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(image, g, groups=channels), g.transpose(2, 3), groups=channels)

    mean_a, mean_b = blur(a_BCHW), blur(b_BCHW)
    var_a = blur(a_BCHW**2) - mean_a**2
    var_b = blur(b_BCHW**2) - mean_b**2
    covariance = blur(a_BCHW * b_BCHW) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance, (2 * covariance + c2) / (var_a + var_b + c2)
