"""Augmentations: pure functions of (image, config, generator) on uint8 tensors."""

from dataclasses import dataclass

import torch
from torchvision.transforms.v2 import functional as F


@dataclass(frozen=True)
class AugmentConfig:
    dihedral: bool = True  # one of the 8 symmetries of the square: lesions have no upright
    crop: float = 0.85  # smallest side of a random square crop, as a fraction of the short side; 1 = centre crop
    brightness: float = 0.0  # factors drawn from 1 ± this
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # shift drawn from ± this, in turns

    def __post_init__(self):
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is a fraction above 0 and at most 1, not {self.crop}")
        if not all(0 <= v <= 1 for v in (self.brightness, self.contrast, self.saturation)) or not 0 <= self.hue <= 0.5:
            raise ValueError("brightness, contrast, saturation lie in 0 to 1 and hue in 0 to 0.5")


def augment(image_CHW: torch.Tensor, size: int, config: AugmentConfig, rng: torch.Generator) -> torch.Tensor:
    """One random view, uint8 [C, size, size]."""
    # Drawn all at once and always: turning one augmentation off does not change the draws of another.
    u = torch.rand(9, generator=rng).tolist()
    height, width = image_CHW.shape[-2:]
    if config.crop < 1:
        side = round(min(height, width) * (config.crop + (1 - config.crop) * u[0]))
        top, left = round((height - side) * u[1]), round((width - side) * u[2])
        out = F.resized_crop(image_CHW, top, left, side, side, [size, size], antialias=True)
    else:
        out = centre(image_CHW, size)
    if config.dihedral:
        symmetry = int(u[3] * 8)
        out = torch.rot90(out, symmetry % 4, (-2, -1))
        if symmetry >= 4:
            out = out.flip(-1)
    if config.brightness:
        out = F.adjust_brightness(out, 1 + config.brightness * (2 * u[4] - 1))
    if config.contrast:
        out = F.adjust_contrast(out, 1 + config.contrast * (2 * u[5] - 1))
    if config.saturation and out.shape[0] == 3:
        out = F.adjust_saturation(out, 1 + config.saturation * (2 * u[6] - 1))
    if config.hue and out.shape[0] == 3:
        out = F.adjust_hue(out, config.hue * (2 * u[7] - 1))
    return out.contiguous()


def centre(image_CHW: torch.Tensor, size: int) -> torch.Tensor:
    """The unaugmented view: the central square, uint8 [C, size, size]."""
    side = min(image_CHW.shape[-2:])
    out = F.center_crop(image_CHW, [side, side])
    return out if side == size else F.resize(out, [size, size], antialias=True)
