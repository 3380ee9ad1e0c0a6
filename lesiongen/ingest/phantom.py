"""Draws phantom lesions for demos and tests: pictures that look like dermoscopy.

There are seven classes with HAM10000's names. Each is drawn with its textbook sign, strong enough to be visible at 64 px.
They are drawings: metrics measured on them say nothing about real lesions.

Invariant: everything that belongs to the lesion is a function of the lesion's coordinates (u, v) and its own random numbers,
so that every view and size shows the same lesion. The centre of a lesion is (0, 0), and half a picture's width at zoom 1
has length 1.

Shapes: S is the size in pixels. u, v, masks and d (distance from the centre, 1 on the border) are [S,S]; rgb is [S,S,3] in
0..255; skin and other colours are [3].
"""

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

LABELS = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
# Fitzpatrick skin types I to V in the white light of a dermatoscope, in which skin looks pinker and brighter than in daylight.
SKIN = np.array([[238, 203, 194], [229, 187, 172], [214, 167, 146], [190, 140, 116], [158, 110, 88]], np.float32)
SKIN_SHARE = (0.22, 0.3, 0.25, 0.14, 0.09)
MEAN_AGE = {"akiec": 66, "bcc": 67, "bkl": 64, "df": 52, "mel": 61, "nv": 46, "vasc": 51}  # about as in HAM10000
SITES = ("back", "lower extremity", "trunk", "upper extremity", "abdomen", "face", "chest", "foot", "neck", "scalp")
Colour = np.ndarray | tuple[int, int, int]


class Frame(NamedTuple):
    """How a view shows the lesion.

    Attributes:
        u, v: Lesion coordinates of each pixel, [S,S].
        linear, shift: The inverse, for lines: picture coordinates in [-1, 1] are linear [2,2] @ (u, v) + shift [2].
    """

    u: np.ndarray
    v: np.ndarray
    linear: np.ndarray
    shift: np.ndarray


def draw(label: str, lesion: int, view: int, size: int = 96, seed: int = 0) -> np.ndarray:
    """Draws one photograph of one lesion, as a pure function of the arguments.

    Args:
        label: One of LABELS.
        lesion: Number of the lesion. The same (label, lesion, seed) gives the same shape, colours and skin.
        view: Number of the photograph. It changes shift, rotation, zoom, light, hair and ruler.
        size: Width and height in pixels. It changes the resolution only.
        seed: Seed of all random numbers.

    Returns:
        The picture, uint8 RGB [size,size,3].

    Raises:
        ValueError: The label is unknown, a number is negative, or `size` is below 16.
    """
    if label not in LABELS:
        raise ValueError(f"unknown label {label!r}: phantom lesions have the labels {', '.join(LABELS)}")
    if min(lesion, view, seed) < 0 or size < 16:
        raise ValueError(f"lesion, view and seed must be ≥ 0 and size ≥ 16 px, got {lesion}, {view}, {seed} and {size}")
    lesion_rng = np.random.default_rng([seed, LABELS.index(label), lesion])
    view_rng = np.random.default_rng([seed, LABELS.index(label), lesion, view + 1])  # + 1, because [a, b, 0] seeds like [a, b]
    frame = _frame(view_rng, size)
    tone = lesion_rng.choice(len(SKIN), p=SKIN_SHARE) + lesion_rng.uniform(-0.4, 0.4)
    skin = np.array([np.interp(tone, range(len(SKIN)), channel) for channel in SKIN.T], np.float32)
    skin = skin * lesion_rng.uniform(0.97, 1.03, 3).astype(np.float32)
    rgb = np.broadcast_to(skin, (size, size, 3)) * (1 + 0.025 * _noise(lesion_rng, frame, 2.5)[..., None])
    rgb = _photograph(view_rng, PAINTERS[label](lesion_rng, frame, rgb, skin))
    return np.clip(rgb + 0.5, 0, 255).astype(np.uint8)


def write(folder: Path, lesions_per_class: int = 100, size: int = 96, seed: int = 0, progress: bool = True) -> Path:
    """Writes folder/images/<image_id>.jpg, and then folder/metadata.csv with HAM10000's columns.

    A lesion has 1 to 3 views, 2 on average. A repeated call gives the same bytes: complete images of the right size are
    kept, all others are drawn again. No file is removed.

    Args:
        folder: Directory to write to.
        lesions_per_class: Number of lesions of each label, at least 1.
        size: Width and height in pixels.
        seed: Seed of all random numbers.
        progress: Whether to show a progress bar.

    Returns:
        Path of metadata.csv.

    Raises:
        ValueError: `lesions_per_class` is below 1, or an argument of `draw` is wrong.
    """
    if lesions_per_class < 1:
        raise ValueError(f"lesions_per_class must be at least 1, got {lesions_per_class}")
    (Path(folder) / "images").mkdir(parents=True, exist_ok=True)
    # The classes alternate, so that the first rows of the table hold every class.
    jobs = [job for lesion in range(lesions_per_class) for label in LABELS for job in _rows(label, lesion, seed)]
    from tqdm import tqdm  # imported here, so that draw() needs only numpy and Pillow

    for row, lesion, view in tqdm(jobs, desc="phantom lesions", unit="image", disable=not progress):
        path = Path(folder) / "images" / f"{row['image_id']}.jpg"
        if not _is_complete(path, size):
            jpeg = io.BytesIO()
            Image.fromarray(draw(row["dx"], lesion, view, size, seed)).save(jpeg, "JPEG", quality=95)
            _write_atomically(path, jpeg.getvalue())
    table = io.StringIO()
    writer = csv.DictWriter(table, jobs[0][0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for row, _, _ in jobs)
    return _write_atomically(Path(folder) / "metadata.csv", table.getvalue().encode())


def _rows(label: str, lesion: int, seed: int) -> list[tuple[dict, int, int]]:
    """Returns (metadata row, lesion, view) of each image of a lesion. Missing values are written as in HAM10000."""
    rng = np.random.default_rng([seed, LABELS.index(label), lesion, 0, 1])
    name, age = f"PHANTOM{seed}_{label}_{lesion:05d}", 5 * round(np.clip(rng.normal(MEAN_AGE[label], 15), 5, 85) / 5)
    row = {"lesion_id": name, "image_id": name, "dx": label, "age": "" if rng.random() < 0.05 else f"{age}.0"}
    row["sex"] = rng.choice(("male", "female", "unknown"), p=(0.53, 0.44, 0.03))
    row["localization"] = "unknown" if rng.random() < 0.05 else rng.choice(SITES)
    row |= {"copyright_license": "CC-0", "attribution": "lesiongen phantom"}
    views = 1 + rng.choice(3, p=(0.3, 0.4, 0.3))
    return [(row | {"image_id": f"{name}_{view}"}, lesion, view) for view in range(views)]


def _is_complete(path: Path, size: int) -> bool:
    """Returns whether a file is a JPEG of this size with an end marker. Decoding it would take as long as drawing it."""
    try:
        data = path.read_bytes()
        return data.endswith(b"\xff\xd9") and Image.open(io.BytesIO(data)).size == (size, size)
    except OSError:
        return False


def _write_atomically(path: Path, data: bytes) -> Path:
    """Writes a file so that it is complete or missing, never cut, even if the process is killed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(data)
    return partial.replace(path)


def _frame(rng: np.random.Generator, size: int) -> Frame:
    """Draws a view's rotation, zoom and shift."""
    angle, zoom = rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1.15)
    linear = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shift = rng.uniform(-0.12, 0.12, 2)
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    xy = np.stack(np.meshgrid(axis, axis)) - shift[:, None, None]
    return Frame(*np.tensordot(np.linalg.inv(linear), xy, 1).astype(np.float32), linear, shift)


def _noise(rng: np.random.Generator, frame: Frame, frequency: float) -> np.ndarray:
    """Returns value noise [S,S] in -1..1: a small random field, smoothly interpolated, `frequency` cells per half width."""
    field = rng.uniform(-1, 1, (16, 16)).astype(np.float32)  # periodic
    x, y = frame.u * np.float32(frequency) + 64.5, frame.v * np.float32(frequency) + 64.5
    i, j = x.astype(np.int32), y.astype(np.int32)
    x, y = (t * t * (3 - 2 * t) for t in (x - i, y - j))
    i, j, k, m = i & 15, j & 15, (i + 1) & 15, (j + 1) & 15
    above = field[j, i] * (1 - x) + field[j, k] * x
    below = field[m, i] * (1 - x) + field[m, k] * x
    return above * (1 - y) + below * y


def _outline(
    rng: np.random.Generator, frame: Frame, radius: float, stretch: float, wobble: float, waves: Iterable[int] = range(2, 6)
) -> np.ndarray:
    """Returns d [S,S] of an ellipse with mean radius `radius` and ratio of axes `stretch`, whose border is irregular.

    `waves` are the numbers of waves round the border, `wobble` is their height as a share of the radius.
    """
    u, v = frame.u * stretch**0.5, frame.v / stretch**0.5
    angle, border = np.arctan2(v, u), np.ones_like(u)
    for wave in waves:
        border += wobble * rng.uniform(0.5, 1) * (2 / wave) ** 0.5 * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(u, v) / (radius * np.maximum(border, 0.3))


def _inside(d: np.ndarray, soft: float) -> np.ndarray:
    """Returns a mask [S,S]: 1 where d < 1, 0 outside, with a transition of width `soft`."""
    return 1 / (1 + np.exp(np.clip((d - 1) / soft, -30, 30)))


def _dots(
    rng: np.random.Generator, frame: Frame, count: int, reach: float, sizes: tuple[float, float], soft: float
) -> np.ndarray:
    """Returns a mask [S,S] of `count` dots with radii in `sizes`, spread evenly over a disc of radius `reach`.

    Successive dots are a golden angle apart, with jitter.
    """
    mask, start = np.zeros_like(frame.u), rng.uniform(0, 2 * np.pi)
    u, v = (x + 0.06 * _noise(rng, frame, 5) for x in (frame.u, frame.v))  # distorted, so that the dots are not perfect circles
    for n in range(count):
        angle = start + 2.4 * n + rng.uniform(-0.4, 0.4)
        distance = reach * ((n + 0.5) / count) ** 0.5 * rng.uniform(0.85, 1.1)
        d = np.hypot(u - np.float32(distance * np.cos(angle)), v - np.float32(distance * np.sin(angle)))
        mask = np.maximum(mask, _inside(d / np.float32(rng.uniform(*sizes)), soft))
    return mask


def _network(rng: np.random.Generator, frame: Frame, frequency: float) -> np.ndarray:
    """Returns a bent honeycomb [S,S] in -0.5..1, high in the holes: the mean of three plane waves at 60°."""
    waves = [(np.cos(a) * frame.u + np.sin(a) * frame.v) * frequency for a in (0, np.pi / 3, 2 * np.pi / 3)]
    warp = 0.35 * _noise(rng, frame, 3)
    return sum(np.cos(np.float32(2 * np.pi) * (wave + warp)) for wave in waves) / 3


def _strokes(lines: list[tuple[np.ndarray, float]], size: int) -> np.ndarray:
    """Returns a mask [S,S] of polylines, antialiased by drawing them at 4 times the size.

    lines: points [N,2] and line width of each, in units of half the picture's width.
    """
    canvas = Image.new("L", (4 * size, 4 * size))
    pen = ImageDraw.Draw(canvas)
    for points_N2, width in lines:
        pen.line(((points_N2 + 1) * 2 * size).ravel().tolist(), 255, max(1, round(width * 2 * size)), "curve")
    return np.asarray(canvas.reduce(4), np.float32) / 255


def _mix(rgb: np.ndarray, colour: Colour, mask: np.ndarray) -> np.ndarray:
    """Blends `colour` ([3] or [S,S,3]) into the picture, with the mask as its opacity."""
    return rgb + (np.float32(colour) - rgb) * mask[..., None]


def _ink(rng: np.random.Generator, skin: np.ndarray, colour: Colour, follow: float = 0.4) -> np.ndarray:
    """Returns a colour [3] adapted to the skin and varied at random.

    colour: the colour on skin type II; follow: how much it darkens with the skin, 1 for melanin.
    """
    return np.float32(colour) * (skin / SKIN[1]) ** follow * rng.uniform(0.92, 1.08) * rng.uniform(0.97, 1.03, 3)


def _nv(rng: np.random.Generator, frame: Frame, rgb: np.ndarray, skin: np.ndarray) -> np.ndarray:
    """Paints a naevus: round, regular, evenly brown, darker centre, faint network that thins out at the border."""
    d = _outline(rng, frame, rng.uniform(0.42, 0.58), rng.uniform(1, 1.2), 0.025)
    body = _ink(rng, skin, (147, 88, 62), 1) * (1 - 0.28 * np.exp(-((d / 0.55) ** 2)))[..., None]
    net = _network(rng, frame, rng.uniform(4.2, 5))
    return _mix(rgb, body * (1 + 0.13 * net * np.clip(1.15 - d, 0, 1))[..., None], 0.97 * _inside(d, 0.07))


def _mel(rng: np.random.Generator, frame: Frame, rgb: np.ndarray, skin: np.ndarray) -> np.ndarray:
    """Paints a melanoma: large, asymmetric, irregular border; black, dark and light brown, a red area, a blue-white veil."""
    d = _outline(rng, frame, rng.uniform(0.6, 0.75), rng.uniform(1.15, 1.5), 0.1, range(1, 6))
    d = d + 0.1 * _noise(rng, frame, 4) + 0.05 * _noise(rng, frame, 9)
    on, angle = _inside(d, 0.06), rng.uniform(0, 2 * np.pi)  # the colours are on different sides, which makes the asymmetry
    rgb = _mix(rgb, _ink(rng, skin, (128, 75, 57), 1), on)
    side = frame.u * np.cos(angle) + frame.v * np.sin(angle)
    dark = _inside(0.85 + 1.2 * side + 0.7 * _noise(rng, frame, 2.5) + 0.3 * _noise(rng, frame, 6), 0.17)
    rgb = _mix(rgb, _ink(rng, skin, (46, 28, 26), 1), 0.93 * dark * on)
    red = np.hypot(frame.u - 0.33 * np.cos(angle), frame.v - 0.33 * np.sin(angle)) / rng.uniform(0.14, 0.22)
    rgb = _mix(rgb, _ink(rng, skin, (165, 84, 76)), 0.6 * _inside(red, 0.3) * on)
    veil = np.hypot(frame.u - 0.22 * np.cos(angle + 2.2), frame.v - 0.22 * np.sin(angle + 2.2)) / rng.uniform(0.22, 0.3)
    veil = _inside(veil + 0.45 * _noise(rng, frame, 4), 0.2) * on
    return _mix(rgb, _ink(rng, skin, (128, 138, 162)), 0.8 * veil)


def _bcc(rng: np.random.Generator, frame: Frame, rgb: np.ndarray, skin: np.ndarray) -> np.ndarray:
    """Paints a basal cell carcinoma: pearly pink translucent nodule, blue-grey ovoid nests, branching fine red vessels."""
    radius = rng.uniform(0.55, 0.68)
    d = _outline(rng, frame, radius, rng.uniform(1, 1.25), 0.06)
    body = _ink(rng, skin, (232, 164, 172)) * (1.06 - 0.18 * np.clip(d, 0, 1.2) ** 3 + 0.05 * _noise(rng, frame, 3))[..., None]
    rgb = _mix(rgb, body, 0.92 * _inside(d, 0.08))
    rgb = _mix(rgb, (252, 232, 232), 0.5 * np.exp(-((frame.u + 0.12) ** 2 + (frame.v + 0.16) ** 2) / radius**2 * 4))
    nests = _dots(rng, frame, int(rng.integers(4, 7)), 0.85 * radius, (0.09, 0.18), 0.2)
    rgb = _mix(rgb, _ink(rng, skin, (92, 94, 120)), 0.85 * nests)
    vessels, trunks = [], rng.uniform(0, 2 * np.pi) + np.arange(3) * 2.1  # three vessels begin at the border and fork twice
    ends = [(radius * np.array([np.cos(a), np.sin(a)]), a + np.pi) for a in trunks]
    for width, length in ((0.036, 0.45), (0.026, 0.35), (0.018, 0.25)):
        roots, ends = ends, []
        for root, heading in roots:
            bend = heading + rng.uniform(-0.3, 0.3) + rng.uniform(-0.9, 0.9) * np.linspace(-0.5, 0.5, 6)
            path = np.cumsum([root, *(radius * length / 5 * np.stack([np.cos(bend), np.sin(bend)], 1))], 0)
            vessels.append((path @ frame.linear.T + frame.shift, width))
            ends += [(path[-1], bend[-1] + fork) for fork in (rng.uniform(0.3, 0.9), -rng.uniform(0.3, 0.9))]
    return _mix(rgb, (188, 50, 60), 0.7 * _strokes(vessels, len(d)))


def _bkl(rng: np.random.Generator, frame: Frame, rgb: np.ndarray, skin: np.ndarray) -> np.ndarray:
    """Paints a seborrhoeic keratosis: sharp notched border, waxy tan to grey-yellow, light milia, some dark openings."""
    radius = rng.uniform(0.55, 0.7)
    d = _outline(rng, frame, radius, rng.uniform(1.1, 1.4), 0.045, (2, 3, 5, 8, 11))
    rgb = _mix(rgb, _ink(rng, skin, (124, 84, 62)), _inside(d, 0.025))  # dark rim: the shadow of the raised border
    tan, grey = _ink(rng, skin, (190, 150, 108)), _ink(rng, skin, (164, 150, 138))
    body = _mix(np.broadcast_to(tan, rgb.shape), grey, np.clip(0.3 + 0.5 * _noise(rng, frame, 2.5), 0, 0.6))
    body = body * (1 + 0.1 * _noise(rng, frame, 4))[..., None]
    rgb = _mix(rgb, body, _inside(d / 0.9, 0.05))
    on = _inside(d / 0.85, 0.05)
    rgb = _mix(rgb, (98, 70, 50), 0.75 * on * _dots(rng, frame, 5, 0.8 * radius, (0.03, 0.06), 0.25))
    milia = _dots(rng, frame, int(rng.integers(10, 15)), radius, (0.04, 0.075), 0.22)
    return _mix(rgb, (248, 240, 214), 0.92 * on * milia)


def _akiec(rng: np.random.Generator, frame: Frame, rgb: np.ndarray, skin: np.ndarray) -> np.ndarray:
    """Paints an actinic keratosis or Bowen's disease: ill-defined redness under whitish and yellowish scale."""
    d = _outline(rng, frame, rng.uniform(0.6, 0.75), rng.uniform(1, 1.35), 0.08) + 0.2 * _noise(rng, frame, 3)
    red = _ink(rng, skin, (206, 106, 96)) * (1 + 0.08 * _noise(rng, frame, 6))[..., None]
    rgb = _mix(rgb, red, 0.9 * _inside(d, 0.18))
    scale = np.clip(1.3 * (_noise(rng, frame, 4.5) + 0.6 * _noise(rng, frame, 9)), 0, 1) * _inside(d / 0.9, 0.12)
    return _mix(rgb, _ink(rng, skin, (246, 230, 206)), 0.9 * scale)


def _df(rng: np.random.Generator, frame: Frame, rgb: np.ndarray, skin: np.ndarray) -> np.ndarray:
    """Paints a dermatofibroma: pink to light brown ring with a delicate network, round a white scar."""
    d = _outline(rng, frame, rng.uniform(0.42, 0.54), rng.uniform(1, 1.15), 0.03)
    ring = _ink(rng, skin, (183, 112, 96), 1) * (1 + 0.08 * _network(rng, frame, 5))[..., None]
    rgb = _mix(rgb, ring, 0.95 * _inside(d, 0.12))
    scar = _outline(rng, frame, rng.uniform(0.2, 0.25), rng.uniform(1, 1.3), 0.08, (2, 3, 5))
    return _mix(rgb, _ink(rng, skin, (250, 236, 230)), 0.93 * _inside(scar + 0.15 * _noise(rng, frame, 8), 0.2))


def _vasc(rng: np.random.Generator, frame: Frame, rgb: np.ndarray, skin: np.ndarray) -> np.ndarray:
    """Paints an angioma: a cluster of red to purple lagoons, separated by pale septa, on a pink ground."""
    radius = rng.uniform(0.42, 0.55)
    d = _outline(rng, frame, radius * 1.25, rng.uniform(1, 1.2), 0.05)
    rgb = _mix(rgb, _ink(rng, skin, (214, 128, 132)), 0.85 * _inside(d, 0.1))
    lagoons = _dots(rng, frame, int(rng.integers(8, 12)), radius * 0.95, (0.12, 0.19), 0.13)
    red, purple = _ink(rng, skin, (172, 32, 46)), _ink(rng, skin, (98, 28, 70))
    blood = _mix(np.broadcast_to(red, rgb.shape), purple, np.clip(0.5 + 0.8 * _noise(rng, frame, 2), 0, 1))
    return _mix(rgb, blood, 0.94 * lagoons)


def _photograph(rng: np.random.Generator, rgb: np.ndarray) -> np.ndarray:
    """Adds what differs between photographs: hair, a ruler, uneven light, white balance, sometimes the lens's dark rim."""
    size = len(rgb)
    if rng.random() < 0.15:
        hairs, t = [], np.linspace(-1, 1, 24)[:, None]  # parabolas
        for _ in range(rng.integers(1, 6)):
            angle, middle, bend = rng.uniform(0, np.pi), rng.uniform(-0.8, 0.8, 2), rng.uniform(-0.25, 0.25)
            x, y = rng.uniform(0.6, 1.6) * np.array([np.cos(angle), np.sin(angle)])
            hairs.append((middle + t * (x, y) + bend * t**2 * (-y, x), rng.uniform(0.016, 0.03)))
        rgb = _mix(rgb, (58, 42, 36), 0.75 * _strokes(hairs, size))
    if rng.random() < 0.05:
        positions = np.arange(rng.uniform(-1, -0.9), 1, rng.uniform(0.11, 0.15))
        ticks = [(np.array([[x, -1], [x, -0.9 if n % 5 else -0.82]]), 0.02) for n, x in enumerate(positions)]
        rgb = _mix(rgb, (48, 46, 52), 0.8 * np.rot90(_strokes(ticks, size), rng.integers(4)))
    axis = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    radius_squared, angle = axis[:, None] ** 2 + axis[None, :] ** 2, rng.uniform(0, 2 * np.pi)
    slope = axis[:, None] * np.float32(np.sin(angle)) + axis[None, :] * np.float32(np.cos(angle))
    light = rng.uniform(0.94, 1.05) * (1 + rng.uniform(0, 0.05) * slope - rng.uniform(0.02, 0.09) * radius_squared)
    rgb = rgb * light[..., None] * rng.uniform(0.99, 1.01, 3)
    if rng.random() < 0.04:
        rgb = _mix(rgb, (8, 7, 9), 1 - _inside(np.sqrt(radius_squared) / rng.uniform(1.05, 1.2), 0.015))
    return rgb


# Label → function (the lesion's random generator, frame, picture of the skin, the skin's colour) → picture with the lesion
PAINTERS = {"akiec": _akiec, "bcc": _bcc, "bkl": _bkl, "df": _df, "mel": _mel, "nv": _nv, "vasc": _vasc}
