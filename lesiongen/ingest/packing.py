"""Packs a folder of images with its metadata into WebDataset shards for each split.

Rank 0 reads the metadata, assigns splits and writes one work file for each shard. All ranks pack shards from work files,
each with a pool of processes. Rank 0 merges the results into the manifest, which is written last: a directory without a
manifest is not finished. If packing is killed and run again, only work files without a result are packed.
"""

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
from hpc.config import to_plain
from hpc.data import manifest
from hpc.data.shards import index_path
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run.parent import exit_with_parent
from hpc.run.progress import progress_bar
from hpc.run.rundir import atomic_write
from lesiongen.data.config import DataConfig
from lesiongen.data.packed import CATALOG, SPLITS, moments, rows
from lesiongen.data.tables import write_csv
from lesiongen.ingest import catalog, contents, pairing, shard_work, splits
from lesiongen.ingest.catalog import Catalog, Record
from lesiongen.ingest.splits import PackedImage

POOL_FROM = 2_000  # images; for fewer, starting the processes takes longer than packing


def pack(data: DataConfig, folder: Path, topology: Topology | None = None, append: bool = False) -> str:
    """Packs images into shards. Collective.

    Args:
        data: Where the images are, and how they are packed.
        folder: Directory of the shards.
        topology: The ranks that share the work; None for this process alone.
        append: Add new images to a finished set. Images that are packed already keep their split and shard.

    Returns:
        The manifest's digest.

    Raises:
        UserError: The input cannot be used. A finished set in `folder` is left as it was.
    """
    topology = topology or Topology()
    began = time.monotonic()
    # Rank 0 assigns the splits and writes the work files.
    work_files = dist.run_on_leader(_prepare, data, folder, append)
    # Each rank packs its share.
    mine = work_files[topology.rank :: topology.world_size]
    total = sum(images for _, images in mine)
    processes = data.processes or _default_processes(total, topology)
    with _pool(min(processes, len(mine))) as parallel_map, progress_bar(total, "pack", shown=topology.leader) as progress:
        for images in parallel_map(shard_work.pack_shard, [folder / "work" / name for name, _ in mine]):
            progress.update(images)
    dist.barrier()
    # Rank 0 merges the results.
    digest = dist.run_on_leader(_commit, data, folder, [name for name, _ in work_files], append)
    if topology.leader and work_files:
        number, seconds = sum(images for _, images in work_files), time.monotonic() - began
        print(f"{number:,} images in {seconds:.0f} s, {number / seconds:,.0f} images/s")
    return digest


def _default_processes(images: int, topology: Topology) -> int:
    """Returns this rank's share of the node's cores, or 1 for up to POOL_FROM images."""
    ranks_here = max(1, topology.world_size // topology.nodes)
    return max(1, len(os.sched_getaffinity(0)) // ranks_here) if images > POOL_FROM else 1


@contextmanager
def _pool(processes: int) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """Yields a function like map() that runs in several processes, or map() itself if `processes` is below 2.

    Processes are spawned, because ranks run threads and a fork of a process with threads may deadlock.
    """
    if processes < 2:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=exit_with_parent, initargs=(os.getpid(),)) as workers:
        yield workers.map


def _prepare(data: DataConfig, folder: Path, append: bool) -> list[tuple[str, int]]:
    """Reads the metadata, assigns splits, writes the work files. Returns each work file's name and number of images."""
    before, packed = _read_packed(folder) if append else ({}, {})
    listing = catalog.read_catalog(
        Path(data.images),
        Path(data.metadata) if data.metadata else None,
        data.columns,
        data.classes,
        data.licences,
        Path(data.splits) if data.splits else None,
        data.rename,
    )
    for line in (*listing.recognised, *listing.notes):
        print(line)
    _refuse_lost_facts(data, listing)
    records = [r for r in listing.records if r.image not in packed]
    rejected = [entry for entry in listing.rejected if entry["image"] not in packed]
    if append:
        print(f"{len(listing.records) - len(records):,} images are packed already, {len(records):,} are new")
    classes = _classes(data, records, before, append)
    pairs = list(listing.pairs)
    if data.near_duplicates and records:
        with _pool(data.processes or _default_processes(len(records), Topology())) as parallel_map:
            pairs += pairing.find_near_duplicates(records, folder, packed, _suffix(before), parallel_map)
    patients = _packed_patients(before, folder) if data.group_by == "patient" else {}
    packed = {name: image._replace(patient=patients.get(name, "")) for name, image in packed.items()}
    by_split, unjoined = splits.assign(records, data.val, data.test, pairs, packed, data.group_by == "patient")
    _write_rejected(rejected + unjoined, listing.listed, data, folder / f"rejected{_suffix(before)}.jsonl")
    if not append:
        splits.refuse_empty({name: len({r.group for r in found}) for name, found in by_split.items()}, data.val, data.test)
    files = contents.describe(data, listing.tables, folder)
    atomic_write(folder / "work" / contents.list_name(""), json.dumps(files).encode())
    _write_listed(
        folder, listing, rejected + unjoined, classes, catalog.vocabularies(records, classes, before.get("vocabularies"))
    )
    return _write_work(data, folder, by_split, classes, before.get("shards", []))


def _refuse_lost_facts(data: DataConfig, listing: Catalog) -> None:
    """Stops where labels or groups would be lost in silence, and warns of columns that look like them and are not read.

    Raises:
        UserError: No image has a label, or none has a group although a column looks like one, and the config does not allow it.
    """
    what = {"dx": "a diagnosis", "lesion": "a lesion's id", "patient": "a patient's id"}
    for name, columns in listing.unread.items():
        print(f"WARNING: {', '.join(columns)} may hold {what[name]} and is not read. If it does, set data.columns.{name}.")
    if not data.unlabelled and listing.records and not any(record.dx for record in listing.records):
        candidates = listing.unread.get("dx") or ["COLUMN"]
        raise UserError(
            f"None of the {len(listing.records):,} images has a label. Name the column of diagnoses, for example "
            f"data.columns.dx={candidates[0].partition(' of ')[0]}, or set data.unlabelled=true to pack images without labels."
        )
    grouped = any(record.lesion or record.patient for record in listing.records)
    candidates = [(name, columns[0]) for name in ("lesion", "patient") if (columns := listing.unread.get(name))]
    if not data.ungrouped and not grouped and candidates:
        name, column = candidates[0]
        raise UserError(
            f"No image has a lesion or a patient, so photographs of one lesion may fall into training and test. {column} looks "
            f"like one: set data.columns.{name}={column.partition(' of ')[0]}, or data.ungrouped=true if it is none."
        )


def _classes(data: DataConfig, records: list[Record], before: dict, append: bool) -> list[str]:
    """Returns the class names. Classes that are packed already keep their index; new classes follow in alphabetical order."""
    classes = list(before.get("classes", []))
    classes += sorted({*data.classes, *(r.dx for r in records if r.dx)} - set(classes))
    for label in classes:
        if not append and not any(r.dx == label for r in records):
            raise UserError(f"The class '{label}' in data.classes has no image. Remove it from data.classes, or add images.")
    return classes


def _write_listed(folder: Path, listing: Catalog, rejected: list[dict], classes: list[str], vocabularies: dict) -> None:
    """Writes work/listed.json: the facts from the metadata that `_commit` puts into the manifest."""
    (folder / "work").mkdir(parents=True, exist_ok=True)
    listed = {"rejected": rejected, "left_out": listing.left_out, "listed": listing.listed, "classes": classes}
    listed |= {"vocabularies": vocabularies, "supplied_splits": any(record.split for record in listing.records)}
    atomic_write(folder / "work" / "listed.json", json.dumps(listed).encode())


def _write_work(
    data: DataConfig, folder: Path, by_split: dict[str, list[Record]], classes: list[str], shards: list[dict]
) -> list[tuple[str, int]]:
    """Writes one work file for each new shard. New shards are numbered after `shards`, which are packed already."""
    settings = {k: getattr(data, k) for k in ("size", "channels", "format", "quality")} | {"classes": classes}
    settings["preprocess"] = to_plain(data.preprocess)
    work_files = []
    for split, records in by_split.items():
        first_number = sum(s["split"] == split for s in shards)
        for number, first in enumerate(range(0, len(records), data.shard_samples), first_number):
            part = records[first : first + data.shard_samples]
            work_files.append((shard_work.write_work_file(folder, split, number, part, settings).name, len(part)))
    return work_files


def _read_packed(folder: Path) -> tuple[dict, dict[str, PackedImage]]:
    """Returns the manifest of a finished set, and its images without their patients."""
    before = manifest.read(folder)
    if problems := manifest.verify(folder, before["catalogs"]):
        raise UserError(f"{problems[0]}. Images can be appended only to a complete set: restore the file, or pack again.")
    columns = ("own_group", "group", "split", "shard", "ordinal")
    packed = rows(folder / entry["name"] for entry in before["catalogs"])
    return before, {row["image_id"]: PackedImage(*(row[column] for column in columns)) for row in packed}


def _packed_patients(before: dict, folder: Path) -> dict[str, str]:
    """Returns the patient of each packed image, as a group. Warns of sets that were packed before patients were recorded."""
    found = {
        row["image_id"]: row.get("patient") for row in rows(folder / entry["name"] for entry in before.get("catalogs", []))
    }
    if any(patient is None for patient in found.values()):
        print(
            "WARNING: this set was packed before patients joined groups. A new lesion of a packed patient may fall into "
            "another split; pack all images into a new set to group by patient."
        )
    return {image: patient or "" for image, patient in found.items()}


def _suffix(before: dict) -> str:
    """Returns the suffix of the names of this packing's lists: "" for the first packing, "-1" for the first append, …"""
    generation = len(before.get("catalogs", []))
    return f"-{generation}" if generation else ""


def _write_rejected(rejected: list[dict], listed: int, data: DataConfig, path: Path) -> None:
    """Writes the list of rejected images. Raises UserError if there are more than data.max_rejected allows."""
    atomic_write(path, _jsonl(rejected))
    if len(rejected) > data.max_rejected * listed:
        raise UserError(
            f"{len(rejected)} of {listed} images and rows cannot be used, more than data.max_rejected={data.max_rejected} "
            f"allows. The first: {rejected[0]['image']}: {rejected[0]['reason']}. All are listed in {path}. Correct them, or "
            "raise data.max_rejected."
        )


def _jsonl(entries: list[dict]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def _commit(data: DataConfig, folder: Path, work_files: list[str], append: bool) -> str:
    """Merges the results of all work files into the manifest, which is written last. Returns its digest."""
    before = manifest.read(folder) if append else {}
    listed = json.loads((folder / "work" / "listed.json").read_text())
    results = [json.loads(shard_work.result_path(folder / "work" / name).read_text()) for name in work_files]
    rejected = listed["rejected"] + [entry for result in results for entry in result["rejected"]]
    suffix = _suffix(before)
    # List the images that are not packed.
    _write_rejected(rejected, listed["listed"], data, folder / f"rejected{suffix}.jsonl")
    if rejected:
        print(f"{len(rejected):,} images or rows rejected, listed in {folder / f'rejected{suffix}.jsonl'}")
    if left_out := listed["left_out"]:
        print(f"{len(left_out):,} images left out (licences, masks, copies), listed in {folder / f'left_out{suffix}.jsonl'}")
        atomic_write(folder / f"left_out{suffix}.jsonl", _jsonl(left_out))
    # Count the images of the whole set, including those packed before.
    entries = before.get("shards", []) + [result["entry"] for result in results if result["entry"]]
    catalogs = [*before.get("catalogs", []), _write_catalog(folder / f"catalog{suffix}.csv", results)]
    counts = splits.class_counts(columns_of(folder, catalogs, "split", "dx"), listed["classes"])
    group_counts, largest = count_groups(folder, catalogs)
    splits.refuse_empty(group_counts["groups"], data.val, data.test)
    print(_table(counts, group_counts))
    if not listed["supplied_splits"]:
        images = {name: sum(by_class.values()) for name, by_class in counts.items()}
        print("\n".join(splits.share_lines(images, largest, data.val, data.test)))
    if listed["classes"] and (unlabelled := counts["train"].get("", 0)):
        print(f"{unlabelled:,} training images have no class. Tokenizer and priors learn from them as of an unknown class.")
    for warning in splits.small_class_warnings(columns_of(folder, catalogs, "split", "dx", "group"), listed["classes"]):
        print(f"warning: {warning}")
    # Finish: after manifest.write the set is complete.
    _remove_orphans(folder, entries)
    facts = {"schema": 1, "size": data.size, "channels": data.channels, "preprocess": to_plain(data.preprocess)}
    facts |= {"classes": listed["classes"], "counts": counts, **group_counts, "vocabularies": listed["vocabularies"]}
    facts |= {**_count_about(before, results), **moments(entries)}
    facts |= {"rejected": before.get("rejected", 0) + len(rejected), "catalogs": catalogs, "shards": entries}
    digest = manifest.write(folder, facts)
    os.replace(folder / "work" / contents.list_name(""), folder / contents.list_name(suffix))
    shutil.rmtree(folder / "work")
    return digest


def _write_catalog(path: Path, results: list[dict]) -> dict:
    """Writes a row for each newly packed image. Returns the file's entry in the manifest."""
    new = [row for result in results for row in result["catalog"]]
    write_csv(path, CATALOG, new)
    return manifest.describe(path, count=len(new))


def columns_of(folder: Path, catalogs: list[dict], *columns: str) -> Iterator[tuple[str, ...]]:
    """Yields the values of `columns` for every image of the set, from the catalogs on disk."""
    for row in rows(folder / entry["name"] for entry in catalogs):
        yield tuple(row[column] for column in columns)


def count_groups(folder: Path, catalogs: list[dict]) -> tuple[dict[str, dict[str, int]], tuple[str, int]]:
    """Counts lesions, patients and groups in each split, and finds the largest group and its number of images.

    Lesions or patients are left out if a catalog was written before it had their column.
    """
    found: dict[str, dict[str, set]] = {kind: {name: set() for name in SPLITS} for kind in ("lesion", "patient", "group")}
    sizes: Counter = Counter()
    for row in rows(folder / entry["name"] for entry in catalogs):
        sizes[row["group"]] += 1
        for kind in list(found):
            if row.get(kind) is None:
                del found[kind]
            elif row[kind]:
                found[kind][row["split"]].add(row[kind])
    counts = {f"{kind}s": {name: len(ids) for name, ids in by_split.items()} for kind, by_split in found.items()}
    return counts, next(iter(sizes.most_common(1)), ("", 0))


def _count_about(before: dict, results: list[dict]) -> dict[str, dict[str, int]]:
    """Counts the images of each licence, attribution and source, including those packed before."""
    about = {}
    for field in shard_work.COUNTED_FIELDS:
        total = Counter(before.get(f"{field}s", {}))
        for result in results:
            total.update(result["about"][field])
        about[f"{field}s"] = dict(sorted(total.items()))
    return about


def _remove_orphans(folder: Path, entries: list[dict]) -> None:
    """Removes shards that the manifest does not list. An earlier attempt with other work files leaves such shards."""
    names = {entry["name"] for entry in entries}
    for orphan in folder.glob("*.tar"):
        if orphan.name not in names:
            orphan.unlink()
            index_path(orphan).unlink(missing_ok=True)


def _table(counts: dict[str, dict[str, int]], group_counts: dict[str, dict[str, int]]) -> str:
    """Returns a table for the terminal: images of each class, known lesions and patients, and groups, in each split."""
    names = [name for name in SPLITS if name in counts]
    classes = list(dict.fromkeys(c for n in counts.values() for c in n))
    lines = [("", *names)] + [(c or "(unlabelled)", *(f"{counts[n].get(c, 0):,}" for n in names)) for c in classes]
    lines += [("images", *(f"{sum(counts[n].values()):,}" for n in names))]
    known = {kind: number for kind, number in group_counts.items() if any(number.values())}
    lines += [(kind, *(f"{number[n]:,}" for n in names)) for kind, number in known.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
