"""Figures of discrete codes: codebook use, and the bigram that every prior must beat."""

import numpy as np
import torch


def usage_and_perplexity(counts_K: torch.Tensor) -> tuple[float, float]:
    """Share of entries used at all, and exp(entropy) of their use."""
    p = counts_K.double() / counts_K.sum()
    return float((counts_K > 0).double().mean()), float(torch.exp(-(p * torch.log(p.clamp(min=1e-12))).sum()))


def bigram_bits(train_NHW: np.ndarray, held_out_NHW: np.ndarray, entries: int) -> float:
    """Bits per token of p(code | left neighbour) on held-out codes, fitted on training codes.

    The first column's neighbour is a mark of its own. Smoothed towards the code's own frequency; the strength is chosen
    on the held-out codes themselves, which favours the bigram: a prior has to beat it at its best.
    """
    pairs = np.zeros((entries + 1, entries))
    left, right = _neighbours(train_NHW, entries)
    np.add.at(pairs, (left, right), 1)
    frequency = (pairs.sum(0) + 0.5) / (pairs.sum() + 0.5 * entries)
    left, right = _neighbours(held_out_NHW, entries)
    totals = pairs.sum(1)[left]
    seen, prior = pairs[left, right], frequency[right]
    return min(float(-np.log2((seen + a * prior) / (totals + a)).mean()) for a in (1, 3, 10, 30, 100, 300, 1000, 3000))


def _neighbours(codes_NHW: np.ndarray, entries: int) -> tuple[np.ndarray, np.ndarray]:
    codes = codes_NHW.astype(np.int64)
    left = np.concatenate([np.full_like(codes[..., :1], entries), codes[..., :-1]], -1)
    return left.reshape(-1), codes.reshape(-1)
