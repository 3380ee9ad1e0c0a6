"""Counts the samples that are copies of training images. The evaluate stage calls these functions.

The distance of two images is their root mean square difference at 32 × 32 px, the smallest over the 8 symmetries of the square.
A sample is a copy if its distance to the nearest training image is smaller than that of 99 % of the held-out images. So about
1 % of the held-out images count as copies by definition, and a copy rate of 1 % is no evidence of copying.

Shapes: N images, C channels, H × W pixels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lesiongen.data.augment import dihedral

SIDE = 32
PERCENTILE = 0.01  # quantile of the held-out distances that is the threshold
INVISIBLE = 1 / 255  # one grey level: a sample nearer than this is a copy, whatever the held-out distances are
QUERIES = 4096  # queries that are compared at once


@dataclass(frozen=True)
class Nearest:
    """The nearest training image of each query.

    Attributes:
        distance: Distance to the training image, float [N], for pixels in [0, 1].
        index: Index of the training image, int64 [N].
        form: Symmetry (see augment.dihedral) that brings the training image nearest to the query, int64 [N].
    """

    distance: torch.Tensor
    index: torch.Tensor
    form: torch.Tensor


def small(images_NCHW: torch.Tensor) -> torch.Tensor:
    """Shrinks uint8 images of any size to float [N, C, 32, 32] in [0, 1].

    Each pixel is the mean of an area, so rotating before or after this function gives the same result.
    """
    return F.interpolate(images_NCHW.float() / 255, (SIDE, SIDE), mode="area")


@torch.no_grad()
def nearest(
    queries_NCHW: torch.Tensor,
    train_NCHW: torch.Tensor,
    progress: tqdm | None = None,
    device: torch.device | str = "cpu",
    chunk: int = 512,
) -> Nearest:
    """Finds the nearest training image of each query, by matrix products over chunks of the training images.

    Args:
        queries_NCHW: The queries, uint8.
        train_NCHW: The training images, uint8.
        progress: A bar that counts training images.
        device: Device of the matrix products.
        chunk: Training images that are compared at once. Memory holds all 8 symmetries of each.

    Returns:
        The result, on the CPU.
    """
    queries = small(queries_NCHW).flatten(1)
    best = torch.full((len(queries),), math.inf, device=device)
    best_candidate = torch.zeros(len(queries), dtype=torch.int64, device=device)
    parts = [(slice(i, i + QUERIES), queries[i : i + QUERIES].to(device)) for i in range(0, len(queries), QUERIES)]
    for first in range(0, len(train_NCHW), chunk):
        part = small(train_NCHW[first : first + chunk].to(device))
        candidates = torch.stack([dihedral(part, form).flatten(1) for form in range(8)], 1).flatten(0, 1)
        norms = candidates.square().sum(1)
        for rows, query in parts:
            # |query - candidate|² without |query|², which is the same for all candidates.
            least, candidate = torch.addmm(norms, query, candidates.T, alpha=-2).min(1)
            nearer = least < best[rows]
            best[rows] = torch.where(nearer, least, best[rows])
            best_candidate[rows] = torch.where(nearer, candidate + first * 8, best_candidate[rows])
        if progress is not None:
            progress.update(len(part))
    best_candidate = best_candidate.cpu()
    index, form = best_candidate // 8, best_candidate % 8
    # Compute the smallest distances again, as the root mean square of the difference. Rounding errors of the expanded square
    # above are too large to distinguish a copy from an image that is only similar.
    exact = [
        (q - dihedral(small(train_NCHW[i : i + 1]), f).flatten()).square().mean().sqrt()
        for q, i, f in zip(queries, index.tolist(), form.tolist(), strict=True)
    ]
    return Nearest(torch.stack(exact) if exact else torch.empty(0), index, form)


def threshold(held_out_distance_N: torch.Tensor) -> float:
    """Returns the distance below which an image is a copy: the 1st percentile of held-out distances, at least INVISIBLE."""
    return max(float(held_out_distance_N.double().quantile(PERCENTILE)), INVISIBLE)


def copy_rate(distance_N: torch.Tensor, below: float) -> dict[str, float]:
    """Counts the images whose distance is below a threshold.

    Args:
        distance_N: Distance of each image to its nearest training image.
        below: The threshold.

    Returns:
        "copies", "number", their "rate", and its 95 % interval, "low" and "high".
    """
    copies, number = int((distance_N < below).sum()), len(distance_N)
    low, high = wilson(copies, number)
    return {"copies": copies, "number": number, "rate": copies / number, "low": low, "high": high}


def wilson(hits: int, number: int, z: float = 1.959964) -> tuple[float, float]:
    """Returns the 95 % interval of a share (Wilson 1927), which also holds for few hits or none.

    Args:
        hits: Number of hits.
        number: Number of trials.
        z: Quantile of the normal distribution; the default gives 95 %.
    """
    p = hits / number
    middle = (p + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * math.sqrt(p * (1 - p) / number + z**2 / (4 * number**2))
    return max(0.0, middle - half), min(1.0, middle + half)
