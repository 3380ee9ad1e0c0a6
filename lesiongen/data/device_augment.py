"""Random views of whole batches on the training device: the operations of lesiongen/data/augment.py for many images at once.

The random numbers of a view are drawn as on the CPU. The pixels differ slightly: crop, rotation and symmetries are one bilinear
sampling here, without antialiasing. Packed images are hardly larger than the views, so little is shrunk. Noise comes from a
hash of the sample's position and the pixel, so it does not depend on how a batch is divided among ranks.

Data workers call random_row() for each image; TrainingImages (training.py) calls augment_batch() on the device.
"""

import math

import torch
from torch.nn.functional import grid_sample

from hpc.data.order import sample_seed
from lesiongen.data.augment import AugmentConfig, View, box_side, draw_view, grey, shift_hue, window_of

# Columns of a row: the window in pixels, what is done to it, and the strengths of the other operations.
COLUMNS = ("top", "left", "height", "width", "angle", "scale", "symmetry", "hflip", "vflip")
COLUMNS += ("brightness", "contrast", "saturation", "hue", "noise")


def view_row(view: View, size: int, height: int, width: int) -> list[float]:
    """Returns what augment_batch() needs to know of one view.

    Args:
        view: The view's random decisions.
        size: Side of the view, in pixels.
        height: Height of the image.
        width: Width of the image.
    """
    top, left, window_h, window_w = window_of(view, height, width)
    window = [top, left, window_h, window_w, view.angle, size / box_side(size, view.angle)]
    window += [view.symmetry, view.hflip, view.vflip]
    return [float(x) for x in (*window, view.brightness, view.contrast, view.saturation, view.hue, view.noise)]


def random_row(config: AugmentConfig, seed: int, position: int, size: int, height: int, width: int) -> list[float]:
    """Draws the view of one training sample.

    Args:
        config: The augmentation.
        seed: Together with the position, decides every random number.
        position: Position in the training sequence.
        size: Side of the view, in pixels.
        height: Height of the image.
        width: Width of the image.

    Returns:
        The row, as view_row() returns it.
    """
    return view_row(draw_view(config, torch.Generator().manual_seed(sample_seed(seed, position))), size, height, width)


def augment_batch(images_BCHW: torch.Tensor, rows_BV: torch.Tensor, position_B: torch.Tensor, size: int) -> torch.Tensor:
    """Makes a view of each image.

    Args:
        images_BCHW: Images, uint8, padded at the bottom and the right to one size.
        rows_BV: A row of view_row() for each image, fp32.
        position_B: Position of each sample in the training sequence; decides its noise.
        size: Side of the views, in pixels.

    Returns:
        Views, uint8 [B, C, size, size].
    """
    column = {name: rows_BV[:, i] for i, name in enumerate(COLUMNS)}
    grid_BHW2 = _sampling_grid(column, size, images_BCHW.shape[-2:])
    x = grid_sample(images_BCHW.float(), grid_BHW2, mode="bilinear", padding_mode="border", align_corners=False)
    x = _jitter(x.round_().clamp_(0, 255), column)
    sigma = column["noise"].view(-1, 1, 1, 1)
    x = torch.where(sigma > 0, x.round() + 255 * sigma * _normal_noise(position_B, x.shape), x)
    return x.round_().clamp_(0, 255).to(torch.uint8)


def _sampling_grid(column: dict[str, torch.Tensor], size: int, padded: torch.Size) -> torch.Tensor:
    """Returns the point of the padded image that each pixel of a view shows, [B, size, size, 2] in grid_sample's units."""
    device = column["angle"].device
    centres = (2 * torch.arange(size, device=device, dtype=torch.float32) + 1) / size - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    points_BHW2 = torch.stack([x, y], -1)[None] @ _symmetry_matrices(column).transpose(1, 2)[:, None]
    # Rotate, and keep the centre of the box that the window was resized to.
    cos, sin = column["angle"].cos() * column["scale"], column["angle"].sin() * column["scale"]
    rotation_B22 = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    points_BHW2 = points_BHW2 @ rotation_B22.transpose(1, 2)[:, None]
    # From the window to pixels of the image. Nothing outside the window is seen.
    size_B2 = torch.stack([column["width"], column["height"]], -1)[:, None, None]
    corner_B2 = torch.stack([column["left"], column["top"]], -1)[:, None, None]
    pixels_BHW2 = ((points_BHW2 + 1) / 2 * size_B2).clamp(min=0.5).minimum(size_B2 - 0.5) + corner_B2
    return 2 * pixels_BHW2 / torch.tensor([padded[1], padded[0]], device=device) - 1


def _symmetry_matrices(column: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the linear map of each view's symmetry and flips on points (x, y), [B, 2, 2]."""
    turns_B, mirrored_B = column["symmetry"] % 4, column["symmetry"] >= 4
    cos, sin = (turns_B * (math.pi / 2)).cos().round(), (turns_B * (math.pi / 2)).sin().round()
    flip_x = torch.where(mirrored_B ^ (column["hflip"] > 0), -1.0, 1.0)
    flip_y = torch.where(column["vflip"] > 0, -1.0, 1.0)
    # torch.rot90 by k quarter turns shows at (x, y) what was at (x cos - y sin, x sin + y cos); flips act on (x, y) before.
    rows = torch.stack([cos * flip_x, -sin * flip_y], -1), torch.stack([sin * flip_x, cos * flip_y], -1)
    return torch.stack(rows, -2)


def _jitter(x_BCHW: torch.Tensor, column: dict[str, torch.Tensor]) -> torch.Tensor:
    """Applies brightness, contrast, saturation and hue, as jitter() of augment.py does. Grey images keep their hue."""
    factor = {name: column[name].view(-1, 1, 1, 1) for name in ("brightness", "contrast", "saturation", "hue")}
    colour = x_BCHW.shape[1] == 3
    x = (x_BCHW * factor["brightness"]).clamp(0, 255)
    mean = x.mean((-2, -1), keepdim=True)
    mean = grey(mean).unsqueeze(1) if colour else mean
    x = (x * factor["contrast"] + (1 - factor["contrast"]) * mean).clamp(0, 255)
    if not colour:
        return x
    x = (x * factor["saturation"] + (1 - factor["saturation"]) * grey(x).unsqueeze(1)).clamp(0, 255)
    return torch.where(factor["hue"] != 0, shift_hue(x, factor["hue"]), x)


def _normal_noise(position_B: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Returns standard normal noise that is a function of each sample's position and of the place in the image (Box–Muller)."""
    place = torch.arange(shape[1:].numel(), device=position_B.device).view(1, *shape[1:])
    key = position_B.long().view(-1, 1, 1, 1) * 0x2545F4914F6CDD1D + place * 2
    radius, angle = _uniform(key), _uniform(key + 1)
    return (-2 * radius.clamp(min=1e-7).log()).sqrt() * (2 * math.pi * angle).cos()


def _uniform(key: torch.Tensor) -> torch.Tensor:
    """Hashes integers to numbers in [0, 1), fp32; the finaliser of splitmix64 (Steele et al. 2014), in wrapping int64."""
    x = key * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return ((x >> 40) & 0xFFFFFF).float() / 2**24
