"""Read the manifests and catalogs of one or several packed sets as if they were one set.

A packed set is a directory or URL with shards, catalogs and a manifest, written by lesiongen/ingest. The sets of one Packed
have the same image size, channels and preprocessing. The images themselves are read by lesiongen/data/stream.py.

A group is a lesion, or a patient where no lesion is known, or else a single image. All images of a group are in one split.
"""

import csv
import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from hpc.config import differences, digest
from hpc.data import manifest
from hpc.data.storage import CacheConfig, Store
from hpc.errors import UserError

SPLITS = ("train", "val", "test")
# Columns of a catalog. Older sets have no column "lesion", and before patients joined groups no column "patient".
CATALOG = ("image_id", "own_group", "group", "split", "shard", "ordinal", "dx", "licence", "patient", "lesion")


class Packed:
    """One or several packed sets, read as one. Stages make it from `inputs.shards` or from the run's own shards.

    Attributes:
        stores: The storage of each set.
        manifests: The manifest of each set.
        name: The locations of all sets, for messages.
        size: Short side of the images, in pixels.
        channels: Colour channels, 3 or 1.
        preprocess: Settings of the preprocessing, as plain data of a PreprocessConfig.
        classes: Class names of all sets. A class's index here can differ from its index in the manifest of a set.
        vocabularies: Values of each fact in all sets; those of "label" are the classes.
        splits: Names of the splits that have images, in the order of SPLITS.
    """

    def __init__(self, locations: list[str | Path], cache: CacheConfig | None = None):
        """Reads the manifests.

        Args:
            locations: Directory or URL of each set.
            cache: Node-local cache of remote shards.

        Raises:
            UserError: A manifest is missing or cannot be read, or the sets were packed with different settings.
        """
        self.stores = [Store(location, cache or CacheConfig()) for location in locations]
        self.name = ", ".join(str(location) for location in locations)
        self.manifests = [_read_manifest(store) for store in self.stores]
        first = self.manifests[0]
        self.size, self.channels, self.preprocess = first["size"], first["channels"], first["preprocess"]
        for store, other in zip(self.stores, self.manifests, strict=True):
            settings = [{k: m[k] for k in ("size", "channels", "preprocess")} for m in (first, other)]
            if changed := differences(*settings):
                raise UserError(
                    f"{self.stores[0].where} and {store.where} were packed differently ({'; '.join(changed)}). Pack them alike "
                    "to use them together."
                )
        self.classes: list[str] = self._union("classes")
        self.vocabularies = {
            name: list(dict.fromkeys(v for m in self.manifests for v in m["vocabularies"][name]))
            for name in first["vocabularies"]
        } | {"label": self.classes}
        self.splits = [name for name in SPLITS if any(name in m["counts"] for m in self.manifests)]

    def _union(self, key: str) -> list[str]:
        return list(dict.fromkeys(value for m in self.manifests for value in m[key]))

    def entries(self, split: str) -> list[tuple[int, dict]]:
        """Returns (index of the set, manifest entry) of each shard of a split.

        Raises:
            UserError: No set has the split.
        """
        shards = [(i, entry) for i, m in enumerate(self.manifests) for entry in m["shards"] if entry["split"] == split]
        if not shards:
            raise UserError(f"The shards in {self.name} have no split '{split}'.")
        return shards

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Number of images of each class in each split: {split: {class: images}}; class "" counts unlabelled images."""
        totals = {name: Counter({c: 0 for c in self.classes}) for name in self.splits}
        for m in self.manifests:
            for name, by_class in m["counts"].items():
                totals[name].update(by_class)
        return {name: dict(total) for name, total in totals.items()}

    @property
    def group_counts(self) -> dict[str, dict[str, int]]:
        """Number of lesions, patients and groups in each split: {"lesions": {split: number}, …}.

        Lesions and patients count those with an id in the metadata. They are left out for sets whose manifest lacks them.
        """
        kinds = [kind for kind in ("lesions", "patients", "groups") if all(kind in m for m in self.manifests)]
        return {kind: {name: sum(m[kind].get(name, 0) for m in self.manifests) for name in self.splits} for kind in kinds}

    @property
    def sets(self) -> list[dict]:
        """For each set the data sets that it was packed from, and its number of images, lesions, patients and groups."""
        described = []
        for m in self.manifests:
            images = sum(sum(by_class.values()) for by_class in m["counts"].values())
            group_counts = {kind: sum(m[kind].values()) for kind in ("lesions", "patients", "groups") if kind in m}
            described.append({"sources": list(m["sources"]), "images": images, **group_counts})
        return described

    @property
    def rejected(self) -> int:
        """Number of images and metadata rows that packing rejected."""
        return sum(m["rejected"] for m in self.manifests)

    @property
    def about(self) -> dict[str, dict[str, int]]:
        """Number of images of each licence, attribution and source: {"licences": {name: images}, "attributions": …, …}."""
        totals = {}
        for key in ("licences", "attributions", "sources"):
            total = Counter()
            for m in self.manifests:
                total.update(m[key])
            totals[key] = dict(total.most_common())
        return totals

    @cached_property
    def moments(self) -> dict:
        """Mean, standard deviation and variance of the training pixels of all sets, as the function `moments` returns them."""
        return moments([entry for m in self.manifests for entry in m["shards"]])

    def catalog(self) -> Iterator[dict[str, str]]:
        """Yields the catalog row of every image of every set; the keys are CATALOG."""
        for _, row in self.numbered_catalog():
            yield row

    def numbered_catalog(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yields the index of its set and the catalog row of every image of every set; the keys of a row are CATALOG."""
        for number, (store, m) in enumerate(zip(self.stores, self.manifests, strict=True)):
            for row in rows(store.open(entry) for entry in m["catalogs"]):
                yield number, row

    def refuse_leaks(self) -> None:
        """Checks that no image and no group is in different splits of different sets.

        Packing guarantees this within one set, but two sets may hold photographs of the same lesion. The first pass over the
        catalogs keeps 8 bytes for each name. The second pass compares the few names whose numbers are in two splits.

        Raises:
            UserError: An image or a group is in two splits.
        """
        if len(self.stores) == 1:
            return
        numbers = {name: array("q") for name in self.splits}
        for row in self.catalog():
            numbers[row["split"]].extend(name_number(" ".join(member)) for member in _members(row))
        unique = np.sort(np.concatenate([np.unique(np.frombuffer(found, np.int64)) for found in numbers.values()]))
        suspects = set(unique[1:][unique[1:] == unique[:-1]].tolist())
        split_of: dict[tuple[str, str], str] = {}
        for row in self.catalog() if suspects else ():
            for member in _members(row):
                if name_number(" ".join(member)) in suspects and split_of.setdefault(member, row["split"]) != row["split"]:
                    kind, name = member
                    raise UserError(
                        f"The {kind} '{name}' is in {split_of[member]} in one of the sets {self.name} and in {row['split']} in "
                        "another, so held-out images would be known from training. Pack all images as one set."
                    )

    def digest(self) -> str:
        """Returns a digest of the contents of all sets; for a single set, the digest of its manifest."""
        digests = [digest(m) for m in self.manifests]
        return digests[0] if len(digests) == 1 else digest(digests)


def _members(row: dict[str, str]) -> set[tuple[str, str]]:
    """Returns what a catalog row belongs to and may be in one split only: ("image", id) and ("group", name) of its groups."""
    return {("image", row["image_id"]), ("group", row["own_group"]), ("group", row["group"])}


def name_number(name: str) -> int:
    """Returns a number of 64 bits for a name, the same wherever the name occurs.

    Two of 1,000,000 names have the same number with a probability of 1 in 10,000,000.
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def rows(files: Iterable[Path | int]) -> Iterator[dict[str, str]]:
    """Yields the row of every image in some catalogs; the keys are CATALOG.

    Args:
        files: The path or an open file descriptor of each catalog. Descriptors are closed.
    """
    for path_or_descriptor in files:
        with open(path_or_descriptor, newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)


def _read_manifest(store: Store) -> dict:
    """Reads the manifest of a set. Raises UserError if this fails."""
    try:
        return manifest.parse(store.read_small(manifest.NAME), store.where)
    except FileNotFoundError:
        raise UserError(
            f"{store.where} holds no finished shards: it has no {manifest.NAME}. Run `lesiongen pack` first."
        ) from None
    except OSError as error:
        raise UserError(f"The shards in {store.where} cannot be read: {error}") from None


def moments(entries: list[dict]) -> dict:
    """Computes statistics of the training pixels in [0, 1].

    Args:
        entries: Shard entries of manifests. Those of the training split hold the sums over the shard's pixels.

    Returns:
        "mean" and "std" of each channel, and "data_variance" over all channels together.
    """
    parts = [entry["moments"] for entry in entries if "moments" in entry]
    pixels, total, squares = (
        np.array([sum(values) for values in zip(*(p[k] for p in parts), strict=True)], dtype=np.float64)
        for k in ("pixels", "sum", "squares")
    )
    mean = total / pixels
    variance = squares / pixels - mean**2
    overall = squares.sum() / pixels.sum() - (total.sum() / pixels.sum()) ** 2
    return {
        "mean": [round(v, 6) for v in (mean / 255).tolist()],
        "std": [round(v, 6) for v in (np.sqrt(variance) / 255).tolist()],
        "data_variance": round(float(overall / 255**2), 6),
    }
