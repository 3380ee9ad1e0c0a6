"""Figures of discrete codes: codebook use, and the bigram that every prior must beat."""

from collections.abc import Iterable

import numpy as np
import torch


def usage_and_perplexity(counts_K: torch.Tensor) -> tuple[float, float]:
    """Share of entries used at all, and exp(entropy) of their use."""
    p = counts_K.double() / counts_K.sum()
    return float((counts_K > 0).double().mean()), float(torch.exp(-(p * torch.log(p.clamp(min=1e-12))).sum()))


def bigram_bits(train: Iterable[np.ndarray], held_out: Iterable[np.ndarray], entries: int) -> float:
    """Bits per token of p(code | left neighbour) on held-out codes, fitted on training codes; each in parts [N, H, W].

    The first column's neighbour is a mark of its own. Smoothed towards the code's own frequency; the strength is chosen
    on the held-out codes themselves, which favours the bigram: a prior has to beat it at its best.
    """
    pairs, asked = (sum(pair_counts(part, entries) for part in parts) for parts in (train, held_out))
    frequency = (pairs.sum(0) + 0.5) / (pairs.sum() + 0.5 * entries)
    totals = pairs.sum(1, keepdims=True)
    return min(
        float(-(asked * np.log2((pairs + a * frequency) / (totals + a))).sum() / asked.sum())
        for a in (1, 3, 10, 30, 100, 300, 1000, 3000)
    )


def pair_counts(codes_NHW: np.ndarray, entries: int) -> np.ndarray:
    """How often each code [K] follows each left neighbour [K + 1, the last for none]."""
    codes = codes_NHW.astype(np.int64)
    left = np.concatenate([np.full_like(codes[..., :1], entries), codes[..., :-1]], -1)
    return np.bincount((left * entries + codes).ravel(), minlength=(entries + 1) * entries).reshape(-1, entries)
