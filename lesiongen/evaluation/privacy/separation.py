"""How well a score tells members from non-members: the area under the ROC curve, and the hits at few false alarms.

A membership attack that is right about a few images with certainty is a leak, even if it guesses about all others. The area
hides this, so the true positive rate at a false positive rate of 1 % stands beside it (Carlini et al. 2022, arXiv:2112.03570).

Shapes: M members, N non-members, R resamples.
"""

import math

import numpy as np

from lesiongen.evaluation.intervals import ROUNDS, Figure, figure, from_rounds, resampled_weights

FEWEST = 100  # non-members below which a single false alarm is more than 1 %


def separation(member_M: np.ndarray, non_member_N: np.ndarray, seed: int = 0, rounds: int = ROUNDS) -> dict[str, Figure]:
    """Measures how well a score separates members from non-members. A blind score has an area of 0.5 and a rate of 0.01.

    Args:
        member_M: Scores of the members; higher means "member". Each is of a lesion of its own.
        non_member_N: Scores of the non-members, likewise.
        seed: Seed of the bootstrap, which resamples the lesions of each side.
        rounds: Number of resamples.

    Returns:
        "auc", the area under the ROC curve, where ties count half; and "tpr_at_1_fpr", the largest share of members above a
        threshold that at most 1 % of the non-members exceed. The latter is None with fewer than 100 non-members.
    """
    weights_RM, weights_RN = side_weights(len(member_M), len(non_member_N), seed, rounds)
    scores = np.concatenate([member_M, non_member_N])
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))

    def counts_above(weights: np.ndarray) -> np.ndarray:
        """Returns how many images of a side have at least each distinct score, from high to low, with 0 in front."""
        return np.pad(weights[:, order].cumsum(1)[:, last_of_ties], ((0, 0), (1, 0)))

    hits = counts_above(np.pad(weights_RM, ((0, 0), (0, len(non_member_N)))))
    alarms = counts_above(np.pad(weights_RN, ((0, 0), (len(member_M), 0))))
    area = (np.diff(alarms) * (hits[:, 1:] + hits[:, :-1])).sum(1) / (2 * hits[:, -1] * alarms[:, -1])
    rate = np.where(100 * alarms <= alarms[:, -1:], hits, 0).max(1) / hits[:, -1]
    enough = len(non_member_N) >= FEWEST
    return {
        "auc": from_rounds(area[0], area[1:]),
        "tpr_at_1_fpr": from_rounds(rate[0], rate[1:]) if enough else figure(math.nan),
    }


def side_weights(members: int, non_members: int, seed: int = 0, rounds: int = ROUNDS) -> tuple[np.ndarray, np.ndarray]:
    """Draws how often each image counts: once each in row 0, then the resamples of a bootstrap of each side on its own.

    Args:
        members: Number of members, M.
        non_members: Number of non-members, N.
        seed: Seed of the draws.
        rounds: Number of resamples.

    Returns:
        int64 [1 + rounds, M] and [1 + rounds, N].
    """
    sides = ((members, 2 * seed), (non_members, 2 * seed + 1))
    first, second = (
        np.concatenate([np.ones((1, number), np.int64), resampled_weights(np.arange(number), rounds, side_seed)])
        for number, side_seed in sides
    )
    return first, second
