"""Near-duplicates among images to be packed, and between them and those that are packed: a table and a sheet to look at."""

import csv
import io
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from hpc.data.shards import ShardReader
from hpc.run.progress import bar
from hpc.run.rundir import atomic_write
from lesiongen.data import images
from lesiongen.ingest import duplicates
from lesiongen.ingest.catalog import Record
from lesiongen.ingest.splits import Groups

MANY = 20  # images of one lesion that are hard to believe


def find_near_duplicates(
    records: list[Record], folder: Path, packed: dict, suffix: str, each: Callable
) -> list[tuple[str, str]]:
    """Pairs of images that show one lesion, among the new ones and between them and those packed; listed, with pictures."""
    paths = {r.image: Path(r.path) for r in records}
    names = sorted({place[3] for place in packed.values()})
    reader, number = ShardReader.local(folder, names), {name: i for i, name in enumerate(names)}

    def stored(image: str) -> bytes:
        *_, shard, ordinal = packed[image]
        raw = reader.read(number[shard], int(ordinal))
        return raw.get("jpg") or raw["png"]

    with bar(len(packed) + len(paths), "duplicates: read") as progress:
        found = {}
        contents = ((image, stored(image)) for image in packed)
        for image, thumbnail in itertools.chain(
            ((image, duplicates.thumbnail(images.decode(content))) for image, content in contents),
            zip(paths, each(_thumbnail, paths.values()), strict=True),
        ):
            progress.update()
            if thumbnail is not None:
                found[image] = thumbnail
    if not found:
        return []
    pairs = duplicates.find(list(found), np.stack(list(found.values())), new_from=len(packed))
    if pairs:

        def load(image: str) -> Image.Image:
            return images.decode(paths[image].read_bytes() if image in paths else stored(image))

        table = io.StringIO()
        own = {r.image: r.own_group for r in records} | {image: place[0] for image, place in packed.items()}
        rows = [(p.a, p.b, p.score, "yes" if own[p.a] == own[p.b] else "no") for p in pairs]
        csv.writer(table, lineterminator="\n").writerows([("a", "b", "score", "same_group_already"), *rows])
        doubtful = sorted(pairs, key=lambda p: (own[p.a] == own[p.b], p.score))  # those to look at come first
        atomic_write(folder / f"near-duplicates{suffix}.csv", table.getvalue().encode())
        atomic_write(folder / f"near-duplicates{suffix}.png", images.png(duplicates.sheet(doubtful, load)))
    print(f"{len(pairs):,} pairs of near duplicates" + (f", see {folder / f'near-duplicates{suffix}.png'}" if pairs else ""))
    groups = Groups({})
    for pair in pairs:
        groups.join(pair.a, pair.b)
    joined = Counter(groups.find(image) for image in {image for pair in pairs for image in (pair.a, pair.b)})
    for image, number in joined.most_common():
        if number > MANY:
            print(f"warning: {number} images are joined to {image}; look whether they show one lesion")
    return [(pair.a, pair.b) for pair in pairs]


def _thumbnail(path: Path) -> np.ndarray | None:
    """None for what packing will reject."""
    try:
        return duplicates.thumbnail(images.read(path, size=duplicates.SIDE))
    except (images.BadImage, OSError):
        return None
