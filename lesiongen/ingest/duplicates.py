"""Near-duplicates: photographs of one lesion that were scanned, cropped, scaled or turned anew, under another name.

Two steps, both on 64 × 64 px thumbnails. Candidates: the amplitude spectrum of a picture does not change when the picture
is shifted or turned by 180°, and hardly when it is brightened, so its low frequencies are a global descriptor; each
picture's nearest ones, over mirror images, quarter turns and three scales, come from matrix products over blocks.
Verification: phase correlation finds the shift of a candidate, Gauss-Newton the affine map that lays one picture over the
other (efficient second-order minimisation: Benhimane & Malis 2004); the score is what correlation of fine detail is left.
Round blobs on skin all look alike until then; only drawings, which have no fine detail, still do after it.

Shapes: N images, P pairs, V = 12 variants, D = 106 frequencies, S the side in pixels. Maps [P,2,3] take coordinates in
[-1, 1] of the second picture to those of the first, as in torch.nn.functional.affine_grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

from hpc.run.progress import bar
from lesiongen.data import images

SIDE = 64
THRESHOLD = 0.87  # of 768 pairs in HAM10000 and ISIC's CC-0 images those above it hold 2 of different lesions
NEAREST = 16  # candidates of an image
BATCH = 128  # pairs verified at once
FREQUENCIES = 8  # cycles a picture
SCALES = (0.85, 1.0, 1.18)
REACH = 10 / 32  # largest shift looked for, in sides
OVERLAP, STRETCH, SQUEEZE = 0.35, 1.6, 1.2  # least share of a picture on the other, largest scale and ratio of axes
# Coarse to fine: reduction, detail (σ of two blurs in pixels), Gauss-Newton steps, correlation to be worth going on
LEVELS = ((2, 1, 4, 6, 0.9), (1, 1, 4, 4, 0.85), (1, 0.7, 2, 4, 0))


@dataclass(frozen=True)
class Pair:
    """Two images of one lesion, a < b; score: correlation of their fine detail once aligned, 1 at most."""

    a: str
    b: str
    score: float


def thumbnail(image: Image.Image) -> np.ndarray:
    """uint8 [64,64]: the central square in grey, area means (4 kB an image is all that is kept of it)."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.array(image.resize((SIDE, SIDE), Image.Resampling.BOX, box, reducing_gap=4).convert("L"))


@torch.no_grad()
def find(
    ids: list[str], thumbnails_NSS: np.ndarray, new_from: int = 0, threshold: float = THRESHOLD, progress: bool = True
) -> list[Pair]:
    """Pairs that score at least `threshold`, best first, of which one at least has an index ≥ new_from: images that are
    appended are compared with all, old ones not again. thumbnails: uint8 [N,64,64]. ValueError if the two do not fit.
    Time grows with N² / 2·10⁷ + N / 100 seconds on one core; a threshold under 0.85 finds little more."""
    if thumbnails_NSS.shape != (len(ids), SIDE, SIDE) or thumbnails_NSS.dtype != np.uint8 or len(set(ids)) < len(ids):
        raise ValueError(f"{len(ids)} distinct ids need uint8 [{len(ids)},{SIDE},{SIDE}], got {thumbnails_NSS.shape}")
    if not 0 <= new_from < len(ids) or len(ids) < 2:
        return []
    x_NSS = torch.from_numpy(thumbnails_NSS)
    pairs_P2, maps_P22 = _candidates(x_NSS, new_from, progress)
    scores = []
    with bar(len(pairs_P2), "duplicates: verify", "pair", shown=progress) as done:
        for pair, maps in zip(pairs_P2.split(BATCH), maps_P22.split(BATCH), strict=True):
            scores.append(_scores(x_NSS[pair[:, 0]].float(), x_NSS[pair[:, 1]].float(), maps))
            done.update(len(pair))
    found = [(ids[i], ids[j], s) for (i, j), s in zip(pairs_P2.tolist(), torch.cat(scores).tolist(), strict=True)]
    found = [Pair(min(a, b), max(a, b), round(s, 4)) for a, b, s in found if s >= threshold]
    return sorted(found, key=lambda pair: (-pair.score, pair.a, pair.b))


def sheet(pairs: list[Pair], load: Callable[[str], Image.Image], limit: int = 60, side: int = 160) -> torch.Tensor:
    """uint8 [3,H,W]: the first `limit` pairs side by side under their scores, for people to look at."""
    tiles = []
    for pair in pairs[:limit]:
        tile = Image.new("RGB", (2 * side, side + 14), "white")
        for i, name in enumerate((pair.a, pair.b)):
            tile.paste(ImageOps.fit(load(name).convert("RGB"), (side, side)), (i * side, 14))
        ImageDraw.Draw(tile).text((1, 1), f"{pair.score:.3f} {pair.a} {pair.b}", "black")
        tiles.append(images.to_tensor(tile))
    return images.grid(torch.stack(tiles), 4) if tiles else torch.full((3, 1, 1), 255, dtype=torch.uint8)


def _variants() -> torch.Tensor:
    """[V,2,2]: mirror images × quarter turns × scales; half turns are the negatives of these."""
    mirror, turn = torch.diag(torch.tensor([-1.0, 1.0])), torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    return torch.stack([f @ t / s for f in (torch.eye(2), mirror) for t in (torch.eye(2), turn) for s in SCALES])


def _window(side: int) -> torch.Tensor:
    """[S,S]: 1 in the middle, 0 on the border, or black corners and rulers would correlate."""
    hann = torch.hann_window(side, periodic=False).sqrt()
    return hann[:, None] * hann


def _warp(x_PCSS: torch.Tensor, maps_P23: torch.Tensor) -> torch.Tensor:
    grid = F.affine_grid(maps_P23, x_PCSS.shape, align_corners=False)
    return F.grid_sample(x_PCSS, grid, padding_mode="border", align_corners=False)


def _spectra(x_NSS: torch.Tensor) -> torch.Tensor:
    """[N,D] amplitudes of low frequencies, compressed (fourth root) and freed of contrast."""
    k = torch.arange(-FREQUENCIES, FREQUENCIES + 1)
    radius = k[:, None] ** 2 + k[FREQUENCIES:] ** 2
    amplitude = torch.fft.fft2((x_NSS - x_NSS.mean((1, 2), keepdim=True)) * _window(SIDE)).abs()
    low = amplitude[:, k][:, :, k[FREQUENCIES:]][:, (radius > 0) & (radius <= FREQUENCIES**2)]
    return F.normalize(low**0.25)


def _candidates(x_NSS: torch.Tensor, new_from: int, progress: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs int64 [P,2], each once, and the variants [P,2,2] that take their second picture to the first one."""
    variants, total = _variants(), len(x_NSS)
    plain_ND = torch.cat([_spectra(part.float()) for part in x_NSS.split(4096)])
    mean, std = plain_ND.mean(0), plain_ND.std(0) + 1e-4
    plain_ND = F.normalize((plain_ND - mean) / std)
    codes, kinds = [], []
    rows = max(1, min(256, 2**26 // total))  # 256 MB of similarities at once
    with bar(total - new_from, "duplicates: candidates", shown=progress) as done:
        for i in torch.arange(new_from, total).split(rows):
            x = x_NSS[i, None].float()
            turned = [_warp(x, F.pad(m, (0, 1)).expand(len(i), 2, 3))[:, 0] for m in variants]
            queries_BVD = torch.stack([F.normalize((_spectra(t) - mean) / std) for t in turned], 1)
            near_BN = queries_BVD[:, 0] @ plain_ND.T
            for v in range(1, len(variants)):
                torch.maximum(near_BN, queries_BVD[:, v] @ plain_ND.T, out=near_BN)
            near_BN[torch.arange(len(i)), i] = -torch.inf
            j = near_BN.topk(min(NEAREST, total - 1)).indices
            codes.append((i[:, None] * total + j).flatten())
            kinds.append((queries_BVD @ plain_ND[j].mT).argmax(1).flatten().to(torch.uint8))
            done.update(len(i))
    i, j = (code := torch.cat(codes)) // total, code % total
    _, first = np.unique((torch.minimum(i, j) * total + torch.maximum(i, j)).numpy(), return_index=True)
    first = torch.from_numpy(first)
    return torch.stack([i, j], 1)[first], variants[torch.cat(kinds)[first].long()]


def _blur(side: int, sigma: float) -> torch.Tensor:
    """[S,S]: Gaussian blur along one axis as a matrix, renormalised at the border."""
    at = torch.arange(side, dtype=torch.float32)
    return F.normalize(torch.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2), p=1)


def _detail(x_PSS: torch.Tensor, fine: float, wide: float, local: float = 4) -> torch.Tensor:
    """What is between two blurs (σ in pixels), in units of its local contrast: dark and pale pictures come out alike."""
    f, w, n = (_blur(x_PSS.shape[-1], sigma) for sigma in (fine, wide, local))
    band = f @ x_PSS @ f.T - w @ x_PSS @ w.T
    return band / ((n @ band.square() @ n.T).sqrt() + 3)  # 3 grey levels: noise and flat skin stay small


def _shift(a_PSS: torch.Tensor, b_PSS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Height [P] and place [P,2] (x, y in [-1, 1]) of the highest correlation."""
    side = a_PSS.shape[-1]
    reach = int(REACH * side)
    size, near = (side + reach,) * 2, torch.arange(-reach, reach + 1)
    window = _window(side)
    product = torch.fft.rfft2(a_PSS * window, s=size).conj() * torch.fft.rfft2(b_PSS * window, s=size)
    height, place = torch.fft.irfft2(product, s=size)[:, near][:, :, near].flatten(1).max(1)
    return height, (torch.stack([place % len(near), place // len(near)], 1) - reach) * 2 / side


def _align(a_PSS: torch.Tensor, b_PSS: torch.Tensor, maps_P23: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps after so many Gauss-Newton steps, and the correlation [P] before the last of them."""
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
    # What leaves the picture, or takes a long blob to a round one, finds likeness anywhere.
    large, small = torch.linalg.svdvals(maps_P23[:, :, :2]).unbind(1)
    sane = (weight.sum((1, 2)) > OVERLAP * window.square().sum()) & (large < SQUEEZE * small)
    sane &= (large < STRETCH) & (small > 1 / STRETCH)
    return maps_P23, torch.where(sane, score, -1.0)


def _start(a_PSS: torch.Tensor, b_PSS: torch.Tensor, variants_P22: torch.Tensor) -> torch.Tensor:
    """Maps [P,2,3]: the variant or its half turn, whichever correlates better, and its shift."""
    tries = []
    for linear in (variants_P22, -variants_P22):
        height, place = _shift(_warp(a_PSS[:, None], F.pad(linear, (0, 1)))[:, 0], b_PSS)
        tries.append((height, torch.cat([linear, -linear @ place[..., None]], 2)))
    (upright, upright_maps), (turned, turned_maps) = tries
    return torch.where((turned > upright)[:, None, None], turned_maps, upright_maps)


def _scores(a_PSS: torch.Tensor, b_PSS: torch.Tensor, variants_P22: torch.Tensor) -> torch.Tensor:
    """[P] correlation of fine detail once aligned; 0 for pairs that coarser detail rules out."""
    scores, left, maps = torch.zeros(len(a_PSS)), torch.arange(len(a_PSS)), None
    for shrink, fine, wide, steps, enough in LEVELS:
        a, b = (_detail(F.avg_pool2d(x[left], shrink), fine, wide) for x in (a_PSS, b_PSS))
        maps, score = _align(a, b, _start(a, b, variants_P22) if maps is None else maps, steps)
        maps, score, left = (x[score > enough] for x in (maps, score, left))
        if not len(left):
            break
    scores[left] = score
    return scores
