"""Removes images from finished shards, for example those of a patient who has withdrawn consent.

The shards that hold the images are written again without them, under new names. The manifest is written last: if the process is
killed before, the set is as it was, and the command can be given again. The order and the splits of all other images stay.
"""

import csv
import json
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from hpc.data import manifest
from hpc.data.shards import ShardReader, index_path, write_shard
from hpc.errors import UserError
from lesiongen.data import images
from lesiongen.data.augment import centre
from lesiongen.data.packed import moments, rows
from lesiongen.data.tables import write_csv
from lesiongen.ingest import splits
from lesiongen.ingest.packing import columns_of, count_groups
from lesiongen.ingest.shard_work import COUNTED_FIELDS

ID_COLUMNS = ("image_id", "own_group", "lesion", "patient")  # of a catalog


def all_rows(folder: Path) -> Iterator[dict[str, str]]:
    """Yields the catalog row of each image of finished shards."""
    yield from rows(folder / entry["name"] for entry in manifest.read(folder)["catalogs"])


def find(folder: Path, ids: Collection[str]) -> list[dict[str, str]]:
    """Returns the catalog rows of all images with these ids.

    Args:
        folder: Directory of the shards.
        ids: Ids of images, lesions or patients, as catalog.csv has them.
    """
    return [row for row in all_rows(folder) if any(row.get(column) in ids for column in ID_COLUMNS)]


def refuse_empty(folder: Path, withdrawn: Collection[str]) -> None:
    """Raises UserError if no image would be left in a split."""
    left = {row["split"] for row in all_rows(folder) if row["image_id"] not in withdrawn}
    if empty := [split for split in manifest.read(folder)["counts"] if split not in left]:
        raise UserError(f"No image would be left in the split {empty[0]}. Pack again instead, without the images.")


def remove(folder: Path, withdrawn: Collection[str]) -> str:
    """Removes images from finished shards.

    Args:
        folder: Directory of the shards.
        withdrawn: Ids of the images.

    Returns:
        The digest of the new manifest.

    Raises:
        UserError: No image would be left in a split, or a shard is damaged.
    """
    refuse_empty(folder, withdrawn)
    before = manifest.read(folder)
    kept = {name: [row for row in rows([folder / name]) if row["image_id"] not in withdrawn] for name in _names(before)}

    # Write the shards that hold the images again.
    affected = {row["shard"] for row in rows(folder / name for name in kept) if row["image_id"] in withdrawn}
    entries, removed, ordinals = [], {field: Counter() for field in COUNTED_FIELDS}, {}
    for entry in before["shards"]:
        if entry["name"] not in affected:
            entries.append(entry)
            continue
        shard = _Shard(folder, entry, withdrawn, before)
        path = folder / _new_name(entry["name"])
        if count := write_shard(path, shard.kept()):
            index = manifest.describe(index_path(path))
            classes = dict(sorted(Counter(r["dx"] for c in kept.values() for r in c if r["shard"] == entry["name"]).items()))
            new = manifest.describe(path, split=entry["split"], count=count, classes=classes, index=index)
            entries.append(new | ({"moments": shard.moments()} if "moments" in entry else {}))
        else:
            path.unlink()
            index_path(path).unlink()
        ordinals[entry["name"]] = (path.name, shard.ordinals)
        for field, names in shard.removed.items():
            removed[field].update(names)

    # Write the catalogs again, then the manifest, and delete what the manifest no longer lists.
    catalogs = [_write_catalog(folder, name, table, ordinals) for name, table in kept.items()]
    counts = splits.class_counts(columns_of(folder, catalogs, "split", "dx"), before["classes"])
    group_counts, _ = count_groups(folder, catalogs)
    about = {f"{field}s": dict((Counter(before[f"{field}s"]) - names).items()) for field, names in removed.items()}
    new = before | {"counts": counts, **group_counts, **about, **moments(entries), "catalogs": catalogs, "shards": entries}
    digest = manifest.write(folder, new)
    for name in {*_names(before), *affected} - {entry["name"] for entry in [*catalogs, *entries]}:
        (folder / name).unlink()
        index_path(folder / name).unlink(missing_ok=True)
    return digest


def _names(content: dict) -> list[str]:
    return [entry["name"] for entry in content["catalogs"]]


def _new_name(name: str) -> str:
    """Returns the next name of a file that is written again: train-000002.tar → train-000002-w1.tar → train-000002-w2.tar."""
    stem, _, suffix = name.partition(".")
    base, _, number = stem.rpartition("-w")
    return f"{base}-w{int(number) + 1}.{suffix}" if base and number.isdecimal() else f"{stem}-w1.{suffix}"


def _write_catalog(folder: Path, name: str, table: list[dict], ordinals: dict[str, tuple[str, dict[int, int]]]) -> dict:
    """Writes a catalog again, with the new places of the images. Returns its entry in the manifest."""
    for row in table:
        if row["shard"] in ordinals:
            row["shard"], places = ordinals[row["shard"]]
            row["ordinal"] = str(places[int(row["ordinal"])])
    with open(folder / name, newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file))
    path = folder / _new_name(name)
    write_csv(path, columns, ([row[column] for column in columns] for row in table))
    return manifest.describe(path, count=len(table))


class _Shard:
    """One shard that is written again.

    Attributes:
        ordinals: New ordinal of each image that is kept, by its old one.
        removed: For each field that the manifest counts, how many images with each value were removed.
    """

    def __init__(self, folder: Path, entry: dict, withdrawn: Collection[str], settings: dict):
        self.entry, self.withdrawn, self.settings = entry, withdrawn, settings
        self.reader = ShardReader.local(folder, [entry["name"]])
        self.ordinals: dict[int, int] = {}
        self.removed = {field: Counter() for field in COUNTED_FIELDS}
        self.sums = np.zeros((3, settings["channels"]), dtype=np.int64)

    def kept(self) -> Iterator[dict]:
        """Yields the samples that are kept, and notes the others."""
        number_of = {name: i for i, name in enumerate(self.settings["classes"])}
        for ordinal in range(self.entry["count"]):
            sample = self.reader.read(0, ordinal)
            facts = json.loads(sample["json"])
            if facts["image_id"] in self.withdrawn:
                for field, count in self.removed.items():
                    count[facts.get(field, "")] += 1
                continue
            self.ordinals[ordinal] = len(self.ordinals)
            if "moments" in self.entry:
                self._add_moments(sample)
            yield sample | {"__label__": number_of.get(facts["dx"], -1)}

    def _add_moments(self, sample: dict) -> None:
        [content] = (content for suffix, content in sample.items() if suffix not in ("__key__", "json"))
        view = images.decode_tensor(content, self.settings["channels"])
        pixels = centre(view, self.settings["size"]).flatten(1).numpy().astype(np.int64)
        self.sums += [[pixels.shape[1]] * len(pixels), pixels.sum(1), (pixels**2).sum(1)]

    def moments(self) -> dict:
        """Returns the sums over the pixels that are kept, as the manifest has them."""
        return dict(zip(("pixels", "sum", "squares"), self.sums.tolist(), strict=True))
