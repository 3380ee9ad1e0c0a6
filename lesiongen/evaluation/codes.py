"""Metrics of discrete codes: how much of a codebook is used, and the bits of a bigram, which every prior must beat.

Shapes: N images, H × W grid of codes, K codes.
"""

from collections.abc import Iterable

import numpy as np
import torch

STRENGTHS = (1, 3, 10, 30, 100, 300, 1000, 3000)  # of the bigram's smoothing, as a number of tokens


def usage_and_perplexity(counts_K: torch.Tensor) -> tuple[float, float]:
    """Measures the use of a codebook from the count of each code.

    Returns:
        The share of codes that occur, and the perplexity of the codes, which is K if all occur equally often.
    """
    p = counts_K.double() / counts_K.sum()
    return float((counts_K > 0).double().mean()), float(torch.exp(-(p * torch.log(p.clamp(min=1e-12))).sum()))


def bigram_bits(train: Iterable[np.ndarray], held_out: Iterable[np.ndarray], entries: int) -> float:
    """Measures the bits per token of p(code | left neighbour) on held-out codes, fitted on training codes.

    The first column has a neighbour symbol of its own. The distribution is smoothed towards the frequency of each code. The
    strength of smoothing is chosen on the held-out codes, which favours the bigram: a prior must beat the best bigram.

    Args:
        train: Training codes, in parts [N, H, W].
        held_out: Held-out codes, in parts [N, H, W].
        entries: Number of codes, K.

    Returns:
        Bits per token.
    """
    fitted, asked = (sum(pair_counts(part, entries) for part in parts) for parts in (train, held_out))
    frequency = code_frequencies(fitted)
    totals = fitted.sum(1, keepdims=True)
    return min(
        float(-(asked * np.log2((fitted + strength * frequency) / (totals + strength))).sum() / asked.sum())
        for strength in STRENGTHS
    )


def pair_counts(codes_NHW: np.ndarray, entries: int) -> np.ndarray:
    """Counts how often each code follows each left neighbour, [K + 1, K]. The last row is for codes without a neighbour."""
    codes = codes_NHW.astype(np.int64)
    left = left_neighbours(codes, entries)
    return np.bincount((left * entries + codes).ravel(), minlength=(entries + 1) * entries).reshape(-1, entries)


def left_neighbours(codes_NHW: np.ndarray, entries: int) -> np.ndarray:
    """Returns the left neighbour of each code, [N, H, W]; `entries` stands for no neighbour."""
    return np.concatenate([np.full_like(codes_NHW[..., :1], entries), codes_NHW[..., :-1]], -1)


def code_frequencies(counts_KK: np.ndarray) -> np.ndarray:
    """Returns the frequency of each code, [K], from pair_counts(). A code that never occurs counts as half a code."""
    return (counts_KK.sum(0) + 0.5) / (counts_KK.sum() + 0.5 * counts_KK.shape[1])
