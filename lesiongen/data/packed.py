"""Packed sets as the stages read them: one or several, here or elsewhere, as if they were one."""

import csv
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
CATALOG = ("image_id", "own_group", "group", "split", "shard", "ordinal", "dx", "licence")


class Packed:
    """Sets of shards, and what their manifests say together. Raises UserError for sets that do not go together."""

    def __init__(self, places: list[str | Path], cache: CacheConfig | None = None):
        self.stores = [Store(place, cache or CacheConfig()) for place in places]
        self.name = ", ".join(str(place) for place in places)
        self.manifests = [_manifest(store) for store in self.stores]
        first = self.manifests[0]
        self.size, self.channels, self.preprocess = first["size"], first["channels"], first["preprocess"]
        for store, other in zip(self.stores, self.manifests, strict=True):
            kinds = [{k: m[k] for k in ("size", "channels", "preprocess")} for m in (first, other)]
            if changed := differences(*kinds):
                raise UserError(
                    f"{self.stores[0].where} and {store.where} were packed differently ({'; '.join(changed)}). Pack "
                    "them alike to use them together."
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
        """(set, entry of the manifest) of a split's shards. Raises UserError where there are none."""
        found = [(i, s) for i, m in enumerate(self.manifests) for s in m["shards"] if s["split"] == split]
        if not found:
            raise UserError(f"The shards in {self.name} have no split '{split}'.")
        return found

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Images of each class, "" for the unlabelled, by split."""
        totals = {name: Counter({c: 0 for c in self.classes}) for name in self.splits}
        for m in self.manifests:
            for name, of in m["counts"].items():
                totals[name].update(of)
        return {name: dict(total) for name, total in totals.items()}

    @property
    def groups(self) -> dict[str, int]:
        return {name: sum(m["groups"].get(name, 0) for m in self.manifests) for name in self.splits}

    @property
    def rejected(self) -> int:
        return sum(m["rejected"] for m in self.manifests)

    @property
    def about(self) -> dict[str, dict[str, int]]:
        """Images under each licence, of each attribution and source: {"licences": {…}, "attributions": …, "sources": …}."""
        totals = {}
        for key in ("licences", "attributions", "sources"):
            total = Counter()
            for m in self.manifests:
                total.update(m[key])
            totals[key] = dict(total.most_common())
        return totals

    @cached_property
    def moments(self) -> dict:
        return moments([entry for m in self.manifests for entry in m["shards"]])

    def catalog(self) -> Iterator[dict[str, str]]:
        """A row for each image of every set, of the columns in CATALOG."""
        for store, m in zip(self.stores, self.manifests, strict=True):
            yield from rows(store.open(entry) for entry in m["catalogs"])

    def refuse_leaks(self) -> None:
        """Raises UserError for an image or a group that lies in two splits: each set keeps its own apart, but two may
        hold the same lesion."""
        if len(self.stores) == 1:
            return
        where: dict[tuple[str, str], str] = {}
        for row in self.catalog():
            for what in {("image", row["image_id"]), ("group", row["own_group"]), ("group", row["group"])}:
                if where.setdefault(what, row["split"]) != row["split"]:
                    raise UserError(
                        f"The {what[0]} '{what[1]}' is in {where[what]} in one of {self.name} and in {row['split']} in "
                        "another: what is held out would be known from training. Pack them as one set."
                    )

    def digest(self) -> str:
        found = [digest(m) for m in self.manifests]
        return found[0] if len(found) == 1 else digest(found)


def rows(files: Iterable[Path | int]) -> Iterator[dict[str, str]]:
    """A row for each image in catalogs, given by path or open descriptor, of the columns in CATALOG."""
    for each in files:
        with open(each, newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)


def _manifest(store: Store) -> dict:
    try:
        return manifest.parse(store.read_small(manifest.NAME), store.where)
    except FileNotFoundError:
        raise UserError(f"{store.where} holds no finished shards (no {manifest.NAME}); pack them first.") from None
    except OSError as error:
        raise UserError(f"The shards in {store.where} cannot be read: {error}") from None


def moments(entries: list[dict]) -> dict:
    """Mean and standard deviation per channel and the variance over all, of the training split in [0, 1]."""
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
