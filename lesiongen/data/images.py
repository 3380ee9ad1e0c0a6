"""Untrusted image bytes → pixels, with every bound checked from the header before anything is decoded."""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000  # a 100-byte file can claim a billion
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "MPO")


class BadImage(ValueError):
    """An image that cannot be used, and why."""


def decode(content: bytes, channels: int = 3) -> Image.Image:
    """PIL image in RGB (channels=3) or L (1), upright. Raises BadImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width}×{image.height} pixels are more than {MAX_PIXELS:,}")
            if min(image.size) < 8:
                raise BadImage(f"{image.width}×{image.height} pixels are too few")
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):
                # 16 bits a channel: PIL would clip, not scale.
                image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
            return image.convert("RGB" if channels == 3 else "L")
    except BadImage:
        raise
    except Exception as error:  # PIL's decoders raise almost anything on broken files
        raise BadImage(f"not a readable image ({str(error) or type(error).__name__})") from None


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size` pixels, aspect kept, antialiased."""
    scale = size / min(image.size)
    shape = tuple(max(size, round(side * scale)) for side in image.size)
    return image if shape == image.size else image.resize(shape, Image.Resampling.LANCZOS)


def encode(image: Image.Image, form: str, quality: int) -> bytes:
    """Bytes of a JPEG (quality 1 to 100, 4:4:4 colour) or a lossless PNG."""
    buffer = io.BytesIO()
    if form == "jpg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def to_tensor(image: Image.Image) -> torch.Tensor:
    """uint8 [C, H, W]."""
    array = np.array(image)  # a copy: PIL's own memory is read-only
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))


def png(tensor_CHW: torch.Tensor) -> bytes:
    """PNG bytes of a uint8 [C, H, W] tensor with 1 or 3 channels."""
    array = tensor_CHW.cpu().numpy()
    image = Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))
    return encode(image, "png", 0)


def grid(images_BCHW: torch.Tensor, columns: int, pad: int = 2) -> torch.Tensor:
    """uint8 [B, C, H, W] → one uint8 picture [C, H', W'], row by row on white."""
    count, channels, height, width = images_BCHW.shape
    rows = -(-count // columns)
    sheet = torch.full((channels, rows * (height + pad) + pad, columns * (width + pad) + pad), 255, dtype=torch.uint8)
    for i, image in enumerate(images_BCHW):
        top, left = pad + (i // columns) * (height + pad), pad + (i % columns) * (width + pad)
        sheet[:, top : top + height, left : left + width] = image
    return sheet
