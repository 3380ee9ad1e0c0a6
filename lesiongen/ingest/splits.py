"""Which images may not part, and on which side of the split each group of them falls."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace

from hpc.errors import UserError
from lesiongen.data.packed import SPLITS
from lesiongen.ingest.catalog import Record


def split_of(group: str, val: float, test: float) -> str:
    """Split by a hash of the group's id against thresholds: adding images never moves one that is there."""
    # A hash of our own: data that were themselves drawn by a plain hash of their ids would all fall on one side.
    u = int.from_bytes(hashlib.sha256(f"lesiongen split {group}".encode()).digest()[:8], "big") / 2**64
    return "test" if u < test else "val" if u < test + val else "train"


class Groups:
    """Union-find over group ids, each with the split it is bound to, if any. Two groups bound to different ones stay apart."""

    def __init__(self, bound: dict[str, str]):
        self.parent: dict[str, str] = {}
        self.bound = dict(bound)

    def find(self, group: str) -> str:
        root = group
        while (above := self.parent.get(root, root)) != root:
            root = above
        while (above := self.parent.get(group, group)) != root:
            self.parent[group], group = root, above
        return root

    def split(self, group: str) -> str:
        return self.bound.get(self.find(group), "")

    def join(self, a: str, b: str) -> bool:
        """Makes one group of two, under the smaller id; False where they are bound to different splits."""
        a, b = sorted((self.find(a), self.find(b)))
        if a == b:
            return True
        splits = {self.bound[g] for g in (a, b) if g in self.bound}
        if len(splits) > 1:
            return False
        self.parent[b] = a
        if splits:
            self.bound[a] = splits.pop()
        return True


def assign(
    records: list[Record],
    val: float,
    test: float,
    pairs: Iterable[tuple[str, str]] = (),
    packed: dict[str, tuple[str, str, str]] | None = None,
) -> tuple[dict[str, list[Record]], list[dict]]:
    """Records of each split in hash order, so that any run of them is a fair draw; and those that would join groups of
    different splits, which are rejected.

    pairs: images that show one lesion; packed: (own group, group, split) of each
    image that is already packed.
    A group's split is the one it is packed in, else the one its images come with, else by its hash; val and test are
    taken by hash from the training images where the data come without one. Raises UserError for a group that comes in
    two splits, and for an empty split."""
    packed = packed or {}
    there = {name: split for own, group, split in packed.values() for name in (own, group)}
    comes, rejected = _given(records, there)
    groups = Groups(comes | there)
    for own, group, _ in packed.values():
        groups.join(own, group)  # as they were joined then
    group_of = {image: group for image, (_, group, _) in packed.items()} | {r.image: r.own_group for r in records}
    for a, b in pairs:
        if any(image not in group_of or image in rejected for image in (a, b)) or (a in packed and b in packed):
            continue
        if not groups.join(group_of[a], group_of[b]):
            # Of the two, the one that is new goes; of two new ones, the one to train on.
            new = [image for image in (a, b) if image not in packed]
            gone = next((image for image in new if groups.split(group_of[image]) == "train"), new[0])
            other = b if gone == a else a
            rejected[gone] = f"shows the lesion of {other}, which is in {groups.split(group_of[other])}"
    settled = {groups.find(group) for group in there}
    lacking = {"val", "test"} - set(comes.values()) if comes else set()
    splits: dict[str, list[Record]] = {name: [] for name in SPLITS}
    for record in records:
        if record.image not in rejected:
            group = groups.find(record.own_group)
            split, by_hash = groups.split(group), split_of(group, val, test)
            if not split or (split == "train" and by_hash in lacking and group not in settled):
                split = by_hash
            splits[split].append(replace(record, group=group))
    ordered = {
        name: sorted(members, key=lambda r: hashlib.sha256(r.image.encode()).digest())
        for name, members in splits.items()
        if members
    }
    return ordered, [{"image": image, "reason": reason} for image, reason in rejected.items()]


def _given(records: list[Record], there: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The split that each group comes with, and images whose group is packed in another. Raises UserError for a leak."""
    comes: dict[str, str] = {}
    rejected: dict[str, str] = {}
    first: dict[str, str] = {}
    leaks = []
    for record in records:
        group, split = record.own_group, record.split
        if not split:
            continue
        if there.get(group, split) != split:
            rejected[record.image] = f"comes in {split}, but its group '{group}' is packed in {there[group]}"
        elif comes.setdefault(group, split) != split:
            leaks.append(f"'{group}' ({first[group]} in {comes[group]}, {record.image} in {split})")
        else:
            first.setdefault(group, record.image)
    if leaks:
        raise UserError(
            f"{len(leaks)} images lie in another split than others of their lesion or patient: {'; '.join(leaks[:5])}. What is "
            "held out would be known from training. Mend the splits that come with the data, or leave them out."
        )
    return comes, rejected


def refuse_empty(groups: dict[str, int], val: float, test: float) -> None:
    """Raises UserError where one of the three would hold no image. groups: their number in each split."""
    for name in SPLITS:
        if not groups.get(name):
            raise UserError(
                f"The {name} split would be empty: {sum(groups.values())} lesions are too few for data.val={val} and "
                f"data.test={test}. Add images or raise the fraction."
            )


def class_counts(rows: Iterable[tuple[str, str]], classes: list[str]) -> dict[str, dict[str, int]]:
    """Images of each class, by split, from (split, dx); "" counts the unlabelled."""
    found = {name: Counter() for name in SPLITS}
    for split, dx in rows:
        found[split][dx] += 1
    return {name: {c: n.get(c, 0) for c in [*classes, ""] if c or n.get("")} for name, n in found.items() if n}


def thin_classes(rows: Iterable[tuple[str, str, str]], classes: list[str], least: int = 5) -> list[str]:
    """Warnings for classes with fewer than `least` held-out groups, from (split, dx, group): figures for them mean little."""
    groups: dict[tuple[str, str], set[str]] = defaultdict(set)
    for split, dx, group in rows:
        groups[split, dx].add(group)
    return [
        f"class '{label}' has only {len(groups[split, label])} groups (lesions, patients) in {split}"
        for split in ("val", "test")
        for label in classes
        if len(groups[split, label]) < least
    ]
