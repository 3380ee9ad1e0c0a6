"""Skin tone of an image as its individual typology angle (ITA), measured on the skin around the lesion.

ITA = atan((L* - 50) / b*) in degrees, in CIELAB under D65 (Chardon, Cretois and Hourseau 1991); a larger angle means lighter
skin. The classes are those of Del Bino and Bernerd 2013. Pixels of dermoscopy tell skin tone badly (arXiv:2602.10265):
lighting, polarisation and contact fluid move the angle, so it describes a set of images and no person.

The fairness slices use it for real images and for samples.

Shapes: B images, H × W pixels, P pixels of the border.
"""

import numpy as np
import torch

# The classes from light to dark, each with the angle above which it begins, in degrees.
TONES = ("very light", "light", "intermediate", "tan", "brown", "dark")
BOUNDS = (55.0, 41.0, 28.0, 10.0, -30.0)

SIDE = 64  # pixels are skipped until the image has about this side: a few thousand pixels are enough for a median
BORDER = 6  # the border is this fraction of the image's side wide: 1/6
DARKEST = 20.0  # L* of the darkest skin; what is darker is a dark corner, a hair or a lesion
BRIGHTEST = 97.0  # L* of the brightest skin; what is brighter is a reflection or a label
MOST_CHROMA = 45.0  # chroma of the most colourful skin; what is more colourful is ink, a ruler or a lesion
DEPARTURE = 2.5  # robust standard deviations of L* below the median at which a pixel is no longer skin
LEAST_SPREAD = 3.0  # standard deviation of L* that is taken for skin at least
LEAST_SHARE = 0.05  # of the border that must be skin
LEAST_YELLOW = 0.1  # least b* of skin, above the rounding errors of a grey image in three channels

_WHITE = (0.95047, 1.0, 1.08883)  # D65
_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))


def to_lab(rgb_P3: torch.Tensor) -> torch.Tensor:
    """Converts colours from sRGB to CIELAB under D65 (IEC 61966-2-1, CIE 15).

    Args:
        rgb_P3: Colours from 0 to 255, [..., 3].

    Returns:
        L* from 0 to 100, a* and b*, [..., 3].
    """
    c = rgb_P3.float() / 255
    linear = torch.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    x = linear @ torch.tensor(_XYZ).T / torch.tensor(_WHITE)
    f = torch.where(x > (6 / 29) ** 3, x.clamp(min=1e-9) ** (1 / 3), x / (3 * (6 / 29) ** 2) + 4 / 29)
    return torch.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def skin_tone(images_BCHW: torch.Tensor) -> np.ndarray:
    """Measures the individual typology angle of each image.

    The lesion is in the middle, so only the border is looked at. Of its pixels, those that are too dark, too bright or too
    colourful for skin are left out: dark corners, hairs, reflections, ink and rulers. Of the rest, those are left out that are
    much darker than the median: the shaded edges of dark corners, thin hairs, and a lesion that reaches the border. The angle
    is that of the medians of L* and b* over what is left.

    Args:
        images_BCHW: Images, uint8, with 1 or 3 channels.

    Returns:
        The angle of each image in degrees, float [B]; NaN where it is not known: the image is grey, too little of the border is
        skin, or b* is 0 or below. Skin under white light is yellowish, so such a b* comes from the colour of the light.
    """
    if images_BCHW.shape[1] != 3:
        return np.full(len(images_BCHW), np.nan)
    step = max(1, images_BCHW.shape[-1] // SIDE)
    images = images_BCHW[..., ::step, ::step].cpu()
    height, width = images.shape[-2:]
    border = torch.ones(height, width, dtype=torch.bool)
    border[height // BORDER : height - height // BORDER, width // BORDER : width - width // BORDER] = False
    light_BP, _, yellow_BP = (lab_BP3 := to_lab(images[..., border].transpose(1, 2))).unbind(-1)
    chroma_BP = lab_BP3[..., 1:].norm(dim=-1)
    skin_BP = (light_BP >= DARKEST) & (light_BP <= BRIGHTEST) & (chroma_BP <= MOST_CHROMA)
    known_B = skin_BP.float().mean(1) >= LEAST_SHARE
    for _ in range(3):  # each round removes dark pixels that had widened the spread of the round before
        middle_B1 = _median(light_BP, skin_BP)
        spread_B1 = 1.4826 * _median((light_BP - middle_B1).abs(), skin_BP)
        skin_BP &= light_BP >= middle_B1 - DEPARTURE * spread_B1.clamp(min=LEAST_SPREAD)
    lightness_B, yellow_B = _median(light_BP, skin_BP)[:, 0], _median(yellow_BP, skin_BP)[:, 0]
    angle_B = torch.rad2deg(torch.atan2(lightness_B - 50, yellow_B))
    return torch.where(known_B & (yellow_B > LEAST_YELLOW), angle_B, torch.nan).double().numpy()


def tone_index(angles_B: np.ndarray) -> np.ndarray:
    """Returns the index in TONES of each angle, int16 [B]; -1 where the angle is not known."""
    index = np.searchsorted(-np.asarray(BOUNDS), -np.asarray(angles_B, float), side="right")
    return np.where(np.isnan(angles_B), -1, index).astype(np.int16)


def _median(values_BP: torch.Tensor, mask_BP: torch.Tensor) -> torch.Tensor:
    """Returns the median of each row's values where the mask is True, [B, 1]; NaN for a row without any."""
    return torch.where(mask_BP, values_BP, torch.nan).nanmedian(1, keepdim=True).values
