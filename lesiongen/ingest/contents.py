"""What the files were that a set was packed from, so that moved files are the same data and changed files are noticed.

Packing writes files.json beside the shards, and each append files-<n>.json: size, time of change and sha256 of each image file
and table, by its path relative to `data.images` or to the table. A file of the same size and time of change as in these lists
is not read again. Sets that were packed before these lists existed have none; their paths alone are compared.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from hpc.run.progress import progress_bar
from hpc.run.rundir import atomic_write, same_path
from lesiongen.data.config import DataConfig
from lesiongen.ingest.folders import list_files
from lesiongen.ingest.sources import list_tables

KEYS = ("images", "metadata", "splits")  # keys of DataConfig that are paths
Files = dict[str, list]  # path relative to the root → [size, time of change in ns, digest]
THREADS = 8  # reading waits for the disk or the network


def describe(data: DataConfig, tables: Iterable[Path], folder: Path) -> dict[str, Files]:
    """Returns the files of each key of KEYS.

    Args:
        data: Where the files are.
        tables: The tables that were read for `data.metadata`, companions included.
        folder: Directory of the shards, whose lists of files are used as a cache.
    """
    described, lists = {}, _read(folder)
    for key, files in (("images", list_files(Path(data.images))), ("metadata", tables), ("splits", [data.splits])):
        if root := getattr(data, key):
            described[key] = _digests(_stats(root, files), root, _known(lists, key))
    return described


def list_name(suffix: str) -> str:
    """Returns the name of a packing's list of files. suffix: that of the packing, "" for the first."""
    return f"files{suffix}.json"


def as_requested(folder: Path, recorded: dict, requested: dict) -> dict:
    """Returns the recorded settings of a set, with the requested path in place of each path to the same data.

    A path leads to the same data if it is another spelling of the recorded path, or if the files have the contents that a
    packing or an append of the set recorded. A table at the recorded path is other data if its content has changed; changed
    images are not, see `news`.

    Args:
        folder: Directory of the shards.
        recorded: Settings in the set's record.
        requested: Settings of the config.
    """
    result, lists = dict(recorded), _read(folder)
    for key in KEYS:
        before, now = recorded.get(key), requested.get(key)
        if not before or not now:
            continue
        same = same_path(before, now)
        comparable = key != "images" and os.path.exists(now) and key in lists.get(folder / list_name(""), {})
        if (same and not comparable) or any(_equal(path, content, key, now) for path, content in lists.items()):
            result[key] = now
        elif same:
            result[key] = f"{before} as it was when packed (add new rows with pack --append)"
    return result


def news(folder: Path, data: DataConfig) -> str:
    """Returns a sentence about images that were added, changed or removed since they were packed; "" if there are none.

    Only files that differ from the lists in size or time of change are read.
    """
    lists = _read(folder)
    if not data.images or not os.path.exists(data.images) or folder / list_name("") not in lists:
        return ""
    known = _known(lists, "images")
    now = _digests(_stats(data.images, list_files(Path(data.images))), data.images, known)
    added, removed = len(now.keys() - known.keys()), len(lists[folder / list_name("")]["images"].keys() - now.keys())
    changed = sum(now[name][2] != known[name][2] for name in now.keys() & known.keys())
    counts = {"added": added, "changed": changed, "removed": removed}
    if not any(counts.values()):
        return ""
    listed = ", ".join(f"{number:,} {what}" for what, number in counts.items() if number)
    advice = "Add the new ones with pack --append." if added else "To pack the folder as it is now: --fresh shards."
    return f"images since packing: {listed}. The shards hold the images as they were packed. {advice}"


def _read(folder: Path) -> dict[Path, dict[str, Files]]:
    """Returns the lists of files of the first packing and of each append, by the path of the list."""
    lists = {}
    for path in sorted(folder.glob(list_name("*"))):
        with suppress(ValueError):  # a damaged list is as good as none: the paths alone are compared
            lists[path] = json.loads(path.read_text())
    return lists


def _known(lists: dict[Path, dict[str, Files]], key: str) -> Files:
    """Returns the files of one key of all lists."""
    return {name: entry for content in lists.values() for name, entry in content.get(key, {}).items()}


def _equal(path: Path, content: dict[str, Files], key: str, root: str) -> bool:
    """Returns whether the files below `root` have the contents in a list. Updates their times of change in the list."""
    known = content.get(key)
    if not known or not os.path.exists(root):
        return False
    files = list_files(Path(root)) if key == "images" else list_tables(Path(root), [_below(root, name) for name in known])
    now = _stats(root, files)
    if {name: entry[0] for name, entry in now.items()} != {name: entry[0] for name, entry in known.items()}:
        return False
    now = _digests(now, root, known)
    if any(now[name][2] != known[name][2] for name in now):
        return False
    if now != known and os.access(path.parent, os.W_OK):  # a copy has other times of change: do not read it again
        atomic_write(path, json.dumps(content | {key: now}).encode())
    return True


def _below(root: str, name: str) -> Path:
    """Returns the path of a file in a list. The list of a single table holds the table as "." and others as "../NAME"."""
    return Path(os.path.normpath(os.path.join(os.path.realpath(root), name)))


def _stats(root: str, files: Iterable[str | Path]) -> Files:
    """Returns size and time of change of each file; -1 as the size of a file that cannot be found, such as a broken link."""
    root, found = str(Path(root)), {}
    for file in map(str, files):
        # Most files lie below the root as it is written, and relpath() is slow.
        below = file.startswith(root + os.sep)
        name = file[len(root) + 1 :] if below else os.path.relpath(os.path.realpath(file), os.path.realpath(root))
        try:
            status = os.stat(file)
            found[name] = [status.st_size, status.st_mtime_ns]
        except OSError:
            found[name] = [-1, 0]
    return found


def _digests(files: Files, root: str, known: Files) -> Files:
    """Returns the files with their digests. Files of the size and time of change in `known` are not read."""
    digests = {name: known[name][2] for name, entry in files.items() if name in known and known[name][:2] == entry}
    todo = [name for name in files if name not in digests]
    with ThreadPoolExecutor(THREADS) as threads, progress_bar(len(todo), "checksums", shown=len(todo) > 1_000) as progress:
        for name, digest in zip(todo, threads.map(_digest, (_below(root, name) for name in todo)), strict=True):
            digests[name] = digest
            progress.update()
    return {name: [*entry, digests[name]] for name, entry in files.items()}


def _digest(path: Path) -> str:
    """Returns a digest of a file's content; "" for a file that cannot be read, which packing rejects."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()[:16]
