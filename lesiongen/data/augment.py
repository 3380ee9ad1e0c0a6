"""Augmentations and preprocessing: pure functions of (image, drawn numbers, config) on uint8 tensors.

Shapes: images [C, H, W] with C = 1 or 3, uint8 or, inside, float in 0..255; H×W memory may have its channels last, as
decoders give it, which torchvision's antialiased resize takes three times as fast.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import affine_grid, grid_sample, interpolate
from torchvision.transforms.v2 import functional as F

GREY = (0.2989, 0.587, 0.114)  # luma of BT.601, as torchvision rounds it
HUES = torch.tensor([0.0, 2.0, 4.0]).view(3, 1, 1)  # of red, green, blue, in sixths of a turn
OPERATIONS = ("crop", "dihedral", "hflip", "vflip", "rotate", "jitter", "noise")
# Numbers that each view draws, whatever is switched on, so that one operation does not change the draws of another.
# Their order is part of the result: append only.
DRAWS = (
    *("side", "top", "left", "symmetry", "brightness", "contrast", "saturation", "hue"),
    *("angle", "aspect", "one_of"),
    *OPERATIONS,  # whether it is applied
)


@dataclass(frozen=True)
class AugmentConfig:
    """In the order of application; jitter is brightness, contrast, saturation and hue together."""

    crop: float = 0.85  # smallest side of a random crop, as a fraction of the short side; 1 = centre crop
    crop_max: float = 1.0  # largest
    aspect: float = 1.0  # of the crop, width : height drawn from 1/this to this; 4/3 as in random resized crops
    rotate: float = 0.0  # degrees drawn from ± this; cut from inside the image, so that no corner is empty
    rotate_p: float = 1.0  # share of the views that are rotated
    dihedral: bool = True  # one of the 8 symmetries of the square: lesions have no upright
    hflip: float = 0.0  # share of the views that are flipped
    vflip: float = 0.0
    brightness: float = 0.0  # factors drawn from 1 ± this
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # shift drawn from ± this, in turns
    jitter_p: float = 1.0
    noise: float = 0.0  # standard deviation of Gaussian noise, as a fraction of white
    noise_p: float = 1.0
    one_of: tuple[str, ...] = ()  # of these operations each view gets one, drawn evenly

    def __post_init__(self):
        if not 0 < self.crop <= self.crop_max <= 1:
            raise ValueError(f"crop={self.crop} and crop_max={self.crop_max} must lie above 0, at most 1, and in this order")
        if not 1 <= self.aspect <= 4 or (self.aspect > 1 and self.crop == 1):
            raise ValueError(f"aspect={self.aspect} must lie in 1 to 4, and needs a crop below 1")
        if not all(0 <= v <= 1 for v in (self.brightness, self.contrast, self.saturation)) or not 0 <= self.hue <= 0.5:
            raise ValueError("brightness, contrast, saturation lie in 0 to 1 and hue in 0 to 0.5")
        if not 0 <= self.rotate <= 180 or not 0 <= self.noise <= 1:
            raise ValueError("rotate lies in 0 to 180 degrees and noise in 0 to 1")
        if not all(0 <= v <= 1 for v in (self.hflip, self.vflip, self.rotate_p, self.jitter_p, self.noise_p)):
            raise ValueError("hflip, vflip, rotate_p, jitter_p and noise_p are shares of the views, from 0 to 1")
        if len(self.one_of) == 1 or len(set(self.one_of)) < len(self.one_of):
            raise ValueError(f"one_of={list(self.one_of)} must name at least two operations, each once")
        for name in self.one_of:
            if name not in OPERATIONS:
                raise ValueError(f"one_of names '{name}'; it chooses among {', '.join(OPERATIONS)}")
            if name not in ("hflip", "vflip") and not self.share(name):
                raise ValueError(f"one_of names '{name}', which is switched off: give it a strength, or leave it out of one_of")

    def share(self, name: str) -> float:
        """Share of the views that get an operation, where one_of does not name it."""
        if name == "jitter":
            return self.jitter_p * any((self.brightness, self.contrast, self.saturation, self.hue))
        return {
            "crop": float(self.crop < 1),
            "dihedral": float(self.dihedral),
            "hflip": self.hflip,
            "vflip": self.vflip,
            "rotate": self.rotate_p * (self.rotate > 0),
            "noise": self.noise_p * (self.noise > 0),
        }[name]


@dataclass(frozen=True)
class PreprocessConfig:
    """What makes images alike: deterministic, once for an image and before any view of it, train and held-out."""

    centre: float = 1.0  # share of each side that is kept, about the middle
    constancy: Literal["none", "shades_of_grey"] = "none"  # gives every image the same light
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)  # which; grey as published, (1, 0.72, 0.75) is about that of HAM10000
    stretch: bool = False  # darkest value to 0, brightest to 255, per image

    def __post_init__(self):
        if not 0 < self.centre <= 1:
            raise ValueError(f"centre is a share above 0 and at most 1, not {self.centre}")
        if min(self.light) <= 0:
            raise ValueError(f"light={list(self.light)} must be a colour with every channel above 0")


def augment(image_CHW: torch.Tensor, size: int, config: AugmentConfig, rng: torch.Generator) -> torch.Tensor:
    """One random view, uint8 [C, size, size]."""
    u = dict(zip(DRAWS, torch.rand(len(DRAWS), generator=rng).tolist(), strict=True))
    chosen = config.one_of[int(u["one_of"] * len(config.one_of))] if config.one_of else None

    def on(name: str) -> bool:
        return name == chosen if name in config.one_of else u[name] < config.share(name)

    def within(span: float, name: str) -> float:
        return span * (2 * u[name] - 1)

    angle = math.radians(within(config.rotate, "angle")) if on("rotate") else 0.0
    if on("crop"):
        side = config.crop + (config.crop_max - config.crop) * u["side"]
        ratio = math.exp(within(math.log(config.aspect), "aspect"))
        out = crop(image_CHW, size, side, ratio, u["top"], u["left"], angle)
    else:
        out = crop(image_CHW, size, angle=angle)
    if on("dihedral"):
        out = dihedral(out, int(u["symmetry"] * 8))
    if on("hflip"):
        out = F.horizontal_flip(out)
    if on("vflip"):
        out = F.vertical_flip(out)
    if on("jitter"):
        factors = (1 + within(getattr(config, name), name) for name in ("brightness", "contrast", "saturation"))
        out = jitter(out, *factors, hue=within(config.hue, "hue"))
    if on("noise"):
        out = noise(out, config.noise, rng)
    return out.contiguous()


def centre(image_CHW: torch.Tensor, size: int) -> torch.Tensor:
    """The unaugmented view: the central square, uint8 [C, size, size]."""
    return crop(image_CHW, size)


def preprocess(image_CHW: torch.Tensor, config: PreprocessConfig) -> torch.Tensor:
    """The image that every view is cut from, uint8 [C, H', W']."""
    out = image_CHW
    if config.centre < 1:
        out = F.center_crop(out, [max(1, round(side * config.centre)) for side in out.shape[-2:]])
    if config.constancy == "shades_of_grey":
        out = shades_of_grey(out, config.light)
    return stretch(out) if config.stretch else out


def crop(
    image_CHW: torch.Tensor,
    size: int,
    side: float = 1.0,
    ratio: float = 1.0,
    top: float = 0.5,
    left: float = 0.5,
    angle: float = 0.0,
) -> torch.Tensor:
    """A window resized to uint8 [C, size, size], antialiased: a resized crop that may be rotated.

    side: of the window, as a fraction of the short side; ratio: its width over its height, the area kept; top, left: its
    place, from 0 to 1; angle: in radians. A rotated window needs the room of its bounding box; where the image has less,
    it becomes smaller, and its corners still show what was photographed.
    """
    height, width = image_CHW.shape[-2:]
    short = min(height, width)
    tall, wide = short * side / math.sqrt(ratio), short * side * math.sqrt(ratio)
    room = abs(math.cos(angle)) + abs(math.sin(angle))
    fit = min(room, height / tall, width / wide)
    tall, wide = max(1, round(tall * fit)), max(1, round(wide * fit))
    top, left = round((height - tall) * top), round((width - wide) * left)
    window = image_CHW[:, top : top + tall, left : left + wide]  # a view: channels stay last
    box = math.ceil(size * room)
    # What torchvision's resize calls, without its copy of a window whose channels lie last.
    out = window if box == tall == wide else interpolate(window[None], (box, box), mode="bilinear", antialias=True)[0]
    return rotate(out, size, angle) if angle else out


def rotate(image_CHW: torch.Tensor, size: int, angle: float) -> torch.Tensor:
    """The central size × size of a square image rotated counterclockwise by `angle` radians; bilinear.

    torchvision's rotate with a centre crop; computes only what is kept."""
    scale = size / image_CHW.shape[-1]
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    grid = affine_grid(torch.tensor([[[cos, -sin, 0], [sin, cos, 0]]]), [1, 1, size, size], align_corners=False)
    out = grid_sample(image_CHW[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return _to_uint8(out[0])


def dihedral(image_CHW: torch.Tensor, symmetry: int) -> torch.Tensor:
    """One of the 8 symmetries of the square, 0 to 7; 0 is the identity."""
    out = torch.rot90(image_CHW, symmetry % 4, (-2, -1))
    return out.flip(-1) if symmetry >= 4 else out


def jitter(image_CHW: torch.Tensor, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0) -> torch.Tensor:
    """torchvision's adjust_brightness, _contrast, _saturation (factors) and _hue (turns), one after another, rounded once.

    Grey images have no saturation and no hue."""
    x = image_CHW.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    colour = len(x) == 3
    if brightness != 1:
        x.mul_(brightness).clamp_(0, 255)
    if contrast != 1:
        mean = x.mean((-2, -1), keepdim=True)
        mean = _grey(mean) if colour else mean
        x.mul_(contrast).add_((1 - contrast) * mean).clamp_(0, 255)
    if saturation != 1 and colour:
        grey = _grey(x)  # before x is changed in place
        x.mul_(saturation).add_(grey, alpha=1 - saturation).clamp_(0, 255)
    if hue and colour:
        x = _turn(x, hue)
    return _to_uint8(x)


def _grey(x_CHW: torch.Tensor) -> torch.Tensor:
    red, green, blue = x_CHW
    return (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def _turn(x_CHW: torch.Tensor, turns: float) -> torch.Tensor:
    """Shifts the hue of HSV without going there: a channel is at its maximum within a sixth of a turn of its own hue, at
    its minimum beyond two sixths, and linear between."""
    red, green, blue = x_CHW
    top = torch.maximum(torch.maximum(red, green), blue)
    chroma = top - torch.minimum(torch.minimum(red, green), blue)
    per = 1 / chroma.clamp(min=1e-6)
    hue = torch.where(
        top == red,
        (green - blue) * per,
        torch.where(top == green, 2 + (blue - red) * per, 4 + (red - green) * per),
    )
    apart = hue - (HUES - 6 * turns)  # in sixths of a turn
    apart = apart.sub_(6 * torch.round(apart / 6)).abs_()
    return top - apart.sub_(1).clamp_(0, 1).mul_(chroma)


def noise(image_CHW: torch.Tensor, sigma: float, rng: torch.Generator) -> torch.Tensor:
    """Gaussian noise, independent in each value; sigma as a fraction of white."""
    return _to_uint8(torch.randn(image_CHW.shape, generator=rng).mul_(255 * sigma).add_(image_CHW))


def shades_of_grey(image_CHW: torch.Tensor, light: tuple[float, float, float] = (1, 1, 1), power=6.0) -> torch.Tensor:
    """Colour constancy: the light, estimated as the Minkowski mean of each channel, becomes `light` (Finlayson & Trezzi,
    Shades of Gray and Colour Constancy, 2004; for dermoscopy Barata et al., 2015, with p = 6 too).

    Dark hair, frames and corners weigh nothing at such a power. Reflections, labels and rulers would weigh most: the clipped
    values, the brightest fiftieth and the margin, where rulers lie, are left out. Leaving out more would, where a lesion
    fills the image, take its colour for the light's. An image without enough else stays as it is; so does one channel."""
    if len(image_CHW) == 1:
        return image_CHW
    height, width = image_CHW.shape[-2:]
    middle = F.center_crop(image_CHW, [max(1, round(0.8 * height)), max(1, round(0.8 * width))])
    middle = middle[:, ::2, ::2].flatten(1).float()  # every fourth pixel tells as much
    peak = middle.amax(0)
    lit = middle[:, (peak > 20) & (middle.amin(0) < 250)]
    if lit.shape[1] < 0.1 * middle.shape[1]:
        return image_CHW
    lit = lit[:, lit.sum(0) <= lit.sum(0).quantile(0.98)]
    found = (lit / 255).pow(power).mean(1).pow(1 / power)
    wanted = torch.tensor(light, dtype=torch.float32)
    gain = (wanted / wanted.norm()) / (found / found.norm())
    return _to_uint8(image_CHW * gain.view(3, 1, 1))


def stretch(image_CHW: torch.Tensor) -> torch.Tensor:
    """Min-max normalisation of one image, over all its channels; one colour only stays as it is."""
    low, high = image_CHW.min().item(), image_CHW.max().item()
    return _to_uint8((image_CHW.float() - low) * (255 / (high - low))) if high > low else image_CHW


def _to_uint8(x_CHW: torch.Tensor) -> torch.Tensor:
    return x_CHW.round_().clamp_(0, 255).to(torch.uint8)
