"""The images whose codes the audits of the priors compare: training images (members) and test images (non-members).

Invariant: apart from the training, both sides are alike. Every image is the only one of its lesion, both sides have as many
images of each class of each packed set, and all codes are of draw 0, which is unaugmented. Validation images are left out: they
chose the weights that were exported, so a prior may know them too. membership.py and extraction.py read the rows.

A row (draw, shard, ordinal) addresses an image in a split of the code store. A group is a lesion, or a patient where no lesion
is known, or else a single image; see lesiongen/data/packed.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hpc.data.codestore import CodeStore
from lesiongen.priors.prior import Prior

NUMBER = 1_000  # images of a side, at most
LEAST = 20  # images of a side below which nothing is measured
BATCH = 64

Groups = dict[str, list[np.ndarray]]  # for each split, the group of each image of each shard


@dataclass(frozen=True)
class AuditRows:
    """The rows of an audit.

    Attributes:
        members: Rows (draw, shard, ordinal) of the training split, int64 [M, 3].
        non_members: Rows of the test split, int64 [N, 3].
        groups: The groups of the members, int64 [M].
        reason: Why nothing can be measured, as a sentence; None where it can.
    """

    members: np.ndarray
    non_members: np.ndarray
    groups: np.ndarray
    reason: str | None = None


def choose_rows(store: CodeStore, groups: Groups, number: int = NUMBER, seed: int = 0) -> AuditRows:
    """Draws the rows of an audit.

    Draws one image of each test lesion and at most `number` of these. For each class of each packed set, it draws as many
    training lesions, one image of each. If the training split has fewer, it leaves out test lesions of this class.

    Args:
        store: The code store.
        groups: As RealImages.groups_by_shard() returns it.
        number: Images of a side, at most.
        seed: Seed of the draws.

    Returns:
        The rows. `reason` is set if there is no test split, or fewer than 20 lesions remain on a side.
    """
    none = np.empty((0, 3), np.int64)
    if "test" not in {entry["split"] for entry in store.manifest["shards"]}:
        return AuditRows(none, none, none[:, 0], "The shards have no test split, so no image is known to be new to the priors.")
    rng = np.random.default_rng(seed)
    tests, test_strata, _ = _one_per_group(store, "test", groups["test"], rng)
    tests, test_strata = tests[:number], test_strata[:number]
    trained, train_strata, train_groups = _one_per_group(store, "train", groups["train"], rng)
    members, non_members = [], []
    for stratum in np.unique(test_strata):
        of_train, of_test = np.flatnonzero(train_strata == stratum), np.flatnonzero(test_strata == stratum)
        count = min(len(of_train), len(of_test))
        members.append(of_train[:count])  # the order is random, so these are a random choice
        non_members.append(of_test[:count])
    member, non_member = np.concatenate(members), np.concatenate(non_members)
    if len(member) < LEAST:
        reason = f"Only {len(member)} test lesions have training lesions of their class; at least {LEAST} are needed."
        return AuditRows(none, none, none[:, 0], reason)
    return AuditRows(trained[member], tests[non_member], train_groups[member])


def _one_per_group(
    store: CodeStore, split: str, groups: list[np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws one image of each group, in random order. Returns rows [G, 3], strata (class and packed set) [G], groups [G]."""
    shards, ordinals, strata, names = [], [], [], []
    for entry in store.shards(split):
        labels, shard = store.arrays(split, 0, entry["shard"])["label"], entry["shard"]
        assert len(labels) == len(groups[shard]), f"{split} shard {shard}: {len(labels)} codes, {len(groups[shard])} images"
        shards.append(np.full(len(labels), shard, np.int32))
        ordinals.append(np.arange(len(labels), dtype=np.int32))
        strata.append((entry.get("set", 0) << 16) + 1 + labels.astype(np.int32))
        names.append(groups[shard])
    name = np.concatenate(names)
    order = rng.permutation(len(name))
    _, first = np.unique(name[order], return_index=True)
    chosen = rng.permutation(order[first])
    shard, ordinal, stratum = (np.concatenate(parts)[chosen] for parts in (shards, ordinals, strata))
    return np.stack([np.zeros_like(shard), shard, ordinal], 1).astype(np.int64), stratum, name[chosen]


def batches(store: CodeStore, level: str, prior: Prior, rows: AuditRows, device: torch.device) -> Iterator[dict]:
    """Reads the codes and facts of all rows for the prior of a level: first the members, then the non-members.

    Args:
        store: The code store.
        level: The prior's level.
        prior: The prior; it names the facts that it is given.
        rows: The rows.
        device: Device of the tensors.

    Yields:
        "codes" [B, h, w]; "facts" [B, F], -1 for unknown; "upper", list of the coarser levels' codes [B, h, w].
    """
    names = [entry["name"] for entry in store.levels]
    upper, facts = [f"codes.{name}" for name in names[: names.index(level)]], list(prior.facts)
    columns = [f"codes.{level}", *upper, *facts]
    for split, part in (("train", rows.members), ("test", rows.non_members)):
        for first in range(0, len(part), BATCH):
            found = store.gather_rows(split, part[first : first + BATCH], columns, np.int64)
            tensors = {name: torch.from_numpy(column).to(device) for name, column in found.items()}
            codes = tensors[f"codes.{level}"]
            yield {
                "codes": codes,
                "facts": torch.stack([tensors[name] for name in facts], 1) if facts else codes.new_empty(len(codes), 0),
                "upper": [tensors[name] for name in upper],
            }
