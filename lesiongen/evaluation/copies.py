"""How many samples are copies: distance to the nearest training picture at 32 × 32 px, in any of its 8 orientations.

What is near is measured by real pictures: those held out are no copies, so whoever lies nearer to the training set than
99 % of them do counts as one. Held-out pictures themselves have a rate of 1 % by this definition; that is the floor.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SIDE = 32
PERCENTILE = 0.01
INVISIBLE = 1 / 255  # one grey level: nearer than that is a copy whatever the held-out pictures say


@dataclass(frozen=True)
class Nearest:
    """Of each query: distance float [N] (root mean square over pixels in [0, 1]), index int64 [N] of the nearest
    training picture, and form int64 [N]: the orientation (see turn) in which that picture is nearest."""

    distance: torch.Tensor
    index: torch.Tensor
    form: torch.Tensor


def apply_symmetry(x_NCHW: torch.Tensor, form: int) -> torch.Tensor:
    """One of the 8 symmetries of the square."""
    turned = torch.rot90(x_NCHW, form % 4, (-2, -1))
    return turned.flip(-1) if form >= 4 else turned


def small(images_NCHW: torch.Tensor) -> torch.Tensor:
    """uint8 of any size → float [N, C, 32, 32] in [0, 1], area means: commutes with turning."""
    return F.interpolate(images_NCHW.float() / 255, (SIDE, SIDE), mode="area")


@torch.no_grad()
def nearest(
    queries_NCHW: torch.Tensor,
    train_NCHW: torch.Tensor,
    progress=None,
    device: torch.device | str = "cpu",
    chunk: int = 512,
) -> Nearest:
    """Nearest training picture of each query, both uint8 [·, C, H, W], by matrix products over chunks of the latter:
    beside the queries, memory holds 8 · chunk of them. progress: a bar with update(), told training pictures."""
    queries = small(queries_NCHW).flatten(1)
    best = torch.full((len(queries),), math.inf, device=device)
    where = torch.zeros(len(queries), dtype=torch.int64, device=device)
    parts = [(slice(i, i + 4096), queries[i : i + 4096].to(device)) for i in range(0, len(queries), 4096)]
    for first in range(0, len(train_NCHW), chunk):
        part = small(train_NCHW[first : first + chunk].to(device))
        candidates = torch.stack([apply_symmetry(part, form).flatten(1) for form in range(8)], 1).flatten(0, 1)
        norms = candidates.square().sum(1)
        for rows, query in parts:
            # |q - t|² less |q|², which is the same for all t
            least, place = torch.addmm(norms, query, candidates.T, alpha=-2).min(1)
            nearer = least < best[rows]
            best[rows] = torch.where(nearer, least, best[rows])
            where[rows] = torch.where(nearer, place + first * 8, where[rows])
        if progress is not None:
            progress.update(len(part))
    where = where.cpu()
    index, form = where // 8, where % 8
    # Taken again as a plain difference: the sum above loses the digits that tell a copy from a near miss.
    exact = [
        (q - apply_symmetry(small(train_NCHW[i : i + 1]), f).flatten()).square().mean().sqrt()
        for q, i, f in zip(queries, index.tolist(), form.tolist(), strict=True)
    ]
    return Nearest(torch.stack(exact) if exact else torch.empty(0), index, form)


def threshold(held_out_distance_N: torch.Tensor) -> float:
    """Below this distance lies a copy: 1st percentile of the held-out pictures, one grey level at least."""
    return max(float(held_out_distance_N.double().quantile(PERCENTILE)), INVISIBLE)


def copy_rate(distance_N: torch.Tensor, below: float) -> dict[str, float]:
    """{"copies", "number", "rate", "low", "high"}: share of samples nearer than `below`, with its 95 % interval."""
    copies, number = int((distance_N < below).sum()), len(distance_N)
    low, high = wilson(copies, number)
    return {"copies": copies, "number": number, "rate": copies / number, "low": low, "high": high}


def wilson(hits: int, number: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): honest for few hits and for none."""
    p = hits / number
    middle = (p + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * math.sqrt(p * (1 - p) / number + z**2 / (4 * number**2))
    return max(0.0, middle - half), min(1.0, middle + half)
