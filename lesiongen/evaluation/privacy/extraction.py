"""Extraction: does a prior complete training images better than test images?

The prior is given the true facts and the first half of an image's codes in raster order, and completes the rest greedily, with
the likeliest code each time. A prior that has memorised an image completes it from its beginning (Carlini et al. 2021,
arXiv:2012.07805, for text; Kowalczuk et al. 2025, arXiv:2502.02514, for autoregressive image models). Test images show how much
of an image can be guessed by one who has not seen it.

The evaluate stage calls extraction() on rank 0. Shapes: B batch, N images, T tokens, P tokens of the prompt.
"""

import numpy as np
import torch

from hpc.data.codestore import CodeStore
from hpc.run.progress import progress_bar
from lesiongen.evaluation.intervals import from_rounds
from lesiongen.evaluation.privacy.audit_rows import AuditRows, batches
from lesiongen.evaluation.privacy.separation import separation, side_weights
from lesiongen.priors.prior import Prior
from lesiongen.priors.sampling import TokenChooser

EXACT = 0.9  # share of right codes from which an image counts as extracted


def extraction(
    store: CodeStore,
    prior: Prior,
    rows: AuditRows,
    device: torch.device,
    level: str | None = None,
    seed: int = 0,
) -> dict:
    """Measures how much better a prior completes training images than test images.

    Args:
        store: The code store that the prior was trained on.
        prior: The prior of the level, in evaluation mode.
        rows: The images, from choose_rows().
        device: The device on which the prior computes.
        level: The prior's level; None means the coarsest. On finer levels the true coarser codes are given too.
        seed: Seed of the bootstrap.

    Returns:
        "prompt" and "completed" (codes given and asked), "level", "members" and "non_members" (numbers of images); "accuracy":
        the mean share of right codes of each side, as figures; "gain", their difference; "auc" of the share as a score of
        membership; and "exact", the number of images of each side of which at least 90 % of the codes are right.
        {"reason": a sentence} if nothing can be measured.
    """
    if rows.reason:
        return {"reason": rows.reason}
    level = level or store.levels[0]["name"]
    members, given = len(rows.members), prior.length // 2
    shares = []
    with progress_bar(members + len(rows.non_members), "extraction") as progress:
        for batch in batches(store, level, prior, rows, device):
            shares.append(_right_share(prior, batch, given))
            progress.update(len(shares[-1]))
    share_N = np.concatenate(shares)
    member, non_member = share_N[:members], share_N[members:]
    weights = side_weights(members, len(non_member), seed)
    of_members, of_others = (w @ share / w.sum(1) for w, share in zip(weights, (member, non_member), strict=True))
    return {
        "prompt": given,
        "completed": prior.length - given,
        "level": level,
        "members": members,
        "non_members": len(non_member),
        "accuracy": {
            "members": from_rounds(of_members[0], of_members[1:]),
            "non_members": from_rounds(of_others[0], of_others[1:]),
        },
        "gain": from_rounds(of_members[0] - of_others[0], of_members[1:] - of_others[1:]),
        "auc": separation(member, non_member, seed)["auc"],
        "exact": {"members": int((member >= EXACT).sum()), "non_members": int((non_member >= EXACT).sum())},
    }


def _right_share(prior: Prior, batch: dict, given: int) -> np.ndarray:
    """Completes codes greedily from their first `given` tokens. Returns the share of right codes among the others, [B]."""
    codes_BT = batch["codes"].flatten(1)
    # With top_k=1 the random numbers decide nothing.
    zeros_BT = torch.zeros(codes_BT.shape, device=codes_BT.device)
    greedy = TokenChooser(top_k=1)
    found_BT = prior.sample(batch["facts"], batch["upper"], zeros_BT, greedy, prompt_BP=codes_BT[:, :given]).flatten(1)
    return (found_BT == codes_BT)[:, given:].double().mean(1).cpu().numpy()
