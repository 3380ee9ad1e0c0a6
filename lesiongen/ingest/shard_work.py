"""Packs one shard from its work file.

A work file in `folder/work` lists the images of one shard and how they are packed. Any process on any node can pack it. The
result is written beside it; a work file with a valid result is not packed again. The same work file always gives the same
shard, to the byte. `packing.pack` writes the work files and merges the results.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from hpc.data import manifest
from hpc.data.shards import index_path, write_shard
from hpc.run.rundir import atomic_write
from lesiongen.data import images
from lesiongen.data.augment import PreprocessConfig, centre, preprocess
from lesiongen.ingest.catalog import Record

COUNTED_FIELDS = ("licence", "attribution", "source")  # the manifest counts the images with each value of these


def write_work_file(folder: Path, split: str, number: int, records: list[Record], settings: dict) -> Path:
    """Writes the work file of one shard. An equal file is kept together with its result.

    Args:
        folder: Directory of the shards.
        split: Split that the images are in.
        number: Number of the shard in its split.
        records: The images, in order.
        settings: How they are packed: size, channels, format, quality, classes, preprocess.

    Returns:
        Path of the work file.
    """
    path = folder / "work" / f"{split}-{number:06d}.json"
    content = json.dumps({"split": split, "settings": settings, "records": [asdict(r) for r in records]}).encode()
    if not path.exists() or path.read_bytes() != content:
        result_path(path).unlink(missing_ok=True)
        atomic_write(path, content)
    return path


def result_path(work_file: Path) -> Path:
    """Returns the path of a work file's result."""
    return work_file.with_suffix(".done")


def pack_shard(work_file: Path) -> int:
    """Packs the shard of a work file and writes its result, unless that is done already.

    Returns:
        The number of images in the work file, including those that are rejected.
    """
    work = json.loads(work_file.read_text())
    shard = work_file.parent.parent / f"{work_file.stem}.tar"
    if not _is_packed(result_path(work_file), shard):
        atomic_write(result_path(work_file), json.dumps(_pack(work, shard)).encode())
    return len(work["records"])


def _is_packed(result: Path, shard: Path) -> bool:
    """Returns whether there is a result, and the shard and index that it describes."""
    try:
        entry = json.loads(result.read_text())["entry"]
    except (OSError, ValueError):
        return False
    return entry is None or (shard.exists() and shard.stat().st_size == entry["bytes"] and index_path(shard).exists())


def _pack(work: dict, shard: Path) -> dict:
    """Writes the shard and its index.

    Returns:
        "entry": The shard's entry in the manifest; None, and no shard, if no image can be read.
        "rejected": {"image", "reason"} of each image that cannot be read.
        "catalog": A row for each image in the shard, with the columns `lesiongen.data.packed.CATALOG`.
        "about": For each of `COUNTED_FIELDS`, the number of images with each value.
    """
    contents = _ShardContents(work, shard.name)
    count = write_shard(shard, contents.samples())
    entry = None
    if count:
        classes = dict(sorted(Counter(row[6] for row in contents.rows).items()))
        index = manifest.describe(index_path(shard))
        entry = manifest.describe(shard, split=work["split"], count=count, classes=classes, index=index)
        if work["split"] == "train":
            entry["moments"] = dict(zip(("pixels", "sum", "squares"), contents.moments.tolist(), strict=True))
    else:
        shard.unlink()
        index_path(shard).unlink()
    return {"entry": entry, "rejected": contents.rejected, "catalog": contents.rows, "about": contents.about}


class _ShardContents:
    """Prepares the images of one work file and collects what the manifest and the catalog list about them.

    Attributes:
        rejected, rows, about: As "rejected", "catalog" and "about" of `_pack`.
        moments: Number, sum and sum of squares of the pixels, int64 [3,C], of training images. Integers, because their
            sums do not depend on the order in which images and shards are added; sums of floats do.
    """

    def __init__(self, work: dict, shard_name: str):
        self.split, self.settings, self.shard_name = work["split"], work["settings"], shard_name
        self.records = [Record(**r) for r in work["records"]]
        self.rejected: list[dict] = []
        self.rows: list[list] = []
        self.about = {name: Counter() for name in COUNTED_FIELDS}
        self.moments = np.zeros((3, self.settings["channels"]), dtype=np.int64)

    def samples(self) -> Iterator[dict]:
        """Yields the members of each image that can be read, one image in memory at a time."""
        settings, channels = self.settings, self.settings["channels"]
        config = PreprocessConfig(**settings["preprocess"])
        # preprocess() crops each side to the share config.centre. What is left then has a short side of settings["size"].
        short_side = round(settings["size"] / config.centre)
        number_of = {name: i for i, name in enumerate(settings["classes"])}
        for record in self.records:
            try:
                image = images.read(Path(record.path), channels, short_side)
            except (images.BadImage, OSError) as error:
                self.rejected.append({"image": record.image, "reason": str(error)})
                continue
            view = preprocess(images.to_tensor(images.resize_short_side(image, short_side)), config)
            if self.split == "train":
                pixels = centre(view, settings["size"]).flatten(1).numpy().astype(np.int64)
                self.moments += [[pixels.shape[1]] * channels, pixels.sum(1), (pixels**2).sum(1)]
            for name, count in self.about.items():
                count[getattr(record, name)] += 1
            position = [self.split, self.shard_name, len(self.rows)]
            groups = [record.patient_group, record.lesion_group]
            self.rows.append([record.image, record.own_group, record.group, *position, record.dx, record.licence, *groups])
            yield {
                "__key__": sample_key(record.image),
                "__label__": number_of.get(record.dx, -1),
                settings["format"]: images.encode(images.to_image(view), settings["format"], settings["quality"]),
                "json": json.dumps(record.facts(), sort_keys=True).encode(),
            }


def sample_key(image: str) -> str:
    """Returns a sample's key: the image id if it is a valid name in tar files, else such a name with a hash of the id.

    Without the hash, two ids could get the same key.
    """
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", image)[:80]
    return plain if plain == image else f"{plain[:70]}-{hashlib.sha256(image.encode()).hexdigest()[:8]}"
