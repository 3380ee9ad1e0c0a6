"""Decoding an image file gives the right pixels or BadImage with the reason. Hostile files cannot crash it or fill memory."""

import io
import struct
import tracemalloc
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from lesiongen.data import images
from lesiongen.data.images import BadImage, decode, decode_tensor

rng = np.random.default_rng(0)
SMOOTH = np.add.outer(np.arange(24), np.arange(32))[..., None] * np.array([4, 3, 2]) % 256
COLOUR = np.clip(np.abs(SMOOTH - 60), 0, 255).astype(np.uint8)  # 24 × 32 × 3
GREY = COLOUR[..., 0]


def save(image: Image.Image | np.ndarray, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def array(content: bytes, channels: int = 3) -> np.ndarray:
    """Returns the decoded pixels, after a check that both functions for decoding agree."""
    found = decode(content, channels)
    assert found.mode == ("RGB" if channels == 3 else "L")
    assert torch.equal(decode_tensor(content, channels), images.to_tensor(found))
    return np.asarray(found).astype(int)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def raw_png(width: int, height: int, depth: int, kind: int, rows: bytes, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def raw_tiff(tags: list[tuple[int, int, int]]) -> bytes:
    """Returns a TIFF without pixels: a header and one directory of 4-byte tags (number, count, value)."""
    entries = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, count, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)


def refused(content: bytes, reason: str, memory: int = 1 << 24) -> None:
    tracemalloc.start()
    try:
        for read in (decode, decode_tensor):
            for channels in (1, 3):
                with pytest.raises(BadImage, match=reason) as caught:
                    read(content, channels)
                assert " at 0x" not in str(caught.value)  # addresses differ between runs; reasons must not
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats(form):
    options = {"lossless": True} if form == "WEBP" else {}
    assert (array(save(COLOUR, form, **options)) == COLOUR).all()


@pytest.mark.parametrize(
    "options",
    [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"restart_marker_blocks": 1}],
)
@pytest.mark.parametrize("source", [COLOUR, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_jpeg_is_as_pillow_reads_it(source, options, channels):
    content = save(source, "JPEG", quality=95, **options)
    plain = np.asarray(Image.open(io.BytesIO(content)).convert("RGB" if channels == 3 else "L"))
    assert (array(content, channels) == plain).all()


def test_the_fast_way_is_taken_for_packed_images(monkeypatch):
    contents = [images.encode(Image.fromarray(source), "jpg", 95) for source in (COLOUR, GREY)]
    expected = [images.to_tensor(decode(content, channels)) for content, channels in zip(contents, (3, 1), strict=True)]
    monkeypatch.setattr(images, "decode", None)
    for content, channels, tensor in zip(contents, (3, 1), expected, strict=True):
        found = decode_tensor(content, channels)
        assert torch.equal(found, tensor)
        assert found.stride(0) == 1 or channels == 1, "the tensor is not channels-last in memory"


def test_tensors_and_pictures_are_inverse():
    for source in (COLOUR, GREY):
        tensor = images.to_tensor(Image.fromarray(source))
        assert tensor.shape == (1 if source.ndim == 2 else 3, 24, 32)
        assert torch.equal(images.to_tensor(Image.open(io.BytesIO(images.encode_png(tensor)))), tensor)


def test_empty_foreign_and_broken_files():
    refused(b"", "not a JPEG")
    refused(b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20, "not a JPEG")
    refused(b"\xff\xd8\xff\xe0" + bytes(500), "not a JPEG")
    refused(save(COLOUR, "GIF"), "not a JPEG")
    refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", "not a JPEG")  # for EPS, Pillow would start Ghostscript
    refused(np.zeros((9, 9)).tobytes(), "not a JPEG")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_a_cut_file_is_refused_or_whole(form):
    content = save(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8), form)
    whole = array(content)
    for end in range(0, len(content), 97):
        try:
            found = array(content[:end])
        except BadImage:
            continue
        assert (found == whole).all() and end > len(content) - 100, "a file whose pixels were cut was decoded"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_damage_anywhere_is_refused_or_decodes(form):
    """Both functions for decoding must agree, and may raise nothing but BadImage."""
    content = save(COLOUR, form)
    for _ in range(200):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content), 3):
            damaged[position] = rng.integers(256)
        with suppress(BadImage):
            array(bytes(damaged))


def test_the_content_decides_and_not_the_name(tmp_path):
    (tmp_path / "x.jpg").write_bytes(save(COLOUR, "PNG"))
    assert (array((tmp_path / "x.jpg").read_bytes()) == COLOUR).all()


def test_cmyk():
    """Adobe's CMYK JPEGs are stored inverted. All CMYK JPEGs are read as inverted, as browsers do."""
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    adobe = save(cmyk, "JPEG", quality=100)
    assert b"Adobe" in adobe
    assert np.abs(array(adobe) - COLOUR).mean() < 3
    assert np.abs(array(save(cmyk, "TIFF")) - COLOUR).max() <= 1
    white = save(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG")
    assert array(white).min() > 250


def test_jpegs_that_store_red_green_blue():
    assert np.abs(array(save(COLOUR, "JPEG", keep_rgb=True, quality=100)) - COLOUR).max() <= 2


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(form):
    deep = GREY.astype(np.uint16) * 257
    for channels in (1, 3):
        found = array(save(deep, form), channels)
        assert (found == (GREY if channels == 1 else GREY[..., None])).all()


def test_16_bit_grey_of_the_other_byte_order():
    image = Image.frombytes("I;16B", (32, 24), (GREY.astype(">u2") * 257).tobytes())
    assert (array(save(image, "TIFF"), 1) == GREY).all()


def test_16_bit_colour():
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in COLOUR.astype(np.uint16) * 257)
    assert (array(raw_png(32, 24, 16, 2, rows)) == COLOUR).all()


def test_values_without_a_known_white_are_refused():
    refused(save(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16), "TIFF"), "nothing says which value is white")
    refused(save(np.full((16, 16), 1 << 20, dtype=np.int32), "TIFF"), "nothing says which value is white")


def test_one_bit_and_palettes():
    bits = GREY > 60
    assert (array(save(Image.fromarray(bits), "PNG"), 1) == bits * 255).all()
    palette = Image.fromarray(COLOUR).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert (array(save(palette, "PNG")) == expected).all()
    assert (array(save(palette, "BMP")) == expected).all()


def test_transparency_is_white():
    alpha = np.where(np.arange(32) < 16, 255, 0)[None].repeat(24, 0).astype(np.uint8)
    colour = np.where(alpha[..., None] == 255, COLOUR, 255)
    grey = np.where(alpha == 255, GREY, 255)
    rgba = np.dstack([COLOUR, alpha])
    for content in (save(rgba, "PNG"), save(rgba, "TIFF"), save(rgba, "WEBP", lossless=True, exact=True)):
        assert (array(content) == colour).all()
    assert (array(save(np.dstack([GREY, alpha]), "PNG"), 1) == grey).all()
    palette = Image.fromarray(COLOUR).quantize(16)
    expected = np.asarray(palette.convert("RGB")).copy()
    expected[np.asarray(palette) == 3] = 255
    assert (array(save(palette, "PNG", transparency=3)) == expected).all()
    marked = COLOUR.copy()
    marked[:, 16:] = (1, 2, 3)
    assert (array(save(marked, "PNG", transparency=(1, 2, 3)))[:, 16:] == 255).all()
    half = np.dstack([np.zeros_like(COLOUR), np.full_like(alpha, 128)])
    assert (array(save(half, "PNG")) == 127).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_are_turned_upright(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    content = save(COLOUR, form, exif=exif, **options)
    index = {1: 0, 2: 2, 3: 3, 4: 1, 5: 4, 6: 5, 7: 6, 8: 7}[orientation]
    flip = (lambda a: a, np.flipud, np.fliplr, lambda a: a[::-1, ::-1])
    turns = (*flip, lambda a: a.swapaxes(0, 1), lambda a: np.rot90(a, -1), lambda a: np.rot90(a, 2).swapaxes(0, 1), np.rot90)
    assert np.abs(array(content) - turns[index](COLOUR)).max() <= (6 if form == "JPEG" else 0)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_refused(form):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    refused(save(frames[0], form, save_all=True, append_images=frames[1:]), "not a JPEG" if form == "GIF" else "several frames")


def test_of_an_mpo_the_first_picture_counts():
    second = Image.new("RGB", (32, 24), "blue")
    content = save(COLOUR, "MPO", save_all=True, append_images=[second], quality=100, subsampling=0)
    assert Image.open(io.BytesIO(content)).format == "MPO"
    assert np.abs(array(content) - COLOUR).max() <= 6


def test_headers_that_claim_too_much():
    for width, height in ((100_000, 100_000), (2**31 - 1, 1), (8001, 8001)):
        refused(raw_png(width, height, 8, 2, b""), "pixels are more than|exceeds limit")
    jpeg = bytearray(save(COLOUR, "JPEG"))
    position = jpeg.index(b"\xff\xc0") + 5
    jpeg[position : position + 4] = struct.pack(">HH", 65500, 65500)
    refused(bytes(jpeg), "exceeds limit")
    bmp = bytearray(save(COLOUR, "BMP"))
    bmp[18:26] = struct.pack("<ii", 50_000, 50_000)
    refused(bytes(bmp), "exceeds limit")
    webp = bytearray(save(np.dstack([COLOUR, GREY]), "WEBP", exif=b"Exif\0\0"))
    position = webp.index(b"VP8X") + 12
    webp[position : position + 6] = b"\xff\x3f\0\xff\x3f\0"
    refused(bytes(webp), "exceeds limit|not a")
    size = [(256, 1, 100_000), (257, 1, 100_000), (258, 1, 8), (259, 1, 1), (262, 1, 1), (277, 1, 1), (273, 1, 8)]
    refused(raw_tiff([*size, (278, 1, 100_000), (279, 1, 2**32 - 1)]), "exceeds limit")
    refused(save(COLOUR[:4], "PNG"), "32×4 pixels are too few")


def test_tiffs_that_claim_gigabytes_elsewhere():
    size = [(256, 1, 64), (257, 1, 64), (258, 1, 8), (277, 1, 1), (262, 1, 1)]
    refused(raw_tiff([*size, (259, 1, 1), (273, 2**31, 8), (278, 1, 64), (279, 2**31, 8)]), "not a")
    refused(raw_tiff([*size, (259, 1, 8), (322, 1, 2**15), (323, 1, 2**15), (324, 1, 8), (325, 1, 50)]), "tiles much larger")
    refused(raw_tiff([*size, (259, 1, 8), (273, 1, 8), (278, 1, 2**31), (279, 1, 2**31)]), "not a")


def test_a_huge_file_is_refused_unread(tmp_path):
    path = tmp_path / "a.jpg"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a sparse file, which needs no disk; reading it would fill the memory
    with pytest.raises(images.BadImage, match="512 MiB"):
        images.read(path)


def test_small_files_that_unpack_to_much():
    bomb = zlib.compress(bytes(1 << 26))  # 64 kB → 64 MB
    rows = bytes(24 * 97)
    refused(raw_png(32, 24, 8, 2, rows, chunk(b"zTXt", b"Comment\0\0" + bomb)), "too large|not a readable")
    refused(raw_png(32, 24, 8, 2, rows, chunk(b"iCCP", b"profile\0\0" + bomb)), "too large|not a readable")
    long = chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb)
    refused(raw_png(32, 24, 8, 2, rows, long), "too large|not a readable")
    assert array(raw_png(32, 24, 8, 2, bytes(1 << 26))).max() == 0  # rows beyond the height in the header are not unpacked


def test_profiles_are_converted():
    pytest.importorskip("PIL._imagingcms")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = save(COLOUR, "PNG", icc_profile=srgb)
    assert (array(same) == COLOUR).all()
    other = save(COLOUR, "PNG", icc_profile=swapped(srgb))
    assert np.abs(array(other)[..., [1, 0, 2]] - COLOUR).max() <= 2
    jpeg = save(COLOUR, "JPEG", icc_profile=swapped(srgb), quality=100, subsampling=0)
    assert np.abs(array(jpeg)[..., [1, 0, 2]] - COLOUR).max() <= 6
    assert (array(save(COLOUR, "PNG", icc_profile=b"broken" * 50)) == COLOUR).all()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert (array(save(COLOUR, "PNG", icc_profile=lab)) == COLOUR).all()


def swapped(profile: bytes) -> bytes:
    """Returns an RGB profile in which red and green are exchanged."""
    return (
        profile.replace(b"rXYZ", b"tmp?")
        .replace(b"gXYZ", b"rXYZ")
        .replace(b"tmp?", b"gXYZ")
        .replace(b"s\0R\0G\0B", b"x\0x\0x\0x")
    )


def test_large_jpegs_are_read_smaller_where_nothing_is_lost():
    fine = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    photo = Image.fromarray(fine).resize((1280, 960), Image.Resampling.BICUBIC)
    content = save(photo, "JPEG", quality=95)
    small = decode(content, size=64)
    assert small.size == (640, 480) or small.size == (320, 240)
    a, b = (np.asarray(images.resize_short_side(image, 64)).astype(int) for image in (small, decode(content)))
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= 3 and np.abs(a - b).mean() < 0.5
    assert decode(content, size=200).size == photo.size
    assert decode(save(COLOUR, "PNG"), size=1).size == (32, 24)


def test_a_grid_on_white():
    sheet = images.tile_images(torch.zeros(5, 3, 4, 6, dtype=torch.uint8), columns=3)
    assert sheet.shape == (3, 2 * 6 + 2, 3 * 8 + 2)
    assert int((sheet == 0).sum()) == 5 * 3 * 4 * 6
