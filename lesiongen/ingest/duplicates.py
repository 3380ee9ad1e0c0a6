"""Finds near-duplicates: photographs of one lesion that come again under another id, scanned, cropped, scaled or turned.

There are two steps, both on 64 × 64 px thumbnails.

1. Candidates. The amplitude spectrum of a picture does not change when the picture is shifted or turned by 180°, and hardly
   changes when it is brightened. Its low frequencies therefore describe the picture. The nearest pictures of each one, over
   mirror images, quarter turns and three scales, are found by matrix products.
2. Verification. Phase correlation finds the shift between the two pictures of a candidate pair. Gauss-Newton steps then find
   the affine map that aligns them (efficient second-order minimisation: Benhimane & Malis 2004). The score is the
   correlation of fine detail after alignment. Before alignment all round blobs on skin look alike. After it only pictures
   without fine detail, such as drawings, still do.

`pairing.find_near_duplicates` calls this for packing.

Shapes: N images, B images of a block, P pairs, V = 12 variants, D = 106 frequencies, S the side in pixels. Maps [P,2,3] take
coordinates in [-1, 1] of the second picture to those of the first, as in torch.nn.functional.affine_grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

from hpc.run.progress import progress_bar
from lesiongen.data import images

SIDE = 64
THRESHOLD = 0.87  # HAM10000 and ISIC's CC-0 images have 768 pairs above it, 2 of them known to be of different lesions
NEAREST = 16  # candidates of each image
BATCH = 128  # pairs that are verified together
FREQUENCIES = 8  # highest frequency of the spectrum, in cycles per picture
SCALES = (0.85, 1.0, 1.18)
MAX_SHIFT = 10 / 32  # between the two pictures, in sides
MIN_OVERLAP = 0.35  # of the two pictures once aligned, as a share of the picture
MAX_SCALE, MAX_STRETCH = 1.6, 1.2  # of an affine map: its largest scale, and the ratio of its larger to its smaller scale


class _Level(NamedTuple):
    """One level of the coarse-to-fine alignment.

    Attributes:
        shrink: Factor by which the thumbnails are reduced.
        fine, wide: σ in pixels of the two blurs whose difference is the detail that is compared.
        steps: Gauss-Newton steps.
        min_score: Pairs with a higher score continue to the next level.
    """

    shrink: int
    fine: float
    wide: float
    steps: int
    min_score: float


LEVELS = (_Level(2, 1, 4, 6, 0.9), _Level(1, 1, 4, 4, 0.85), _Level(1, 0.7, 2, 4, 0))


@dataclass(frozen=True)
class Pair:
    """Two images of one lesion, a < b. The score is the correlation of their fine detail once aligned, 1 at most."""

    a: str
    b: str
    score: float


def thumbnail(image: Image.Image) -> np.ndarray:
    """Returns the central square in grey, reduced to uint8 [64,64] by averaging areas."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.array(image.resize((SIDE, SIDE), Image.Resampling.BOX, box, reducing_gap=4).convert("L"))


@torch.no_grad()
def find_pairs(
    ids: list[str], thumbnails_NSS: np.ndarray, new_from: int = 0, threshold: float = THRESHOLD, progress: bool = True
) -> list[Pair]:
    """Finds the pairs of images that show the same lesion. Takes about N² / 2·10⁷ + N / 100 seconds on one core.

    Args:
        ids: Distinct ids of the images.
        thumbnails_NSS: uint8 [N,64,64], from `thumbnail`.
        new_from: Index of the first new image. New images are compared with all images, old ones not with each other.
        threshold: Lowest score of a pair. Below 0.85 few more pairs are found.
        progress: Whether to show progress bars.

    Returns:
        The pairs, highest score first.

    Raises:
        ValueError: Ids repeat, or do not match the thumbnails in number.
    """
    if thumbnails_NSS.shape != (len(ids), SIDE, SIDE) or thumbnails_NSS.dtype != np.uint8 or len(set(ids)) < len(ids):
        raise ValueError(f"{len(ids)} distinct ids need uint8 [{len(ids)},{SIDE},{SIDE}], got {thumbnails_NSS.shape}")
    if not 0 <= new_from < len(ids) or len(ids) < 2:
        return []
    x_NSS = torch.from_numpy(thumbnails_NSS)
    pairs_P2, variants_P22 = _candidates(x_NSS, new_from, progress)
    scores = []
    with progress_bar(len(pairs_P2), "duplicates: verify", "pair", shown=progress) as progress_display:
        for pair, variants in zip(pairs_P2.split(BATCH), variants_P22.split(BATCH), strict=True):
            scores.append(_scores(x_NSS[pair[:, 0]].float(), x_NSS[pair[:, 1]].float(), variants))
            progress_display.update(len(pair))
    scored = [(ids[i], ids[j], s) for (i, j), s in zip(pairs_P2.tolist(), torch.cat(scores).tolist(), strict=True)]
    pairs = [Pair(min(a, b), max(a, b), round(s, 4)) for a, b, s in scored if s >= threshold]
    return sorted(pairs, key=lambda pair: (-pair.score, pair.a, pair.b))


def draw_pairs(pairs: list[Pair], load: Callable[[str], Image.Image], limit: int = 60, side: int = 160) -> torch.Tensor:
    """Draws pairs of images side by side under their scores and ids, for people to check.

    Args:
        pairs: The pairs, of which the first `limit` are drawn.
        load: Returns the image of an id.
        limit: Largest number of pairs to draw.
        side: Side of each image in the picture, in pixels.

    Returns:
        The picture, uint8 [3,H,W].
    """
    tiles = []
    for pair in pairs[:limit]:
        tile = Image.new("RGB", (2 * side, side + 14), "white")
        for i, name in enumerate((pair.a, pair.b)):
            tile.paste(ImageOps.fit(load(name).convert("RGB"), (side, side)), (i * side, 14))
        ImageDraw.Draw(tile).text((1, 1), f"{pair.score:.3f} {pair.a} {pair.b}", "black")
        tiles.append(images.to_tensor(tile))
    return images.tile_images(torch.stack(tiles), 4) if tiles else torch.full((3, 1, 1), 255, dtype=torch.uint8)


def _variants() -> torch.Tensor:
    """Returns linear maps [V,2,2]: mirror images × quarter turns × scales. Their negatives are the same after a half turn."""
    mirror, quarter_turn = torch.diag(torch.tensor([-1.0, 1.0])), torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    return torch.stack([m @ t / s for m in (torch.eye(2), mirror) for t in (torch.eye(2), quarter_turn) for s in SCALES])


def _window(side: int) -> torch.Tensor:
    """Returns weights [S,S], 1 in the middle and 0 on the border. Without them black corners and rulers would correlate."""
    hann = torch.hann_window(side, periodic=False).sqrt()
    return hann[:, None] * hann


def _warp(x_PCSS: torch.Tensor, maps_P23: torch.Tensor) -> torch.Tensor:
    """Resamples the pictures [P,C,S,S] by the maps."""
    grid = F.affine_grid(maps_P23, x_PCSS.shape, align_corners=False)
    return F.grid_sample(x_PCSS, grid, padding_mode="border", align_corners=False)


def _spectra(x_NSS: torch.Tensor) -> torch.Tensor:
    """Returns the amplitudes [N,D] of low frequencies.

    They are compressed by a fourth root, then scaled to length 1, which removes the picture's contrast.
    """
    k = torch.arange(-FREQUENCIES, FREQUENCIES + 1)
    radius = k[:, None] ** 2 + k[FREQUENCIES:] ** 2
    amplitude = torch.fft.fft2((x_NSS - x_NSS.mean((1, 2), keepdim=True)) * _window(SIDE)).abs()
    low = amplitude[:, k][:, :, k[FREQUENCIES:]][:, (radius > 0) & (radius <= FREQUENCIES**2)]
    return F.normalize(low**0.25)


def _candidates(x_NSS: torch.Tensor, new_from: int, progress: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the nearest pictures of each new picture by their spectra.

    Returns:
        Indices of pairs, int64 [P,2], each pair once; and for each the variant [P,2,2] that takes coordinates of the second
        picture to those of the first.
    """
    variants, total = _variants(), len(x_NSS)
    # Spectra of all pictures as they are, each frequency standardised over the pictures.
    plain_ND = torch.cat([_spectra(part.float()) for part in x_NSS.split(4096)])
    mean, std = plain_ND.mean(0), plain_ND.std(0) + 1e-4
    plain_ND = F.normalize((plain_ND - mean) / std)
    # Compare each variant of a block of new pictures with all of them.
    pair_codes, variant_indices = [], []
    rows = max(1, min(256, 2**26 // total))  # at most 256 MB of similarities
    with progress_bar(total - new_from, "duplicates: candidates", shown=progress) as progress_display:
        for i in torch.arange(new_from, total).split(rows):
            x_B1SS = x_NSS[i, None].float()
            warped = [_warp(x_B1SS, F.pad(m, (0, 1)).expand(len(i), 2, 3))[:, 0] for m in variants]
            queries_BVD = torch.stack([F.normalize((_spectra(x) - mean) / std) for x in warped], 1)
            near_BN = queries_BVD[:, 0] @ plain_ND.T
            for v in range(1, len(variants)):
                torch.maximum(near_BN, queries_BVD[:, v] @ plain_ND.T, out=near_BN)
            near_BN[torch.arange(len(i)), i] = -torch.inf
            j = near_BN.topk(min(NEAREST, total - 1)).indices
            pair_codes.append((i[:, None] * total + j).flatten())
            variant_indices.append((queries_BVD @ plain_ND[j].mT).argmax(1).flatten().to(torch.uint8))
            progress_display.update(len(i))
    # Keep each pair once: (i, j) and (j, i) are the same.
    i, j = (code := torch.cat(pair_codes)) // total, code % total
    _, first = np.unique((torch.minimum(i, j) * total + torch.maximum(i, j)).numpy(), return_index=True)
    first = torch.from_numpy(first)
    return torch.stack([i, j], 1)[first], variants[torch.cat(variant_indices)[first].long()]


def _blur(side: int, sigma: float) -> torch.Tensor:
    """Returns a matrix [S,S] that blurs along one axis with a Gaussian, renormalised at the border."""
    position = torch.arange(side, dtype=torch.float32)
    return F.normalize(torch.exp(-0.5 * ((position[:, None] - position) / sigma) ** 2), p=1)


def _detail(x_PSS: torch.Tensor, fine: float, wide: float, local: float = 4) -> torch.Tensor:
    """Returns the difference of two blurs (σ in pixels) over its local contrast, so that dark and pale pictures look alike."""
    f, w, c = (_blur(x_PSS.shape[-1], sigma) for sigma in (fine, wide, local))
    band = f @ x_PSS @ f.T - w @ x_PSS @ w.T
    return band / ((c @ band.square() @ c.T).sqrt() + 3)  # + 3 grey levels keeps noise and flat skin small


def _shift(a_PSS: torch.Tensor, b_PSS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the shift [P,2] (x, y in units of half a side) from a to b with the highest correlation [P], by FFT."""
    side = a_PSS.shape[-1]
    reach = int(MAX_SHIFT * side)
    size, near = (side + reach,) * 2, torch.arange(-reach, reach + 1)
    window = _window(side)
    product = torch.fft.rfft2(a_PSS * window, s=size).conj() * torch.fft.rfft2(b_PSS * window, s=size)
    height, index = torch.fft.irfft2(product, s=size)[:, near][:, :, near].flatten(1).max(1)
    return height, (torch.stack([index % len(near), index // len(near)], 1) - reach) * 2 / side


def _align(a_PSS: torch.Tensor, b_PSS: torch.Tensor, maps_P23: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Refines the maps by Gauss-Newton steps.

    Returns:
        The new maps, and the correlation [P] before the last step; -1 for maps that are no plausible alignment.
    """
    side = a_PSS.shape[-1]
    window = _window(side)
    both_P2SS = torch.stack([a_PSS, window.expand_as(a_PSS)], 1)
    axis = (torch.arange(side) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    basis_3SS = torch.stack([x, y, torch.ones_like(x)])
    for _ in range(steps):
        warped, weight = _warp(both_P2SS, maps_P23).unbind(1)
        weight = weight * window
        a, b = (v / ((weight * v * v).sum((1, 2), keepdim=True).sqrt() + 1e-3) for v in (warped, b_PSS))
        score = (weight * a * b).sum((1, 2))
        dy, dx = torch.gradient((a + b) / 2, spacing=2 / side, dim=(1, 2))
        jacobian = torch.cat([dx[:, None] * basis_3SS, dy[:, None] * basis_3SS], 1).flatten(2)
        weighted = jacobian * weight.flatten(1)[:, None]
        hessian = weighted @ jacobian.mT
        damped = hessian + 1e-2 * torch.diag_embed(hessian.diagonal(dim1=1, dim2=2) + 1e-6)
        step = torch.linalg.solve(damped, weighted @ (b - a).flatten(1)[..., None]).clamp(-0.1, 0.1).view(-1, 2, 3)
        linear = maps_P23[:, :, :2]
        maps_P23 = maps_P23 + linear @ step
    # Reject maps with little overlap, strong scaling, or much stretch, such as from a long blob to a round one: with these,
    # pictures of different lesions correlate too.
    large, small = torch.linalg.svdvals(maps_P23[:, :, :2]).unbind(1)
    plausible = (weight.sum((1, 2)) > MIN_OVERLAP * window.square().sum()) & (large < MAX_STRETCH * small)
    plausible &= (large < MAX_SCALE) & (small > 1 / MAX_SCALE)
    return maps_P23, torch.where(plausible, score, -1.0)


def _initial_maps(a_PSS: torch.Tensor, b_PSS: torch.Tensor, variants_P22: torch.Tensor) -> torch.Tensor:
    """Returns maps [P,2,3]: the variant or its half turn, whichever correlates better, with the best shift."""
    options = []
    for linear in (variants_P22, -variants_P22):
        height, shift = _shift(_warp(a_PSS[:, None], F.pad(linear, (0, 1)))[:, 0], b_PSS)
        options.append((height, torch.cat([linear, -linear @ shift[..., None]], 2)))
    (height, maps), (half_turn_height, half_turn_maps) = options
    return torch.where((half_turn_height > height)[:, None, None], half_turn_maps, maps)


def _scores(a_PSS: torch.Tensor, b_PSS: torch.Tensor, variants_P22: torch.Tensor) -> torch.Tensor:
    """Returns the correlation [P] of fine detail once aligned, 0 for pairs that a coarser level has ruled out."""
    scores, remaining, maps = torch.zeros(len(a_PSS)), torch.arange(len(a_PSS)), None
    for level in LEVELS:
        a, b = (_detail(F.avg_pool2d(x[remaining], level.shrink), level.fine, level.wide) for x in (a_PSS, b_PSS))
        maps, score = _align(a, b, _initial_maps(a, b, variants_P22) if maps is None else maps, level.steps)
        maps, score, remaining = (x[score > level.min_score] for x in (maps, score, remaining))
        if not len(remaining):
            break
    scores[remaining] = score
    return scores
