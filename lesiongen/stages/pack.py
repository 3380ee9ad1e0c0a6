"""pack: a folder of images with its metadata → WebDataset shards per split, the manifest last.

Rank 0 reads the metadata, assigns splits and writes an order for each shard; all ranks fulfil orders with a pool of
processes each; rank 0 merges the results. Killed and run again, it goes on with the orders that are not done.
"""

import csv
import io
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from hpc import dist
from hpc.config import plain
from hpc.data import manifest
from hpc.data.shards import index_path
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run.progress import bar
from hpc.run.rundir import atomic_write
from hpc.train import health
from lesiongen.data.packed import CATALOG, moments, rows
from lesiongen.experiment import DataConfig, Experiment
from lesiongen.ingest import catalog, packing, pairing, splits
from lesiongen.ingest.catalog import SPLITS
from lesiongen.stages.base import Stage


def stage(config: Experiment) -> Stage:
    return Stage("shards", (), plain(config.data, volatile=False), run)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    return pack(config.data, folder, topology)


def pack(data: DataConfig, folder: Path, topology: Topology | None = None, append: bool = False) -> str:
    """Packs into `folder`; with `append`, what is new beside what is there. Collective. Returns the manifest's digest.

    Raises UserError for unusable input; nothing already finished there is touched then."""
    topology = topology or Topology()
    began = time.monotonic()
    orders = dist.leader_does(_prepare, data, folder, append)
    mine = orders[topology.rank :: topology.world]
    total = sum(n for _, n in mine)
    cores = data.processes or processes(total, topology)
    with pool(min(cores, len(mine))) as each, bar(total, "pack", shown=topology.leader) as progress:
        for done in each(packing.fulfil, [folder / "work" / name for name, _ in mine]):
            progress.update(done)
    dist.barrier()
    digest = dist.leader_does(_commit, data, folder, [name for name, _ in orders], append)
    if topology.leader and orders:
        number, seconds = sum(n for _, n in orders), time.monotonic() - began
        print(f"{number:,} images in {seconds:.0f} s, {number / seconds:,.0f} images/s")
    return digest


def processes(number: int, topology: Topology) -> int:
    """For `number` images: this rank's share of the cores; one where starting them would take longer than the work."""
    ranks_here = max(1, topology.world // topology.nodes)
    return max(1, len(os.sched_getaffinity(0)) // ranks_here) if number > 2_000 else 1


@contextmanager
def pool(processes: int) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """A map over processes, in order; one is this process. Spawned: ranks run threads, and a fork of them may deadlock."""
    if processes < 2:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=health.exit_with_parent) as workers:
        yield workers.map


def _prepare(data: DataConfig, folder: Path, append: bool) -> list[tuple[str, int]]:
    """Orders to fulfil and the number of images of each."""
    before, packed = _packed(folder) if append else ({}, {})
    found = catalog.read(
        Path(data.images),
        Path(data.metadata) if data.metadata else None,
        data.columns,
        data.classes,
        data.licences,
        Path(data.splits) if data.splits else None,
        data.rename,
    )
    for line in found.recognised:
        print(line)
    records = [r for r in found.records if r.image not in packed]
    rejected = [entry for entry in found.rejected if entry["image"] not in packed]
    if append:
        print(f"{len(found.records) - len(records):,} images are packed already, {len(records):,} are new")
    classes = list(before.get("classes", []))
    classes += sorted({*data.classes, *(r.dx for r in records if r.dx)} - set(classes))
    for label in classes:
        if not append and not any(r.dx == label for r in records):
            raise UserError(f"The class '{label}' in data.classes has no image.")
    pairs = list(found.pairs)
    if data.near_duplicates and records:
        with pool(data.processes or processes(len(records), Topology())) as each:
            pairs += pairing.near_duplicates(records, folder, packed, _suffix(before), each)
    members, unjoined = splits.assign(records, data.val, data.test, pairs, {k: v[:3] for k, v in packed.items()})
    _refuse_many(rejected + unjoined, found.listed, data, folder / f"rejected{_suffix(before)}.jsonl")
    if not append:
        splits.refuse_empty({name: len({r.group for r in m}) for name, m in members.items()}, data.val, data.test)
    (folder / "work").mkdir(parents=True, exist_ok=True)
    listed = {"rejected": rejected + unjoined, "left_out": found.left_out, "listed": found.listed, "classes": classes}
    listed["vocabularies"] = catalog.vocabularies(records, classes, before.get("vocabularies"))
    atomic_write(folder / "work" / "listed.json", json.dumps(listed).encode())
    settings = {k: getattr(data, k) for k in ("size", "channels", "format", "quality")} | {"classes": classes}
    settings["preprocess"] = plain(data.preprocess)
    orders = []
    for split, chosen in members.items():
        taken = sum(s["split"] == split for s in before.get("shards", []))
        for number, first in enumerate(range(0, len(chosen), data.shard_samples), taken):
            part = chosen[first : first + data.shard_samples]
            orders.append((packing.order(folder, split, number, part, settings).name, len(part)))
    return orders


def _packed(folder: Path) -> tuple[dict, dict[str, tuple[str, str, str, str, int]]]:
    """The manifest, and (own group, group, split, shard, ordinal) of each image, of what is packed already."""
    before = manifest.read(folder)
    if problems := manifest.verify(folder, before["catalogs"]):
        raise UserError(f"{problems[0]}. Nothing can be appended without it: restore it, or pack again.")
    columns = ("own_group", "group", "split", "shard", "ordinal")
    there = rows(folder / entry["name"] for entry in before["catalogs"])
    return before, {row["image_id"]: tuple(row[c] for c in columns) for row in there}


def _suffix(before: dict) -> str:
    """Of files that each packing adds, so that what is there stays as it is: "" for the first, "-1" …"""
    generation = len(before.get("catalogs", []))
    return f"-{generation}" if generation else ""


def _refuse_many(rejected: list[dict], listed: int, data: DataConfig, path: Path) -> None:
    """Writes the list; raises UserError where it is too long."""
    atomic_write(path, "".join(json.dumps(entry) + "\n" for entry in rejected).encode())
    if len(rejected) > data.max_rejected * listed:
        raise UserError(
            f"{len(rejected)} of {listed} images and rows cannot be used, above data.max_rejected={data.max_rejected}; the "
            f"first: {rejected[0]['image']}: {rejected[0]['reason']}. All are listed in {path}."
        )


def _commit(data: DataConfig, folder: Path, orders: list[str], append: bool) -> str:
    """Merges the results of all orders into the manifest, which is written last."""
    before = manifest.read(folder) if append else {}
    listed = json.loads((folder / "work" / "listed.json").read_text())
    results = [json.loads(packing.result_path(folder / "work" / name).read_text()) for name in orders]
    rejected = listed["rejected"] + [entry for result in results for entry in result["rejected"]]
    suffix = _suffix(before)
    _refuse_many(rejected, listed["listed"], data, folder / f"rejected{suffix}.jsonl")
    entries = before.get("shards", []) + [result["entry"] for result in results if result["entry"]]
    new = [row for result in results for row in result["catalog"]]
    about = {}
    for what in packing.ABOUT:
        total = Counter(before.get(f"{what}s", {}))
        for result in results:
            total.update(result["about"][what])
        about[f"{what}s"] = dict(sorted(total.items()))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([CATALOG, *new])
    atomic_write(folder / f"catalog{suffix}.csv", table.getvalue().encode())
    catalogs = [*before.get("catalogs", []), manifest.describe(folder / f"catalog{suffix}.csv", count=len(new))]
    if rejected:
        print(f"{len(rejected):,} images or rows rejected, listed in {folder / f'rejected{suffix}.jsonl'}")
    if left_out := listed["left_out"]:
        print(f"{len(left_out):,} images left out by their licence, listed in {folder / f'left_out{suffix}.jsonl'}")
        atomic_write(folder / f"left_out{suffix}.jsonl", "".join(json.dumps(entry) + "\n" for entry in left_out).encode())
    every = list(rows(folder / entry["name"] for entry in catalogs))
    counts = splits.class_counts(((row["split"], row["dx"]) for row in every), listed["classes"])
    groups = {name: len({row["group"] for row in every if row["split"] == name}) for name in counts}
    splits.refuse_empty(groups, data.val, data.test)
    print(_table(counts, groups))
    for warning in splits.thin_classes(((r["split"], r["dx"], r["group"]) for r in every), listed["classes"]):
        print(f"warning: {warning}")
    listed_now = {entry["name"] for entry in entries}
    for orphan in folder.glob("*.tar"):  # of an attempt with other orders
        if orphan.name not in listed_now:
            orphan.unlink()
            index_path(orphan).unlink(missing_ok=True)
    facts = {"schema": 1, "size": data.size, "channels": data.channels, "preprocess": plain(data.preprocess)}
    facts |= {"classes": listed["classes"], "counts": counts}
    facts |= {"groups": groups, "vocabularies": listed["vocabularies"], **about, **moments(entries)}
    facts |= {"rejected": before.get("rejected", 0) + len(rejected), "catalogs": catalogs, "shards": entries}
    digest = manifest.write(folder, facts)
    shutil.rmtree(folder / "work")
    return digest


def _table(counts: dict[str, dict[str, int]], groups: dict[str, int]) -> str:
    """Images of each class in each split, for people."""
    names = [name for name in SPLITS if name in counts]
    classes = list(dict.fromkeys(c for n in counts.values() for c in n))
    rows = [("", *names)] + [(c or "(unlabelled)", *(f"{counts[n].get(c, 0):,}" for n in names)) for c in classes]
    rows += [("images", *(f"{sum(counts[n].values()):,}" for n in names)), ("groups", *(f"{groups[n]:,}" for n in names))]
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(wide[0]), *(c.rjust(w) for c, w in zip(row[1:], wide[1:], strict=True))]) for row in rows
    )
