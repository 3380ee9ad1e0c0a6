"""Nearest entry of a codebook, and k-means. Shapes: N vectors, D their dimension, K entries of the codebook.

The quantizers call nearest() at each forward pass, and kmeans() once, to initialise a codebook before training.
"""

import torch

# Distances in memory at once. On a CPU a chunk of them fits the cache; on a GPU large chunks keep the kernel launches few.
MAX_DISTANCES = {"cpu": 2**20, "cuda": 2**26}
# More iterations or more vectors per entry hardly move the centres.
LLOYD_ITERATIONS, VECTORS_PER_ENTRY = 10, 64


def nearest(z_ND: torch.Tensor, book_KD: torch.Tensor) -> torch.Tensor:
    """Finds the nearest entry for each vector, by Euclidean distance, without a one-hot N×K matrix.

    Args:
        z_ND: Vectors, [N, D].
        book_KD: Codebook, [K, D].

    Returns:
        Index of the nearest entry for each vector, [N].
    """
    norms_K = book_KD.square().sum(1)
    chunks = z_ND.split(max(1, MAX_DISTANCES["cpu" if z_ND.device.type == "cpu" else "cuda"] // len(book_KD)))
    # |z - e|² without |z|², which is the same for all entries e.
    return torch.cat([torch.addmm(norms_K, chunk, book_KD.T, alpha=-2).argmin(1) for chunk in chunks])


@torch.no_grad()
def kmeans(z_ND: torch.Tensor, entries: int) -> torch.Tensor:
    """Computes k-means centres: k-means++ seeds (Arthur and Vassilvitskii 2007), then Lloyd's iterations.

    A centre that is nearest to no vector moves to one of the vectors that are farthest from their centres. The result depends
    on the vectors alone: the random numbers have a fixed seed.

    Args:
        z_ND: Vectors, [N, D].
        entries: Number of centres, K.

    Returns:
        Centres, [K, D].

    Raises:
        ValueError: There are fewer vectors than entries.
    """
    if len(z_ND) < entries:
        raise ValueError(
            f"k-means of {entries} entries needs at least as many vectors, not {len(z_ND)}: use more images or fewer entries"
        )
    generator = torch.Generator().manual_seed(entries)
    z_ND = z_ND[torch.randperm(len(z_ND), generator=generator)[: VECTORS_PER_ENTRY * entries].to(z_ND.device)]
    # k-means++: draw each seed with a probability proportional to the squared distance from the nearest earlier seed.
    norms_N, distance_N = z_ND.square().sum(1), torch.full_like(z_ND[:, 0], 1.0)
    book_KD = z_ND[:entries].clone()
    for entry, u in enumerate(torch.rand(entries, generator=generator).tolist()):
        cumulative_N = distance_N.double().cumsum(0)
        seed = torch.searchsorted(cumulative_N, u * cumulative_N[-1:]).clamp(max=len(z_ND) - 1)
        book_KD[entry] = z_ND[seed]
        to_seed_N = (norms_N - 2 * (z_ND @ book_KD[entry]) + norms_N[seed]).clamp(min=0)
        distance_N = to_seed_N if entry == 0 else torch.minimum(distance_N, to_seed_N)
    # Lloyd: assign each vector to its nearest centre, then move each centre to the mean of its vectors.
    for _ in range(LLOYD_ITERATIONS):
        codes_N = nearest(z_ND, book_KD)
        counts_K = torch.bincount(codes_N, minlength=entries)
        distance_N = (z_ND - book_KD[codes_N]).square().sum(1)
        book_KD = torch.zeros_like(book_KD).index_add_(0, codes_N, z_ND) / counts_K.clamp(min=1)[:, None]
        empty_K = counts_K == 0
        book_KD[empty_K] = z_ND[distance_N.topk(int(empty_K.sum())).indices]
    return book_KD
