"""One shard's worth of packing: a work order on disk in, a shard and what there is to say of it out.

Orders lie on disk, so that any process on any node can take any of them, and one that is done is not done again. The same
order always makes the same bytes.
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

ABOUT = ("licence", "attribution", "source")


def write(folder: Path, split: str, number: int, records: list[Record], settings: dict) -> Path:
    """Writes the order for shard `number` of a split. One that is there already, with its result, is kept."""
    path = folder / "work" / f"{split}-{number:06d}.json"
    content = json.dumps({"split": split, "settings": settings, "records": [asdict(r) for r in records]}).encode()
    if not path.exists() or path.read_bytes() != content:
        result_path(path).unlink(missing_ok=True)
        atomic_write(path, content)
    return path


def result_path(work_file: Path) -> Path:
    return work_file.with_suffix(".done")


def pack_shard(work_file: Path) -> int:
    """Packs one shard, unless it is there, and records the result. Returns the number of images looked at."""
    work = json.loads(work_file.read_text())
    shard = work_file.parent.parent / f"{work_file.stem}.tar"
    if not _kept(result_path(work_file), shard):
        atomic_write(result_path(work_file), json.dumps(_pack(work, shard)).encode())
    return len(work["records"])


def _kept(result: Path, shard: Path) -> bool:
    try:
        entry = json.loads(result.read_text())["entry"]
    except (OSError, ValueError):
        return False
    return entry is None or (shard.exists() and shard.stat().st_size == entry["bytes"] and index_path(shard).exists())


def _pack(work: dict, shard: Path) -> dict:
    """{"entry" for the manifest, None for an empty shard; "rejected"; "catalog" rows; "about": counts of licences …}."""
    settings, channels = work["settings"], work["settings"]["channels"]
    rejected, rows, about = [], [], {what: Counter() for what in ABOUT}
    # Whole numbers: sums come out the same in whatever order shards are merged.
    moments = np.zeros((3, channels), dtype=np.int64)  # pixels, sum, sum of squares
    prepare = PreprocessConfig(**settings["preprocess"])
    larger = round(settings["size"] / prepare.centre)  # what is cut away is cut before the size is right
    number_of = {name: i for i, name in enumerate(settings["classes"])}

    def samples() -> Iterator[dict]:
        for record in (Record(**r) for r in work["records"]):
            try:
                image = images.read(Path(record.path), channels, larger)
            except (images.BadImage, OSError) as error:
                rejected.append({"image": record.image, "reason": str(error)})
                continue
            view = preprocess(images.to_tensor(images.shrink(image, larger)), prepare)
            if work["split"] == "train":
                pixels = centre(view, settings["size"]).flatten(1).numpy().astype(np.int64)
                moments[:] += [[pixels.shape[1]] * channels, pixels.sum(1), (pixels**2).sum(1)]
            for what, count in about.items():
                count[getattr(record, what)] += 1
            place = [work["split"], shard.name, len(rows)]
            rows.append([record.image, record.own_group, record.group, *place, record.dx, record.licence])
            yield {
                "__key__": key(record.image),
                "__label__": number_of.get(record.dx, -1),
                settings["format"]: images.encode(images.to_image(view), settings["format"], settings["quality"]),
                "json": json.dumps(record.facts(), sort_keys=True).encode(),
            }

    count = write_shard(shard, samples())
    entry = None
    if count:
        classes = dict(sorted(Counter(row[6] for row in rows).items()))
        index = manifest.describe(index_path(shard))
        entry = manifest.describe(shard, split=work["split"], count=count, classes=classes, index=index)
        if work["split"] == "train":
            entry["moments"] = dict(zip(("pixels", "sum", "squares"), moments.tolist(), strict=True))
    else:
        shard.unlink()
        index_path(shard).unlink()
    return {"entry": entry, "rejected": rejected, "catalog": rows, "about": about}


def key(image: str) -> str:
    """A name that tar and every file system take, and two images never share."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", image)[:80]
    return plain if plain == image else f"{plain[:70]}-{hashlib.sha256(image.encode()).hexdigest()[:8]}"
