"""Finds near-duplicates for packing: among the new images, and between new images and those in the shards.

Writes near-duplicates.csv and near-duplicates.png, a picture of the pairs for people to check. `packing.pack` passes the
pairs to `splits.assign`, which puts the two images of a pair in the same split.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from hpc.data.shards import ShardReader
from hpc.run.progress import progress_bar
from hpc.run.rundir import atomic_write
from lesiongen.data import images
from lesiongen.data.tables import write_csv
from lesiongen.ingest import duplicates
from lesiongen.ingest.catalog import Record
from lesiongen.ingest.duplicates import Pair
from lesiongen.ingest.splits import Groups, PackedImage

LARGE_GROUP = 20  # images; a larger group is unlikely to be one lesion, so a warning is printed


def find_near_duplicates(
    records: list[Record], folder: Path, packed: dict[str, PackedImage], suffix: str, parallel_map: Callable
) -> list[tuple[str, str]]:
    """Finds pairs of images that show the same lesion, at least one of them new, and writes the table and the picture.

    Args:
        records: The new images.
        folder: Directory of the shards.
        packed: The images that are packed already.
        suffix: Ending of the names of the files to write.
        parallel_map: A function like map(), which may use several processes.
    """
    paths = {r.image: Path(r.path) for r in records}
    names = sorted({image.shard for image in packed.values()})
    reader, shard_index = ShardReader.local(folder, names), {name: i for i, name in enumerate(names)}

    def packed_bytes(image: str) -> bytes:
        members = reader.read(shard_index[packed[image].shard], int(packed[image].ordinal))
        return members.get("jpg") or members["png"]

    def load(image: str) -> Image.Image:
        return images.read(paths[image]) if image in paths else images.decode(packed_bytes(image))

    # Packed images come first: find_pairs() compares only what follows them with all others.
    with progress_bar(len(packed) + len(paths), "duplicates: read") as progress:
        thumbnails = {}
        for image, thumbnail in itertools.chain(
            ((image, duplicates.thumbnail(images.decode(packed_bytes(image)))) for image in packed),
            zip(paths, parallel_map(_thumbnail, paths.values()), strict=True),
        ):
            progress.update()
            if thumbnail is not None:
                thumbnails[image] = thumbnail
    if not thumbnails:
        return []
    pairs = duplicates.find_pairs(list(thumbnails), np.stack(list(thumbnails.values())), new_from=len(packed))
    if pairs:
        own_groups = {r.image: r.own_group for r in records} | {name: image.own_group for name, image in packed.items()}
        _write_report(folder, suffix, pairs, own_groups, load)
    print(f"{len(pairs):,} pairs of near duplicates" + (f", see {folder / f'near-duplicates{suffix}.png'}" if pairs else ""))
    _warn_of_large_groups(pairs)
    return [(pair.a, pair.b) for pair in pairs]


def _write_report(
    folder: Path, suffix: str, pairs: list[Pair], own_groups: dict[str, str], load: Callable[[str], Image.Image]
) -> None:
    """Writes the table of all pairs, and the picture of the pairs that people should check first.

    The picture begins with pairs that the metadata does not list as one lesion, the lowest score first.
    """
    rows = [(p.a, p.b, p.score, "yes" if own_groups[p.a] == own_groups[p.b] else "no") for p in pairs]
    doubtful_first = sorted(pairs, key=lambda p: (own_groups[p.a] == own_groups[p.b], p.score))
    write_csv(folder / f"near-duplicates{suffix}.csv", ("a", "b", "score", "same_group_already"), rows)
    atomic_write(folder / f"near-duplicates{suffix}.png", images.encode_png(duplicates.draw_pairs(doubtful_first, load)))


def _warn_of_large_groups(pairs: list[Pair]) -> None:
    """Prints a warning for each group of more than LARGE_GROUP images that the pairs join."""
    groups = Groups({})
    for pair in pairs:
        groups.join(pair.a, pair.b)
    sizes = Counter(groups.find(image) for image in {image for pair in pairs for image in (pair.a, pair.b)})
    for image, size in sizes.most_common():
        if size > LARGE_GROUP:
            print(f"warning: near duplicates join {size} images in one group, that of {image}; check that they show one lesion")


def _thumbnail(path: Path) -> np.ndarray | None:
    """Returns the image's thumbnail, None for an unreadable image, which packing rejects later."""
    try:
        return duplicates.thumbnail(images.read(path, size=duplicates.SIDE))
    except (images.BadImage, OSError):
        return None
