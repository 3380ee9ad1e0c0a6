"""Assigns images to train, val and test, so that all images of a group (lesion or patient) are in the same split.

Invariant: an image's split never changes once the image is packed, whatever images or pairs are added later. `packing.pack`
passes the catalog's records to `assign` and writes the shards of each split.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from hpc.errors import UserError
from lesiongen.data.packed import SPLITS
from lesiongen.ingest.catalog import Record


def split_of(group: str, val: float, test: float) -> str:
    """Returns a group's split by comparing a hash of its id with thresholds. So new groups never change the split of others.

    Args:
        group: Id of the group.
        val: Share of groups in val, 0 to 1.
        test: Share of groups in test, 0 to 1.
    """
    # The prefix makes this hash independent of a plain hash of the id. Without the prefix, images that were themselves
    # selected by a plain hash of their ids could all fall into one split.
    u = int.from_bytes(hashlib.sha256(f"lesiongen split {group}".encode()).digest()[:8], "big") / 2**64
    return "test" if u < test else "val" if u < test + val else "train"


class Groups:
    """Union-find over group ids that never joins two groups with different fixed splits.

    Attributes:
        parent: Group → group that it was joined to. Root groups have no entry.
        fixed_splits: Root group → its split, for groups whose split is already decided.
    """

    def __init__(self, fixed_splits: dict[str, str]):
        self.parent: dict[str, str] = {}
        self.fixed_splits = dict(fixed_splits)

    def find(self, group: str) -> str:
        """Returns the root of the group, which is the smallest id among all that are joined with it."""
        root = group
        while (above := self.parent.get(root, root)) != root:
            root = above
        # Path compression: every group on the way becomes a child of the root, so later calls are short.
        while (above := self.parent.get(group, group)) != root:
            self.parent[group], group = root, above
        return root

    def fixed_split(self, group: str) -> str:
        """Returns the fixed split of the group and those joined with it, or "" if their split is not decided."""
        return self.fixed_splits.get(self.find(group), "")

    def join(self, a: str, b: str) -> bool:
        """Joins two groups under the smaller id. Returns False, and joins nothing, if their fixed splits differ."""
        a, b = sorted((self.find(a), self.find(b)))
        if a == b:
            return True
        splits = {self.fixed_splits[g] for g in (a, b) if g in self.fixed_splits}
        if len(splits) > 1:
            return False
        self.parent[b] = a
        if splits:
            self.fixed_splits[a] = splits.pop()
        return True


class PackedImage(NamedTuple):
    """What the catalogs say of an image that is packed already.

    Attributes:
        own_group: Its group by the metadata alone.
        group: Its group, after others were joined to it.
        split: Its split.
        shard: Name of its shard.
        ordinal: Its number in the shard, as text.
        patient: Its patient as a group; "" if unknown, or if patients join no groups.
    """

    own_group: str
    group: str
    split: str
    shard: str = ""
    ordinal: str = ""
    patient: str = ""


def assign(
    records: list[Record],
    val: float,
    test: float,
    pairs: Iterable[tuple[str, str]] = (),
    packed: dict[str, PackedImage] | None = None,
    by_patient: bool = True,
) -> tuple[dict[str, list[Record]], list[dict]]:
    """Assigns each record a group and a split.

    A group gets the split of its images that are packed already; else the split that the records give (Record.split); else
    the split that `split_of` returns. If the records give splits but no val or no test, `split_of` takes the missing split
    from the groups in train.

    Args:
        records: The new images.
        val: Share of groups in val, 0 to 1.
        test: Share of groups in test, 0 to 1.
        pairs: Images that show the same lesion.
        packed: The images that are packed already.
        by_patient: Whether all images of a patient are in one split, also those of different lesions.

    Returns:
        The records of each split, sorted by a hash of the image id, so that every contiguous range is a random sample; and
        {"image", "reason"} of each image that is rejected because it would join groups of different splits.

    Raises:
        UserError: The records give images of one group different splits.
    """
    packed = packed or {}
    packed_splits = {name: image.split for image in packed.values() for name in (image.own_group, image.group)}
    renamed = _former_names(records, packed)
    packed_splits |= {now: packed_splits[before] for now, before in renamed.items() if before in packed_splits}
    supplied_splits, rejected = _supplied_splits(records, packed_splits)
    # Join groups: first as the packed images were joined, then by the new pairs.
    groups = Groups(supplied_splits | packed_splits)
    for a, b in [*((image.own_group, image.group) for image in packed.values()), *renamed.items()]:
        groups.join(a, b)
    if by_patient:
        _join_patients(groups, records, packed, rejected)
    group_of = {name: image.group for name, image in packed.items()} | {r.image: r.own_group for r in records}
    _join_pairs(groups, group_of, pairs, packed, rejected)
    # Choose each group's split.
    packed_groups = {groups.find(group) for group in packed_splits}
    missing_splits = {"val", "test"} - set(supplied_splits.values()) if supplied_splits else set()
    splits: dict[str, list[Record]] = {name: [] for name in SPLITS}
    for record in records:
        if record.image not in rejected:
            group = groups.find(record.own_group)
            split, by_hash = groups.fixed_split(group), split_of(group, val, test)
            if not split or (split == "train" and by_hash in missing_splits and group not in packed_groups):
                split = by_hash
            splits[split].append(replace(record, group=group))
    ordered = {
        name: sorted(members, key=lambda r: hashlib.sha256(r.image.encode()).digest())
        for name, members in splits.items()
        if members
    }
    return ordered, [{"image": image, "reason": reason} for image, reason in rejected.items()]


def _former_names(records: list[Record], packed: dict[str, PackedImage]) -> dict[str, str]:
    """Returns the groups of new images that the packed images have under a former name: name now → name before."""
    names = {name for image in packed.values() for name in (image.own_group, image.group, image.patient)}
    former = {now: before for record in records for now, before in record.former_groups().items()}
    return {now: before for now, before in former.items() if before in names and now not in names}


def _supplied_splits(records: list[Record], packed_splits: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the split that the records give each group, and image → reason for images whose group is packed in another split.

    Raises UserError if the records give images of one group different splits.
    """
    supplied: dict[str, str] = {}
    rejected: dict[str, str] = {}
    first_image: dict[str, str] = {}
    leaks = []
    for record in records:
        group, split = record.own_group, record.split
        if not split:
            continue
        if packed_splits.get(group, split) != split:
            rejected[record.image] = f"comes in {split}, but its group '{group}' is packed in {packed_splits[group]}"
        elif supplied.setdefault(group, split) != split:
            leaks.append(f"'{group}' ({first_image[group]} in {supplied[group]}, {record.image} in {split})")
        else:
            first_image.setdefault(group, record.image)
    if leaks:
        raise UserError(
            f"{len(leaks)} images come in a different split than other images of their lesion or patient: "
            f"{'; '.join(leaks[:5])}. Training would see lesions that are held out. Correct the splits that come with the "
            "data, or remove them."
        )
    return supplied, rejected


def _join_patients(groups: Groups, records: list[Record], packed: dict[str, PackedImage], rejected: dict[str, str]) -> None:
    """Joins the lesions of each patient. Adds new images to `rejected` whose lesion and patient are in different splits.

    Raises UserError if the splits that come with the data divide a patient.
    """
    for image in packed.values():
        if image.patient:
            groups.join(image.group, image.patient)
    divided = []
    for record in records:
        if record.lesion and record.patient and not groups.join(record.lesion_group, record.patient_group):
            here, there = groups.fixed_split(record.lesion_group), groups.fixed_split(record.patient_group)
            if record.split:
                divided.append(f"patient {record.patient} ({record.lesion} in {here}, others in {there})")
            else:
                rejected[record.image] = f"its lesion is in {here}, other lesions of patient {record.patient} in {there}"
    if divided:
        raise UserError(
            f"{len(divided)} images come in a different split than other lesions of their patient: {'; '.join(divided[:3])}. "
            "Set data.group_by=lesion to accept that, or correct the splits that come with the data."
        )


def _join_pairs(
    groups: Groups,
    group_of: dict[str, str],
    pairs: Iterable[tuple[str, str]],
    packed: dict[str, PackedImage],
    rejected: dict[str, str],
) -> None:
    """Joins the groups of each pair. If a pair cannot be joined, adds one of its images to `rejected` (image → reason)."""
    for a, b in pairs:
        # Skip pairs with an image that is not used, and pairs of two packed images, whose splits are final.
        if any(image not in group_of or image in rejected for image in (a, b)) or (a in packed and b in packed):
            continue
        if not groups.join(group_of[a], group_of[b]):
            # Reject the new image. If both are new, reject the one in train.
            new = [image for image in (a, b) if image not in packed]
            dropped = next((image for image in new if groups.fixed_split(group_of[image]) == "train"), new[0])
            other = b if dropped == a else a
            rejected[dropped] = f"shows the lesion of {other}, which is in {groups.fixed_split(group_of[other])}"


def refuse_empty(groups: dict[str, int], val: float, test: float) -> None:
    """Raises UserError if a split has no group.

    Args:
        groups: Number of groups in each split.
        val: The setting data.val, for the message.
        test: The setting data.test, for the message.
    """
    for name in SPLITS:
        if not groups.get(name):
            raise UserError(
                f"The {name} split would be empty: {sum(groups.values())} lesions are too few for data.val={val} and "
                f"data.test={test}. Add images or change these shares."
            )


def class_counts(rows: Iterable[tuple[str, str]], classes: list[str]) -> dict[str, dict[str, int]]:
    """Counts the images of each class in each split.

    Args:
        rows: (split, dx) of each image.
        classes: Class names; those without images count 0.

    Returns:
        {split: {class: number of images}}. The class "" counts unlabelled images, if there are any. Empty splits have no entry.
    """
    counters = {name: Counter() for name in SPLITS}
    for split, dx in rows:
        counters[split][dx] += 1
    return {name: {c: n.get(c, 0) for c in [*classes, ""] if c or n.get("")} for name, n in counters.items() if n}


def share_lines(images: dict[str, int], largest: tuple[str, int], val: float, test: float) -> list[str]:
    """Returns a line with the wanted and the actual share of each split, and a warning if one group makes the shares coarse.

    Args:
        images: Number of images in each split.
        largest: The largest group and its number of images.
        val: The setting data.val.
        test: The setting data.test.
    """
    total, wanted = sum(images.values()), {"train": 1 - val - test, "val": val, "test": test}
    got = ", ".join(f"{name} {wanted[name]:.1%} / {images.get(name, 0) / total:.1%}" for name in SPLITS)
    lines = [f"share of the images, wanted / got: {got}; groups are never divided, so the shares are not exact"]
    group, size = largest
    smallest = min((name for name in SPLITS if wanted[name]), key=wanted.__getitem__)
    if size > wanted[smallest] * total / 2:
        lines.append(
            f"warning: the largest group '{group}' holds {size:,} of {total:,} images, more than half of the wanted share of "
            f"{smallest} ({wanted[smallest] * total:,.0f}). The shares of the splits are coarse."
        )
    return lines


def small_class_warnings(rows: Iterable[tuple[str, str, str]], classes: list[str], minimum: int = 5) -> list[str]:
    """Returns a warning for each class whose held-out groups are too few for reliable metrics.

    Args:
        rows: (split, dx, group) of each image.
        classes: Class names.
        minimum: Number of groups in val, and in test, that is enough.
    """
    groups: dict[tuple[str, str], set[str]] = defaultdict(set)
    for split, dx, group in rows:
        groups[split, dx].add(group)
    return [
        f"class '{label}' has only {len(groups[split, label])} groups (lesions, patients) in {split}"
        for split in ("val", "test")
        for label in classes
        if len(groups[split, label]) < minimum
    ]
