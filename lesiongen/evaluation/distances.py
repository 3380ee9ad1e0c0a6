"""Distances between two sets of images, computed from their features.

- KID: squared maximum mean discrepancy with the cubic kernel (x·y / D + 1)³ (Binkowski et al. 2018, arXiv:1801.01401) × 1,000:
  the mean of 50 draws of 200 images of each set. It is unbiased: 0 is expected for two sets of one distribution.
- Fréchet distance of Gaussians fitted to both sets (Heusel et al. 2017, arXiv:1706.08500). It is biased upwards for few images,
  so compare it only between sets of equal size.
- Precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991), density and coverage (Naeem et al. 2020, arXiv:2002.09797),
  from balls around each image that reach to its 5th neighbour in its own set.

`compare` returns all of them with 95 % intervals: for KID and the Fréchet distance from a jackknife that leaves out
blocks of lesions, for the other figures from a bootstrap over lesions, in which the balls stay as they are.

Shapes: N images of the first set (generated), M of the second (real), D features.
"""

from collections.abc import Callable

import numpy as np
import torch

from lesiongen.evaluation.intervals import Figure, figure, mean

NEIGHBOURS = 5
DRAWS, DRAWN = 50, 200  # of the KID: draws, and images of each set in a draw
BLOCKS = 12  # of the jackknife
FEWEST = 20  # images of each set, below which nothing is measured


def compare(
    generated_ND: np.ndarray,
    real_MD: np.ndarray,
    generated_groups_N: np.ndarray,
    real_groups_M: np.ndarray,
    seed: int = 0,
) -> dict[str, Figure | int]:
    """Measures how far a set of images is from another one.

    Args:
        generated_ND: Features of the set that is judged.
        real_MD: Features of the set that it is compared with.
        generated_groups_N: The lesion of each image of the first set.
        real_groups_M: The lesion of each image of the second set.
        seed: Seed of the draws.

    Returns:
        Figures "kid" (times 1,000), "frechet", "precision", "recall", "density", "coverage", and "number", the images of the
        smaller set. Sets below FEWEST images give figures without a value.
    """
    number = min(len(generated_ND), len(real_MD))
    if number < FEWEST:
        names = ("kid", "frechet", "precision", "recall", "density", "coverage")
        return {name: figure(float("nan")) for name in names} | {"number": number}
    x, y = (torch.from_numpy(np.ascontiguousarray(v)).double() for v in (generated_ND, real_MD))
    blocks = [_blocks(groups, seed + i) for i, groups in enumerate((generated_groups_N, real_groups_M))]
    found = {"kid": _kid_figure(x, y, blocks, seed), "frechet": _frechet_figure(x, y, blocks)}
    return found | _neighbour_figures(x, y, generated_groups_N, real_groups_M, seed) | {"number": number}


def _blocks(groups_N: np.ndarray, seed: int) -> torch.Tensor:
    """Divides the lesions among BLOCKS blocks of about equal size. Returns the block of each image, [N]."""
    names, member_N = np.unique(groups_N, return_inverse=True)
    return torch.from_numpy(np.random.default_rng(seed).permutation(len(names))[member_N] % BLOCKS)


def _jackknife(measure: Callable[[torch.Tensor, torch.Tensor], float], value: float, blocks: list[torch.Tensor]) -> Figure:
    """Returns a figure whose interval comes from leaving out each block of both sets in turn.

    Args:
        measure: Maps the indices of the images that are kept, of each set, to the value.
        value: The value of the figure.
        blocks: The block of each image, of each set.
    """
    kept = [[torch.nonzero(b != block).flatten() for b in blocks] for block in range(BLOCKS)]
    values = np.array([measure(*indices) for indices in kept])
    error = np.sqrt((BLOCKS - 1) / BLOCKS * ((values - values.mean()) ** 2).sum())
    return figure(value, value - 1.96 * error, value + 1.96 * error)


def kid(x_ND: torch.Tensor, y_MD: torch.Tensor, seed: int = 0) -> float:
    """Computes the kernel inception distance times 1,000, as the mean over DRAWS draws of DRAWN images.

    Args:
        x_ND: Features of one set.
        y_MD: Features of the other set.
        seed: Seed of the draws.
    """
    rng = torch.Generator().manual_seed(seed)
    size = min(DRAWN, len(x_ND), len(y_MD))
    total = 0.0
    for _ in range(DRAWS):
        x = x_ND[torch.randperm(len(x_ND), generator=rng)[:size]]
        y = y_MD[torch.randperm(len(y_MD), generator=rng)[:size]]
        total += _mmd(_kernel(x, x), _kernel(y, y), _kernel(x, y))
    return 1000 * total / DRAWS


def _kernel(x_ND: torch.Tensor, y_MD: torch.Tensor) -> torch.Tensor:
    """Returns the cubic kernel of each pair, [N, M]."""
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3


def _mmd(xx_NN: torch.Tensor, yy_MM: torch.Tensor, xy_NM: torch.Tensor) -> float:
    """Returns the unbiased squared maximum mean discrepancy from the kernels of all pairs."""
    n, m = xy_NM.shape
    within = (xx_NN.sum() - xx_NN.trace()) / (n * (n - 1)) + (yy_MM.sum() - yy_MM.trace()) / (m * (m - 1))
    return float(within - 2 * xy_NM.mean())


def _kid_figure(x_ND: torch.Tensor, y_MD: torch.Tensor, blocks: list[torch.Tensor], seed: int) -> Figure:
    xx, yy, xy = _kernel(x_ND, x_ND), _kernel(y_MD, y_MD), _kernel(x_ND, y_MD)

    def without(i: torch.Tensor, j: torch.Tensor) -> float:
        return 1000 * _mmd(xx[i][:, i], yy[j][:, j], xy[i][:, j])

    return _jackknife(without, kid(x_ND, y_MD, seed), blocks)


def frechet(x_ND: torch.Tensor, y_MD: torch.Tensor) -> float:
    """Computes the Fréchet distance of the Gaussians that have the sets' means and covariances.

    The trace of the square root of the product of two covariances is the sum of the singular values of X·Yᵀ, where X and Y are
    the centred features divided by the square roots of N - 1 and M - 1. With fewer images than features this is much faster.

    Args:
        x_ND: Features of one set.
        y_MD: Features of the other set.
    """
    means = x_ND.mean(0) - y_MD.mean(0)
    x, y = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x_ND, y_MD))
    cross = x @ y.T if max(len(x), len(y)) < x.shape[1] else _root(x) @ _root(y).T
    # The singular values are the roots of the eigenvalues of the square, which are found several times faster.
    singular_values = (
        torch.linalg.eigvalsh(cross.T @ cross if len(cross.T) < len(cross) else cross @ cross.T).clamp(min=0).sqrt()
    )
    return float(means.square().sum() + x.square().sum() + y.square().sum() - 2 * singular_values.sum())


def _root(x_ND: torch.Tensor) -> torch.Tensor:
    """Returns a matrix [D, D] whose product with its own transpose, Rᵀ·R, is Xᵀ·X."""
    values, vectors = torch.linalg.eigh(x_ND.T @ x_ND)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _frechet_figure(x_ND: torch.Tensor, y_MD: torch.Tensor, blocks: list[torch.Tensor]) -> Figure:
    return _jackknife(lambda i, j: frechet(x_ND[i], y_MD[j]), frechet(x_ND, y_MD), blocks)


def neighbour_scores(x_ND: torch.Tensor, y_MD: torch.Tensor) -> dict[str, torch.Tensor]:
    """Computes what precision, recall, density and coverage are the means of.

    Args:
        x_ND: Features of the generated images.
        y_MD: Features of the real images.

    Returns:
        "precision" and "density" of each generated image [N], "recall" and "coverage" of each real image [M].
    """
    k = min(NEIGHBOURS, len(x_ND) - 1, len(y_MD) - 1)
    radius_x, radius_y = (_radii(v, k) for v in (x_ND, y_MD))
    distance_NM = torch.cdist(x_ND, y_MD)
    in_real_ball_NM = distance_NM <= radius_y
    return {
        "precision": in_real_ball_NM.any(1).double(),
        "recall": (distance_NM <= radius_x[:, None]).any(0).double(),
        "density": in_real_ball_NM.double().sum(1) / k,
        "coverage": in_real_ball_NM.any(0).double(),
    }


def _radii(x_ND: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the distance of each image to its k-th neighbour among the different images of its set, [N].

    Images of rare classes occur several times in a set that is drawn to a mix of classes. Such repetitions are no neighbours.
    """
    different, member_N = torch.unique(x_ND, dim=0, return_inverse=True)
    # The nearest neighbour of an image in its own set is the image itself.
    return torch.cdist(different, different).kthvalue(min(k + 1, len(different))).values[member_N]


def _neighbour_figures(
    x_ND: torch.Tensor, y_MD: torch.Tensor, groups_N: np.ndarray, groups_M: np.ndarray, seed: int
) -> dict[str, Figure]:
    found = {}
    for name, scores in neighbour_scores(x_ND, y_MD).items():
        groups = groups_N if name in ("precision", "density") else groups_M
        found[name] = mean(scores.numpy(), groups, seed)
    return found
