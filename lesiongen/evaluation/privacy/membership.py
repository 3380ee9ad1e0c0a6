"""Membership inference: do the priors' likelihoods tell training images from test images?

Attacks with exact likelihoods reach a true positive rate of 86 % at 1 % false positives on autoregressive image models
(Kowalczuk et al. 2025, arXiv:2502.02514). Each image gets three scores, on each level and summed over the levels:

- likelihood: log p(codes | facts, coarser codes);
- contrast: the same minus log p(codes | no facts, coarser codes), as in arXiv:2502.02514;
- reference: the same minus log p under a bigram, which knows how likely such codes are but not the image (Watson et al. 2022,
  arXiv:2111.08440). The bigram is fitted on the training codes of other lesions.

The evaluate stage calls membership() on rank 0. Shapes: N images, members first; T tokens; K entries of the codebook.
"""

from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

from hpc.data.codestore import CodeStore
from hpc.run.progress import progress_bar
from lesiongen.evaluation.codes import STRENGTHS, code_frequencies, left_neighbours, pair_counts
from lesiongen.evaluation.privacy.audit_rows import AuditRows, Groups, batches
from lesiongen.evaluation.privacy.separation import separation
from lesiongen.priors.prior import Prior


def membership(
    store: CodeStore,
    priors: dict[str, Prior],
    rows: AuditRows,
    groups: Groups,
    device: torch.device,
    seed: int = 0,
) -> dict:
    """Measures how well the priors' likelihoods tell training images from test images.

    Args:
        store: The code store that the priors were trained on.
        priors: The prior of each level, in evaluation mode.
        rows: The images, from choose_rows().
        groups: As RealImages.groups_by_shard() returns it.
        device: The device on which the priors compute.
        seed: Seed of the bootstrap.

    Returns:
        "members", "non_members" (numbers of images), "how" (a sentence), and "scores": {"likelihood top": {"auc": figure,
        "tpr_at_1_fpr": figure}, …}. A score without facts has no contrast. {"reason": a sentence} if nothing can be measured.
    """
    if rows.reason:
        return {"reason": rows.reason}
    members, number = len(rows.members), len(rows.members) + len(rows.non_members)
    scores: dict[str, dict[str, np.ndarray]] = {"likelihood": {}, "contrast": {}, "reference": {}}
    bigrams = {level: _bigram_log_likelihoods(store, level, rows, groups) for level in priors}
    passes = sum(2 if prior.facts else 1 for prior in priors.values())
    with progress_bar(number * passes, "membership") as progress:
        for level, prior in priors.items():
            likelihood = _log_likelihoods(store, level, prior, rows, device, progress)
            scores["likelihood"][level] = likelihood
            if prior.facts:
                without = _log_likelihoods(store, level, prior, rows, device, progress, with_facts=False)
                scores["contrast"][level] = likelihood - without
            scores["reference"][level] = likelihood - bigrams[level]
    named = {
        f"{kind} {level}": score
        for kind, by_level in scores.items()
        if by_level
        for level, score in (*by_level.items(), ("all", np.sum(list(by_level.values()), 0)))
    }
    return {
        "members": members,
        "non_members": number - members,
        "how": (
            f"{members:,} training images and {number - members:,} test images, one image of each lesion and as many of each "
            "class on both sides, all without augmentation; validation images are left out, because they chose the weights; "
            "the reference is a bigram of the codes of other training lesions."
        ),
        "scores": {name: separation(score[:members], score[members:], seed) for name, score in named.items()},
    }


@torch.no_grad()
def _log_likelihoods(
    store: CodeStore,
    level: str,
    prior: Prior,
    rows: AuditRows,
    device: torch.device,
    progress: tqdm,
    with_facts: bool = True,
) -> np.ndarray:
    """Returns the log-likelihood of each image's codes of a level in nats, float64 [N], with the image's facts or with none."""
    found = []
    for batch in batches(store, level, prior, rows, device):
        facts = batch["facts"] if with_facts else torch.full_like(batch["facts"], -1)
        nats_BT = prior.token_losses(batch["codes"], facts, batch["upper"])
        found.append(-nats_BT.double().sum(1).cpu().numpy())
        progress.update(len(facts))
    return np.concatenate(found)


def _bigram_log_likelihoods(store: CodeStore, level: str, rows: AuditRows, groups: Groups) -> np.ndarray:
    """Returns the log-likelihood of each image's codes of a level under a bigram in nats, float64 [N].

    The bigram is fitted on all draws of the training images, without the members' lesions: their other photographs and draws
    resemble the members.
    """
    column = f"codes.{level}"
    entries = next(entry["K"] for entry in store.levels if entry["name"] == level)
    counts = np.zeros((entries + 1, entries), np.int64)
    train, draws = store.shards("train"), store.draws("train")
    with progress_bar(draws * sum(entry["count"] for entry in train), f"bigram {level}") as progress:
        for draw in range(draws):
            for entry in train:
                others = ~np.isin(groups["train"][entry["shard"]], rows.groups)
                counts += pair_counts(store.arrays("train", draw, entry["shard"])[column][others], entries)
                progress.update(entry["count"])
    sides = (("train", rows.members), ("test", rows.non_members))
    codes_NHW = np.concatenate([store.gather_rows(split, part, [column], np.int64)[column] for split, part in sides])
    # The strength of smoothing is chosen on both sides together, so that it favours neither.
    return max(_smoothed(counts, codes_NHW), key=np.sum)


def _smoothed(counts_KK: np.ndarray, codes_NHW: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the log-likelihoods [N] of codes for each strength of smoothing, as bigram_bits() smooths a bigram.

    Args:
        counts_KK: How often each code follows each left neighbour, [K + 1, K].
        codes_NHW: The codes.
    """
    left_NHW = left_neighbours(codes_NHW, counts_KK.shape[1])
    seen, totals = counts_KK[left_NHW, codes_NHW], counts_KK.sum(1)[left_NHW]
    frequency_K = code_frequencies(counts_KK)
    for strength in STRENGTHS:
        yield np.log((seen + strength * frequency_K[codes_NHW]) / (totals + strength)).sum((1, 2))
