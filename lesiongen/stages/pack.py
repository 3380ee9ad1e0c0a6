"""pack: a folder of images with a metadata CSV → WebDataset shards per split, the manifest last."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from hpc import journal, manifest
from hpc.config import plain
from hpc.dist import Topology, leader_does
from hpc.errors import UserError
from hpc.progress import bar
from hpc.shards import index_path, write_shard
from lesiongen.data import catalog, images
from lesiongen.data.augment import centre
from lesiongen.experiment import DataConfig, Experiment
from lesiongen.stages.base import Stage


def stage(config: Experiment) -> Stage:
    return Stage("shards", (), plain(config.data, volatile=False), run, parallel=False)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    """Rank 0 packs with a pool of processes; the others wait. Returns the manifest's digest."""
    return leader_does(pack, config.data, folder)


def pack(data: DataConfig, folder: Path) -> str:
    """Packs into `folder`. Raises UserError for unusable input; nothing already finished there is touched then."""
    metadata = Path(data.metadata) if data.metadata else None
    found = catalog.read(Path(data.images), metadata, data.columns, data.classes)
    _check_rejected(found.rejected, found.listed, data, folder)
    classes = sorted(data.classes) or sorted({r.dx for r in found.records if r.dx})
    for label in classes:
        if not any(r.dx == label for r in found.records):
            raise UserError(f"The class '{label}' in data.classes has no image.")
    splits = catalog.assign(found.records, data.val, data.test)
    groups = {r.group for r in found.records}
    print(f"{len(found.records):,} images ({found.source}), {len(classes)} classes, {len(groups):,} lesions")
    jobs = [
        (split, number, members[first : first + data.shard_samples])
        for split, members in splits.items()
        for number, first in enumerate(range(0, len(members), data.shard_samples))
    ]
    entries, rejected, sums = [], list(found.rejected), np.zeros((3, data.channels))
    cores = data.processes or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(min(cores, len(jobs))) as pool, bar(len(found.records), "pack") as progress:
        for entry, unusable, moments in pool.map(partial(_pack_shard, data, folder), jobs):
            entries += [entry] if entry else []
            rejected += unusable
            sums += moments
            progress.update(sum(entry["classes"].values()) + len(unusable) if entry else len(unusable))
    _check_rejected(rejected, found.listed, data, folder)
    refused = {r["image"] for r in rejected[len(found.rejected) :]}
    splits = {name: [r for r in members if r.image not in refused] for name, members in splits.items()}
    for warning in catalog.thin_classes(splits, classes):
        print(f"warning: {warning}")
    pixels, total, squares = sums
    mean = total / pixels
    variance = squares / pixels - mean**2
    return manifest.write(
        folder,
        {
            "schema": 1,
            "size": data.size,
            "channels": data.channels,
            "classes": classes,
            "counts": catalog.class_counts(splits, classes),
            "groups": {name: len({r.group for r in members}) for name, members in splits.items()},
            "vocabularies": catalog.vocabularies(found.records, classes),
            "mean": [round(v, 6) for v in (mean / 255).tolist()],
            "std": [round(v, 6) for v in (np.sqrt(variance) / 255).tolist()],
            "data_variance": round(float((squares.sum() / pixels.sum() - (total.sum() / pixels.sum()) ** 2) / 255**2), 6),
            "rejected": len(rejected),
            "shards": entries,
        },
    )


def _check_rejected(rejected: list[dict], listed: int, data: DataConfig, folder: Path) -> None:
    (folder / "rejected.jsonl").unlink(missing_ok=True)
    journal.append(folder / "rejected.jsonl", *rejected)
    if len(rejected) > data.max_rejected * listed:
        raise UserError(
            f"{len(rejected)} of {listed} images and rows cannot be used, above data.max_rejected={data.max_rejected}; the "
            f"first: {rejected[0]['image']}: {rejected[0]['reason']}. All are listed in {folder / 'rejected.jsonl'}."
        )
    if rejected:
        print(f"{len(rejected)} images or rows rejected, listed in {folder / 'rejected.jsonl'}")


def _pack_shard(data: DataConfig, folder: Path, job) -> tuple[dict | None, list[dict], np.ndarray]:
    split, number, records = job
    path = folder / f"{split}-{number:06d}.tar"
    rejected: list[dict] = []
    counts: dict[str, int] = {}
    moments = np.zeros((3, data.channels))  # pixels, sum, sum of squares over the training split

    def samples() -> Iterator[dict]:
        for record in records:
            try:
                content = Path(record.path).read_bytes()
                image = images.shrink(images.decode(content, data.channels), data.size)
            except (images.BadImage, OSError) as error:
                rejected.append({"image": record.image, "reason": str(error)})
                continue
            if split == "train":
                pixels = centre(images.to_tensor(image), data.size).double().flatten(1)
                moments[:] += [[pixels.shape[1]] * data.channels, pixels.sum(1).tolist(), pixels.square().sum(1).tolist()]
            counts[record.dx] = counts.get(record.dx, 0) + 1
            yield {
                "__key__": "".join(c if c.isalnum() or c in "_-" else "_" for c in record.image)[:80],
                data.format: images.encode(image, data.format, data.quality),
                "json": json.dumps(record.facts(), sort_keys=True).encode(),
            }

    count = write_shard(path, samples())
    if not count:
        path.unlink()
        index_path(path).unlink()
        return None, rejected, moments
    return manifest.describe(path, split=split, count=count, classes=counts), rejected, moments
