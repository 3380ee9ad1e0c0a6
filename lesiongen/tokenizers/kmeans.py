"""The nearest of K centres, and centres by k-means. Shapes: N vectors, D their dimension, K centres."""

import torch

CHUNK = {"cpu": 2**20, "cuda": 2**26}  # distances held at once: what a CPU caches; few launches on a GPU
LLOYD, SAMPLE = 10, 64  # k-means: iterations, and vectors per entry, past which centres hardly move


def nearest(z_ND: torch.Tensor, book_KD: torch.Tensor) -> torch.Tensor:
    """Index [N] of the nearest entry for each row, without the one-hot N×K form and with few distances at a time."""
    norms_K = book_KD.square().sum(1)
    parts = z_ND.split(max(1, CHUNK["cpu" if z_ND.device.type == "cpu" else "cuda"] // len(book_KD)))
    return torch.cat([torch.addmm(norms_K, part, book_KD.T, alpha=-2).argmin(1) for part in parts])


@torch.no_grad()
def kmeans(z_ND: torch.Tensor, entries: int) -> torch.Tensor:
    """Centres [K, D]: seeds far apart (Arthur and Vassilvitskii 2007, k-means++), then Lloyd's iterations, in which the
    farthest vectors take the place of centres that won none. The same for the same vectors. Raises ValueError for fewer
    vectors than entries."""
    if len(z_ND) < entries:
        raise ValueError(f"k-means of {entries} entries needs as many vectors, not {len(z_ND)}: give it more images")
    generator = torch.Generator().manual_seed(entries)
    z_ND = z_ND[torch.randperm(len(z_ND), generator=generator)[: SAMPLE * entries].to(z_ND.device)]
    norms_N, distance_N = z_ND.square().sum(1), torch.full_like(z_ND[:, 0], 1.0)
    book_KD = z_ND[:entries].clone()
    for entry, u in enumerate(torch.rand(entries, generator=generator).tolist()):
        sums_N = distance_N.double().cumsum(0)
        chosen = torch.searchsorted(sums_N, u * sums_N[-1:]).clamp(max=len(z_ND) - 1)
        book_KD[entry] = z_ND[chosen]
        fresh_N = (norms_N - 2 * (z_ND @ book_KD[entry]) + norms_N[chosen]).clamp(min=0)
        distance_N = fresh_N if entry == 0 else torch.minimum(distance_N, fresh_N)
    for _ in range(LLOYD):
        codes_N = nearest(z_ND, book_KD)
        counts_K = torch.bincount(codes_N, minlength=entries)
        distance_N = (z_ND - book_KD[codes_N]).square().sum(1)
        book_KD = torch.zeros_like(book_KD).index_add_(0, codes_N, z_ND) / counts_K.clamp(min=1)[:, None]
        empty_K = counts_K == 0
        book_KD[empty_K] = z_ND[distance_N.topk(int(empty_K.sum())).indices]
    return book_KD
