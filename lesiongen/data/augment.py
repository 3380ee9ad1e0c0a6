"""Preprocess and augment images: pure functions of an image, a config and a random generator, on uint8 tensors.

Images are [C, H, W] with C = 1 or 3: uint8 between functions, float in 0..255 inside them. Packing preprocesses each image
once; the tokenizer and encode stages cut random views from the packed images. Decoded images are channels-last in memory.
Do not copy them to another layout before they are resized: antialiased resizing is three times as fast on channels-last images.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.nn.functional import affine_grid, grid_sample, interpolate
from torchvision.transforms.v2 import functional as F

GREY = (0.2989, 0.587, 0.114)  # luma weights of BT.601, rounded as in torchvision
CHANNEL_HUES = torch.tensor([0.0, 2.0, 4.0]).view(3, 1, 1)  # hues of red, green and blue, in sixths of the colour circle
OPERATIONS = ("crop", "dihedral", "hflip", "vflip", "rotate", "jitter", "noise")
# Names of the random numbers that are drawn for every view, also for operations that are switched off. So switching one
# operation on or off does not change the numbers of another. Never change this list: noise continues the same generator after
# these draws, so one more number would change every noisy view. A new operation draws from a generator of its own.
DRAWS = (
    *("side", "top", "left", "symmetry", "brightness", "contrast", "saturation", "hue"),
    *("angle", "aspect", "one_of"),
    *("crop", "dihedral", "hflip", "vflip", "rotate", "jitter", "noise"),  # decide whether the operation is applied
)


@dataclass(frozen=True)
class AugmentConfig:
    """Random views of an image. The operations are listed in the order in which they are applied.

    "Jitter" stands for brightness, contrast, saturation and hue together.
    """

    crop: float = 0.85  # smallest side of a random crop, as a fraction of the image's short side; 1 = always the centre square
    crop_max: float = 1.0  # largest side of a random crop, as a fraction of the image's short side
    aspect: float = 1.0  # width / height of the crop is drawn from 1/aspect to aspect; 1 = square; needs crop below 1
    rotate: float = 0.0  # largest rotation in degrees, either way; 0 = off. The view stays inside the image: no empty corners
    rotate_p: float = 1.0  # probability of a rotation
    dihedral: bool = True  # apply one of the 8 rotations and reflections of the square, all equally likely
    hflip: float = 0.0  # probability of a horizontal flip
    vflip: float = 0.0  # probability of a vertical flip
    brightness: float = 0.0  # the brightness factor is drawn from 1 - brightness to 1 + brightness; 0 = off
    contrast: float = 0.0  # the contrast factor is drawn from 1 - contrast to 1 + contrast; 0 = off
    saturation: float = 0.0  # the saturation factor is drawn from 1 - saturation to 1 + saturation; 0 = off
    hue: float = 0.0  # largest shift of the hue, either way, as a fraction of the colour circle, at most 0.5; 0 = off
    jitter_p: float = 1.0  # probability of the colour jitter
    noise: float = 0.0  # standard deviation of Gaussian noise, as a fraction of the range from black to white; 0 = off
    noise_p: float = 1.0  # probability of the noise
    one_of: tuple[str, ...] = ()  # apply exactly one of these to each view, all equally likely, as in [rotate, noise]

    def __post_init__(self):
        if not 0 < self.crop <= self.crop_max <= 1:
            raise ValueError(f"crop={self.crop} and crop_max={self.crop_max} must satisfy 0 < crop ≤ crop_max ≤ 1")
        if not 1 <= self.aspect <= 4 or (self.aspect > 1 and self.crop == 1):
            raise ValueError(f"aspect={self.aspect} must be from 1 to 4, and an aspect above 1 needs a crop below 1")
        if not all(0 <= v <= 1 for v in (self.brightness, self.contrast, self.saturation)) or not 0 <= self.hue <= 0.5:
            raise ValueError("brightness, contrast and saturation must be from 0 to 1, and hue from 0 to 0.5")
        if not 0 <= self.rotate <= 180 or not 0 <= self.noise <= 1:
            raise ValueError("rotate must be from 0 to 180 degrees, and noise from 0 to 1")
        if not all(0 <= v <= 1 for v in (self.hflip, self.vflip, self.rotate_p, self.jitter_p, self.noise_p)):
            raise ValueError("hflip, vflip, rotate_p, jitter_p and noise_p are probabilities and must be from 0 to 1")
        if len(self.one_of) == 1 or len(set(self.one_of)) < len(self.one_of):
            raise ValueError(f"one_of={list(self.one_of)} must name at least two operations, each once")
        for name in self.one_of:
            if name not in OPERATIONS:
                raise ValueError(f"one_of names the unknown operation '{name}'; choose among {', '.join(OPERATIONS)}")
            if name not in ("hflip", "vflip") and not self.probability(name):
                raise ValueError(
                    f"one_of names '{name}', which is switched off; set its strength above 0, or remove it from one_of"
                )

    def probability(self, name: str) -> float:
        """Returns the probability of an operation that `one_of` does not name."""
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
    """Makes images more alike. No randomness: packing applies it once to every image of every split."""

    centre: float = 1.0  # fraction of each side that is kept around the image's centre; 1 = the whole image
    constancy: Literal["none", "shades_of_grey"] = "none"  # colour constancy: gives every image the same colour of light
    # Colour of that light as RGB; only the ratios count. The paper uses grey; the light of HAM10000 is about (1, 0.72, 0.75).
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)
    stretch: bool = False  # map the darkest value of each image to black and the brightest to white

    def __post_init__(self):
        if not 0 < self.centre <= 1:
            raise ValueError(f"centre={self.centre} must be above 0 and at most 1")
        if min(self.light) <= 0:
            raise ValueError(f"light={list(self.light)} must be an RGB colour with every channel above 0")


def augment(image_CHW: torch.Tensor, size: int, config: AugmentConfig, rng: torch.Generator) -> torch.Tensor:
    """Returns one random view of an image, uint8 [C, size, size].

    Args:
        image_CHW: The packed image, uint8.
        size: Side of the view, in pixels.
        config: Which operations to apply, and how strongly.
        rng: Source of all randomness. The same state gives the same view.
    """
    view = draw_view(config, rng)
    out = crop(image_CHW, size, view)
    if view.symmetry:
        out = dihedral(out, view.symmetry)
    if view.hflip:
        out = F.horizontal_flip(out)
    if view.vflip:
        out = F.vertical_flip(out)
    if view.jittered:
        out = jitter(out, view.brightness, view.contrast, view.saturation, view.hue)
    if view.noise:
        out = noise(out, view.noise, rng)
    return out.contiguous()


class View(NamedTuple):
    """The random decisions of one view. The defaults give the unaugmented view, the central square.

    Attributes:
        side: Side of the window, as a fraction of the image's short side.
        ratio: Width / height of the window. It does not change the window's area.
        top: Vertical position of the window, from 0 (top edge of the image) to 1 (bottom edge).
        left: Horizontal position of the window, from 0 (left edge) to 1 (right edge).
        angle: Rotation in radians.
        symmetry: One of the 8 symmetries of the square; 0 is the identity. See dihedral().
        hflip: Whether to flip horizontally.
        vflip: Whether to flip vertically.
        jittered: Whether the colours change.
        brightness, contrast, saturation: Factors; 1 changes nothing.
        hue: Shift as a fraction of the colour circle; 0 changes nothing.
        noise: Standard deviation of the noise, as a fraction of the range from black to white; 0 for none.
    """

    side: float = 1.0
    ratio: float = 1.0
    top: float = 0.5
    left: float = 0.5
    angle: float = 0.0
    symmetry: int = 0
    hflip: bool = False
    vflip: bool = False
    jittered: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    noise: float = 0.0


def draw_view(config: AugmentConfig, rng: torch.Generator) -> View:
    """Draws the random decisions of one view.

    Args:
        config: Which operations to apply, and how strongly.
        rng: Source of the random numbers; exactly DRAWS are drawn.
    """
    u = dict(zip(DRAWS, torch.rand(len(DRAWS), generator=rng).tolist(), strict=True))
    only = config.one_of[int(u["one_of"] * len(config.one_of))] if config.one_of else None

    def applies(name: str) -> bool:
        return name == only if name in config.one_of else u[name] < config.probability(name)

    def symmetric(limit: float, name: str) -> float:
        """Maps the draw from [0, 1) to [-limit, limit)."""
        return limit * (2 * u[name] - 1)

    decided: dict[str, float] = {}
    if applies("rotate"):
        decided["angle"] = math.radians(symmetric(config.rotate, "angle"))
    if applies("crop"):
        decided["side"] = config.crop + (config.crop_max - config.crop) * u["side"]
        decided |= {"ratio": math.exp(symmetric(math.log(config.aspect), "aspect")), "top": u["top"], "left": u["left"]}
    if applies("dihedral"):
        decided["symmetry"] = int(u["symmetry"] * 8)
    if applies("jitter"):
        decided |= {name: 1 + symmetric(getattr(config, name), name) for name in ("brightness", "contrast", "saturation")}
        decided |= {"jittered": True, "hue": symmetric(config.hue, "hue")}
    if applies("noise"):
        decided["noise"] = config.noise
    return View(hflip=applies("hflip"), vflip=applies("vflip"), **decided)


def centre(image_CHW: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the unaugmented view: the central square, resized to uint8 [C, size, size]."""
    return crop(image_CHW, size, View())


def preprocess(image_CHW: torch.Tensor, config: PreprocessConfig) -> torch.Tensor:
    """Returns the image that packing stores, uint8 [C, H', W']; all views are cut from it."""
    out = image_CHW
    if config.centre < 1:
        out = F.center_crop(out, [max(1, round(side * config.centre)) for side in out.shape[-2:]])
    if config.constancy == "shades_of_grey":
        out = shades_of_grey(out, config.light)
    return stretch(out) if config.stretch else out


def window_of(view: View, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns the window of a view in an image, (top, left, height, width) in pixels.

    Cutting a rotated window needs its whole bounding box. If the box does not fit into the image, the window is made
    smaller, so that no corner of the view is empty.

    Args:
        view: The view's random decisions.
        height: Height of the image.
        width: Width of the image.
    """
    short = min(height, width)
    window_h, window_w = short * view.side / math.sqrt(view.ratio), short * view.side * math.sqrt(view.ratio)
    scale = min(_growth(view.angle), height / window_h, width / window_w)
    window_h, window_w = max(1, round(window_h * scale)), max(1, round(window_w * scale))
    return round((height - window_h) * view.top), round((width - window_w) * view.left), window_h, window_w


def _growth(angle: float) -> float:
    """Returns the side of a rotated square's bounding box, relative to the side of the square."""
    return abs(math.cos(angle)) + abs(math.sin(angle))


def box_side(size: int, angle: float) -> int:
    """Returns the side of the square that a window is resized to, so that its rotated centre has `size` pixels."""
    return math.ceil(size * _growth(angle))


def crop(image_CHW: torch.Tensor, size: int, view: View) -> torch.Tensor:
    """Cuts a window, which may be rotated, and resizes it with antialiasing.

    Args:
        image_CHW: The image, uint8.
        size: Side of the result, in pixels.
        view: Side, ratio, position and angle of the window.

    Returns:
        The view, uint8 [C, size, size].
    """
    top, left, window_h, window_w = window_of(view, *image_CHW.shape[-2:])
    window = image_CHW[:, top : top + window_h, left : left + window_w]  # a slice without a copy, so still channels-last
    box = box_side(size, view.angle)
    # Not torchvision's resize: it makes the same call, but first copies a channels-last window to another layout.
    exact = box == window_h == window_w
    out = window if exact else interpolate(window[None], (box, box), mode="bilinear", antialias=True)[0]
    return rotate(out, size, view.angle) if view.angle else out


def rotate(image_CHW: torch.Tensor, size: int, angle: float) -> torch.Tensor:
    """Rotates a square image counterclockwise with bilinear interpolation and keeps the centre.

    Gives the same result as torchvision's rotate followed by center_crop, but computes only the pixels that are kept.

    Args:
        image_CHW: A square image, uint8.
        size: Side of the centre that is kept, in pixels.
        angle: Rotation in radians.

    Returns:
        The centre of the rotated image, uint8 [C, size, size].
    """
    scale = size / image_CHW.shape[-1]
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    grid = affine_grid(torch.tensor([[[cos, -sin, 0], [sin, cos, 0]]]), [1, 1, size, size], align_corners=False)
    out = grid_sample(image_CHW[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return _to_uint8(out[0])


def dihedral(x: torch.Tensor, symmetry: int) -> torch.Tensor:
    """Applies one of the 8 symmetries of the square to the last two dimensions.

    Args:
        x: One image or a batch.
        symmetry: From 0 to 7: symmetry % 4 quarter turns, then a flip if symmetry ≥ 4; 0 is the identity.
    """
    out = torch.rot90(x, symmetry % 4, (-2, -1))
    return out.flip(-1) if symmetry >= 4 else out


def jitter(
    image_CHW: torch.Tensor, brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0, hue: float = 0.0
) -> torch.Tensor:
    """Applies torchvision's adjust_brightness, adjust_contrast, adjust_saturation and adjust_hue, in this order.

    Computes in float32 and rounds once, at the end.

    Args:
        image_CHW: The image, uint8. The function does not change it.
        brightness: Factor; 1 changes nothing.
        contrast: Factor; 1 changes nothing.
        saturation: Factor; 1 changes nothing. Ignored for images of one channel.
        hue: Shift as a fraction of the colour circle; 0 changes nothing. Ignored for images of one channel.
    """
    x = image_CHW.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    colour = len(x) == 3
    if brightness != 1:
        x.mul_(brightness).clamp_(0, 255)
    if contrast != 1:
        mean = x.mean((-2, -1), keepdim=True)
        mean = grey(mean) if colour else mean
        x.mul_(contrast).add_((1 - contrast) * mean).clamp_(0, 255)
    if saturation != 1 and colour:
        luma = grey(x)  # before the next line changes x in place
        x.mul_(saturation).add_(luma, alpha=1 - saturation).clamp_(0, 255)
    if hue and colour:
        x = shift_hue(x, hue)
    return _to_uint8(x)


def grey(x_3HW: torch.Tensor) -> torch.Tensor:
    """Returns the luma of RGB images [..., 3, H, W], [..., H, W]."""
    red, green, blue = x_3HW.unbind(-3)
    return (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def shift_hue(x_3HW: torch.Tensor, shift: float | torch.Tensor) -> torch.Tensor:
    """Shifts the HSV hue by a fraction of the colour circle, without a full conversion to HSV.

    In HSV, a channel has its maximum where the hue is within a sixth of the circle of the channel's own hue, its minimum
    from two sixths on, and falls linearly between.

    Args:
        x_3HW: RGB images, [..., 3, H, W].
        shift: The shift, or one for each image, [..., 1, 1, 1].

    Returns:
        [..., 3, H, W].
    """
    red, green, blue = x_3HW.unbind(-3)
    maximum = torch.maximum(torch.maximum(red, green), blue)
    chroma = maximum - torch.minimum(torch.minimum(red, green), blue)
    inverse = 1 / chroma.clamp(min=1e-6)
    hue = torch.where(
        maximum == red,
        (green - blue) * inverse,
        torch.where(maximum == green, 2 + (blue - red) * inverse, 4 + (red - green) * inverse),
    )
    # Distance of the shifted hue from each channel's hue around the circle, in sixths of the circle.
    distance = hue.unsqueeze(-3) - (CHANNEL_HUES.to(hue.device) - 6 * shift)
    distance = distance.sub_(6 * torch.round(distance / 6)).abs_()
    return maximum.unsqueeze(-3) - distance.sub_(1).clamp_(0, 1).mul_(chroma.unsqueeze(-3))


def noise(image_CHW: torch.Tensor, sigma: float, rng: torch.Generator) -> torch.Tensor:
    """Adds independent Gaussian noise to each value.

    Args:
        image_CHW: The image, uint8.
        sigma: Standard deviation, as a fraction of the range from black to white.
        rng: Source of the noise.
    """
    return _to_uint8(torch.randn(image_CHW.shape, generator=rng).mul_(255 * sigma).add_(image_CHW))


def shades_of_grey(image_CHW: torch.Tensor, light: tuple[float, float, float] = (1, 1, 1), power: float = 6.0) -> torch.Tensor:
    """Scales the channels so that the estimated colour of the light becomes `light` (colour constancy).

    The colour of the light is estimated by the Minkowski mean of each channel (Finlayson & Trezzi, Shades of Gray and Colour
    Constancy, 2004; for dermoscopy Barata et al., 2015, also with p = 6). With a high power, dark hair, frames and corners
    hardly count, but reflections, labels and rulers get the largest weight. The estimate therefore ignores clipped pixels,
    the brightest 2 %, and the margin, where rulers lie. Do not ignore more pixels: where a lesion fills most of the image,
    its colour would be mistaken for the colour of the light.

    Args:
        image_CHW: The image, uint8.
        light: The wanted colour of the light, RGB at any scale.
        power: Exponent p of the Minkowski mean.

    Returns:
        The image under the new light, uint8. An image is returned unchanged if it has one channel, or if fewer than 10 %
        of its central pixels are neither dark nor clipped.
    """
    if len(image_CHW) == 1:
        return image_CHW
    height, width = image_CHW.shape[-2:]
    middle = F.center_crop(image_CHW, [max(1, round(0.8 * height)), max(1, round(0.8 * width))])
    middle = middle[:, ::2, ::2].flatten(1).float()  # a quarter of the pixels is enough for the estimate
    usable = middle[:, (middle.amax(0) > 20) & (middle.amin(0) < 250)]
    if usable.shape[1] < 0.1 * middle.shape[1]:
        return image_CHW
    usable = usable[:, usable.sum(0) <= usable.sum(0).quantile(0.98)]
    estimate = (usable / 255).pow(power).mean(1).pow(1 / power)
    target = torch.tensor(light, dtype=torch.float32)
    gain = (target / target.norm()) / (estimate / estimate.norm())
    return _to_uint8(image_CHW * gain.view(3, 1, 1))


def stretch(image_CHW: torch.Tensor) -> torch.Tensor:
    """Maps an image's smallest value to 0 and its largest to 255, over all channels together.

    An image whose values are all equal is returned unchanged.
    """
    low, high = image_CHW.min().item(), image_CHW.max().item()
    return _to_uint8((image_CHW.float() - low) * (255 / (high - low))) if high > low else image_CHW


def _to_uint8(x_CHW: torch.Tensor) -> torch.Tensor:
    """Rounds and clamps float values in 0..255 to uint8. Changes x_CHW in place."""
    return x_CHW.round_().clamp_(0, 255).to(torch.uint8)
