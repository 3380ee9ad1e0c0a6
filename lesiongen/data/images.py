"""Untrusted image bytes → pixels, with every bound checked from the header before anything is decoded."""

import io
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000  # a 100-byte file can claim a billion; each takes up to 16 bytes of memory
MAX_BYTES = 1 << 29  # of a file: an uncompressed image of that many pixels has less
MIN_SIDE = 8
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # MPO comes as a JPEG
METADATA = (b"Exif\0", b"ICC_PROFILE\0", b"tiff:Orientation")  # what turns or recolours the pixels of a JPEG
PLAIN = {("YCbCr", 3): "RGB", ("Gray", 1): "GRAY"}  # (colours in the file, channels wanted): simplejpeg's name


class BadImage(ValueError):
    """An image that cannot be used, and why."""


def read(path: Path, channels: int = 3, size: int = 0) -> Image.Image:
    """decode() of a file. Raises BadImage, OSError."""
    if path.stat().st_size > MAX_BYTES:
        raise BadImage(f"a file of more than {MAX_BYTES >> 20} MiB")
    return decode(path.read_bytes(), channels, size)


def decode(content: bytes, channels: int = 3, size: int = 0) -> Image.Image:
    """PIL image in RGB (channels=3) or L (1), upright, sRGB, transparency on white. Raises BadImage.

    With `size`, what shrink() will be asked for, a JPEG at least 8 times as large is read at a fraction of its size: several
    times faster, and still 4 times larger than needed, so that the result is the same but for rounding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            _check(*image.size)
            if image.format == "TIFF" and image.tag_v2.get(322, 0) * image.tag_v2.get(323, 0) > MAX_PIXELS:
                raise BadImage("tiles much larger than the image")  # each is unpacked whole
            if image.format != "MPO" and getattr(image, "is_animated", False):
                # Those of an MPO are one picture with previews; here nothing says which one has the label.
                raise BadImage("several frames or pages in one file; keep the one that is meant")
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
        raise BadImage("not a JPEG, PNG, BMP, TIFF or WebP file, or broken from its beginning") from None
    except Exception as error:  # PIL's decoders raise almost anything on broken files
        raise BadImage(f"not a readable image ({str(error) or type(error).__name__})") from None


def pixels(content: bytes, channels: int = 3) -> torch.Tensor:
    """to_tensor(decode(content, channels)), to the bit, in half the time for a plain JPEG. Raises BadImage."""
    if content[:2] == b"\xff\xd8" and not any(name in content for name in METADATA):
        with suppress(ValueError):  # whatever it is, Pillow decides and says what is wrong
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            if (colours, channels) in PLAIN:
                _check(width, height)
                return _channels_first(simplejpeg.decode_jpeg(content, PLAIN[colours, channels]))
    return to_tensor(decode(content, channels))


def _check(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}×{height} pixels are more than {MAX_PIXELS:,}")
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"{width}×{height} pixels are too few")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scales 16 bits of grey, which PIL would clip. It reads 16 bits of colour as their upper 8 by itself."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise BadImage("32 bits a pixel, and nothing says which value is white; convert it to 8 or 16 bits")
    return Image.fromarray((values // 257).astype(np.uint8))


def _srgb(image: Image.Image) -> Image.Image:
    """Colours as the embedded profile means them: phones save Display P3, and colour is what lesions are told by."""
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK"):
        with suppress(ImageCms.PyCMSError, OSError):  # a broken profile, or one of other colours, counts as none
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image


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
    """uint8 [C, H, W], channels last in memory."""
    return _channels_first(np.atleast_3d(np.array(image)))  # a copy: PIL's own memory is read-only


def _channels_first(array_HWC: np.ndarray) -> torch.Tensor:
    """A view: antialiased resizing is fastest where channels lie last."""
    return torch.from_numpy(array_HWC).permute(2, 0, 1)


def to_image(tensor_CHW: torch.Tensor) -> Image.Image:
    """A uint8 [C, H, W] tensor with 1 or 3 channels."""
    array = tensor_CHW.cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def png(tensor_CHW: torch.Tensor) -> bytes:
    """PNG bytes of a uint8 [C, H, W] tensor with 1 or 3 channels."""
    return encode(to_image(tensor_CHW), "png", 0)


def grid(images_BCHW: torch.Tensor, columns: int, pad: int = 2) -> torch.Tensor:
    """uint8 [B, C, H, W] → one uint8 picture [C, H', W'], row by row on white."""
    count, channels, height, width = images_BCHW.shape
    rows = -(-count // columns)
    sheet = torch.full((channels, rows * (height + pad) + pad, columns * (width + pad) + pad), 255, dtype=torch.uint8)
    for i, image in enumerate(images_BCHW):
        top, left = pad + (i // columns) * (height + pad), pad + (i % columns) * (width + pad)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def to_float(image_BCHW: torch.Tensor) -> torch.Tensor:
    """uint8 pixels → float32 in [-1, 1], as the networks take them."""
    return image_BCHW.float() / 127.5 - 1


def to_uint8(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Float pixels in [-1, 1] → uint8; values outside are clamped."""
    return ((x_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_unit(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Float pixels in [-1, 1] → [0, 1], as PSNR and SSIM take them; values outside are clamped."""
    return (x_BCHW.float().clamp(-1, 1) + 1) / 2
