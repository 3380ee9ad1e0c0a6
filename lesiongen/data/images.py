"""Decode untrusted image files, encode images, and convert between PIL images, uint8 tensors and float tensors.

Image files may be damaged or hostile. The size in the header is checked before any pixel is decoded, so a small file cannot
claim all memory. Whatever is wrong with a file, decoding raises BadImage. Decoded images are upright, in sRGB or greyscale,
with 8 bits per channel.

Shapes: B batch, C channels (3 = RGB, 1 = grey), H height, W width.
"""

import io
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lesiongen.data import hdf5

MAX_PIXELS = 64_000_000  # a file of 100 bytes can claim a billion pixels, and decoding needs up to 16 bytes per pixel
MAX_BYTES = 1 << 29  # of a file; even an uncompressed file of MAX_PIXELS is smaller
MIN_SIDE = 8  # pixels
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # Pillow opens MPO files as JPEG
# Marks of metadata that rotate a JPEG or change its colours. Pillow applies them, simplejpeg ignores them.
PILLOW_METADATA = (b"Exif\0", b"ICC_PROFILE\0", b"tiff:Orientation")
# (colour space of the file, wanted channels) → colour space to ask simplejpeg for.
SIMPLEJPEG_COLOURS = {("YCbCr", 3): "RGB", ("Gray", 1): "GRAY"}


class BadImage(ValueError):
    """Raised for an image that cannot be used. The message gives the reason, but does not name the file."""


def read(path: Path, channels: int = 3, size: int = 0) -> Image.Image:
    """Reads and decodes an image file.

    Args:
        path: The file, or an image inside an HDF5 file (see hdf5.py).
        channels: 3 for RGB, 1 for greyscale.
        size: As for `decode`.

    Raises:
        BadImage: The image cannot be used.
        OSError: The file cannot be read.
    """
    if path.exists() and path.stat().st_size > MAX_BYTES:
        raise BadImage(f"the file is larger than {MAX_BYTES >> 20} MiB")
    return decode(hdf5.read_bytes(path), channels, size)


def decode(content: bytes, channels: int = 3, size: int = 0) -> Image.Image:
    """Decodes an image with Pillow.

    Args:
        content: The bytes of the file.
        channels: 3 for RGB, 1 for greyscale.
        size: The size that the caller will pass to resize_short_side(); 0 = decode at full size. A JPEG whose short side is
            at least 8 times `size` is decoded at a reduced size, still at least 4 times `size`. This is several times faster,
            and the result of resize_short_side() differs only by rounding.

    Returns:
        The image in mode RGB or L, upright, in sRGB, with transparent parts on white.

    Raises:
        BadImage: The image cannot be used.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Read and check the header.
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            _check_size(*image.size)
            if image.format == "TIFF" and image.tag_v2.get(322, 0) * image.tag_v2.get(323, 0) > MAX_PIXELS:
                raise BadImage("tiles much larger than the image")  # Pillow would unpack a whole tile
            if image.format != "MPO" and getattr(image, "is_animated", False):
                # Nothing says which frame the label belongs to. The frames of an MPO are one picture and its previews.
                raise BadImage("several frames or pages in one file; save the right one as a file of its own")
            # Decode the pixels, then convert them.
            if size:
                scale = 4 * size / min(image.size)
                image.draft(None, tuple(int(side * scale) for side in image.size))
            image.load()
            image = _eight_bit(ImageOps.exif_transpose(image))
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return _srgb(image).convert("RGB" if channels == 3 else "L")
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not a JPEG, PNG, BMP, TIFF or WebP file, or its header is damaged") from None
    except Exception as error:  # Pillow's decoders raise almost any exception on damaged files
        raise BadImage(f"not a readable image ({str(error) or type(error).__name__})") from None


def decode_tensor(content: bytes, channels: int = 3) -> torch.Tensor:
    """Decodes an image to a tensor.

    Gives exactly to_tensor(decode(content, channels)), but takes half the time for a JPEG without special metadata, because
    simplejpeg decodes it.

    Args:
        content: The bytes of the file.
        channels: 3 for RGB, 1 for greyscale.

    Returns:
        uint8 [C, H, W], channels-last in memory.

    Raises:
        BadImage: The image cannot be used.
    """
    if content[:2] == b"\xff\xd8" and not any(mark in content for mark in PILLOW_METADATA):
        with suppress(ValueError):  # if anything is wrong, decode() tries again with Pillow and raises BadImage with the reason
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            if (colours, channels) in SIMPLEJPEG_COLOURS:
                _check_size(width, height)
                return _channels_first(simplejpeg.decode_jpeg(content, SIMPLEJPEG_COLOURS[colours, channels]))
    return to_tensor(decode(content, channels))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}×{height} pixels are more than the limit of {MAX_PIXELS:,}")
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"{width}×{height} pixels are too few; each side needs at least {MIN_SIDE}")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit greyscale to 8 bits; Pillow would clip it. (Pillow itself reduces 16-bit colour to 8 bits.)"""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise BadImage("32 bits per pixel, and nothing says which value is white; convert the image to 8 or 16 bits")
    return Image.fromarray((values // 257).astype(np.uint8))


def _srgb(image: Image.Image) -> Image.Image:
    """Converts an image with an embedded colour profile to sRGB.

    Phones save Display P3. Without the conversion the colours would be wrong, and lesions are recognised by their colours.
    """
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK"):
        with suppress(ImageCms.PyCMSError, OSError):  # ignore a profile that is damaged or made for another colour space
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Resizes an image so that its short side has `size` pixels; keeps the aspect ratio, with antialiasing."""
    scale = size / min(image.size)
    shape = tuple(max(size, round(side * scale)) for side in image.size)
    return image if shape == image.size else image.resize(shape, Image.Resampling.LANCZOS)


def encode(image: Image.Image, file_format: str, quality: int) -> bytes:
    """Encodes an image as JPEG or PNG.

    Args:
        image: The image, in mode RGB or L.
        file_format: "jpg", with colours at full resolution (4:4:4), or "png", lossless.
        quality: JPEG quality, 1 to 100; ignored for PNG.

    Returns:
        The bytes of the file.
    """
    buffer = io.BytesIO()
    if file_format == "jpg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Converts a PIL image to a tensor, uint8 [C, H, W], channels-last in memory."""
    return _channels_first(np.atleast_3d(np.array(image)))  # np.array copies: Pillow's own memory is read-only


def _channels_first(array_HWC: np.ndarray) -> torch.Tensor:
    """Returns a tensor [C, H, W] that shares the array's memory.

    The memory stays channels-last, because antialiased resizing is fastest on this layout.
    """
    return torch.from_numpy(array_HWC).permute(2, 0, 1)


def to_image(tensor_CHW: torch.Tensor) -> Image.Image:
    """Converts a tensor, uint8 [C, H, W] with 1 or 3 channels, to a PIL image."""
    array = tensor_CHW.cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def encode_png(tensor_CHW: torch.Tensor) -> bytes:
    """Encodes a tensor, uint8 [C, H, W] with 1 or 3 channels, as PNG."""
    return encode(to_image(tensor_CHW), "png", 0)


def tile_images(images_BCHW: torch.Tensor, columns: int, pad: int = 2) -> torch.Tensor:
    """Arranges images in one picture, row by row on white.

    Args:
        images_BCHW: The images, uint8.
        columns: Images in a row.
        pad: Width of the white lines around each image, in pixels.

    Returns:
        The picture, uint8 [C, H', W'].
    """
    count, channels, height, width = images_BCHW.shape
    rows = -(-count // columns)  # rounded up
    sheet = torch.full((channels, rows * (height + pad) + pad, columns * (width + pad) + pad), 255, dtype=torch.uint8)
    for i, image in enumerate(images_BCHW):
        top, left = pad + (i // columns) * (height + pad), pad + (i % columns) * (width + pad)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def to_float(image_BCHW: torch.Tensor) -> torch.Tensor:
    """Converts uint8 pixels to float32 in [-1, 1], the range that the networks expect."""
    return image_BCHW.float() / 127.5 - 1


def to_uint8(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Converts float pixels in [-1, 1] to uint8; clamps values outside."""
    return ((x_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_unit(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Converts float pixels in [-1, 1] to [0, 1], the range that PSNR and SSIM expect; clamps values outside."""
    return (x_BCHW.float().clamp(-1, 1) + 1) / 2


def pad_to_one_size(images_CHW: list[torch.Tensor]) -> list[torch.Tensor]:
    """Pads images at the bottom and the right with 0 to the largest height and width among them."""
    height, width = (max(image.shape[i] for image in images_CHW) for i in (1, 2))
    if all(image.shape[1:] == (height, width) for image in images_CHW):
        return images_CHW
    return [torch.nn.functional.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images_CHW]
