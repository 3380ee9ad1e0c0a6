"""Journals: JSONL files with one entry a line. Entries are only appended; a resume cuts a journal back to its checkpoint.

A crash may leave an incomplete last line, which `read` skips. Training keeps its metrics, the samples that it read and the
unreadable samples in journals; launch/ keeps the submitted jobs and how their ranks ended.
"""

import json
from collections.abc import Callable
from pathlib import Path

from hpc.run.rundir import atomic_write


def append(path: Path, *entries: dict) -> None:
    """Appends entries in one write. Readers then see complete lines, except for the last one after a crash.

    Args:
        path: The journal; it is created if needed. Its directory must exist.
        *entries: Plain data, one line each. Without entries, nothing is written.
    """
    if entries:
        with open(path, "a") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))


def read(path: Path) -> list[dict]:
    """Reads all entries of a journal, or [] if there is no file. Lines that are not valid JSON are skipped."""
    entries = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
    return entries


def cut_back(path: Path, is_known: Callable[[dict], bool]) -> None:
    """Removes the entries after a checkpoint. The resumed training writes them again, so they would be there twice.

    Args:
        path: The journal; nothing happens if it does not exist.
        is_known: Whether the checkpoint knows of an entry. Other entries are removed.
    """
    if path.exists():
        remaining = [entry for entry in read(path) if is_known(entry)]
        atomic_write(path, "".join(json.dumps(e) + "\n" for e in remaining).encode())
