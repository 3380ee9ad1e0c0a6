"""Journals: JSONL files with one entry a line. Entries are only appended; a resume cuts a journal back to its checkpoint.

A crash or a power failure may leave an incomplete line, NUL bytes or other bytes. `read` skips such lines, and `append` begins
a new line after them, so the other entries stay readable. Training keeps its metrics, the samples that it read and the
unreadable samples in journals; launch/ keeps the submitted jobs and how their ranks ended.
"""

import json
import os
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
        lines = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        with open(path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                lines = lines if file.read(1) == b"\n" else b"\n" + lines
            file.write(lines)


def read(path: Path, *required: str) -> list[dict]:
    """Reads the entries of a journal that are whole, or [] if there is no file.

    Args:
        path: The journal.
        *required: Keys that the caller needs. Entries without one of them are skipped, as damaged lines are.
    """
    entries = map(parse, path.read_bytes().split(b"\n")) if path.exists() else ()
    return [entry for entry in entries if entry and entry.keys() >= set(required)]


def parse(line: bytes) -> dict:
    """Parses a line of a journal. Returns {} for a line that a crash has damaged."""
    try:
        entry = json.loads(line.strip(b"\0"))  # a power failure may leave NUL bytes where a line was to be written
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def cut_back(path: Path, is_known: Callable[[dict], bool]) -> None:
    """Removes the entries after a checkpoint. The resumed training writes them again, so they would be there twice.

    Args:
        path: The journal; nothing happens if it does not exist.
        is_known: Whether the checkpoint knows of an entry. Other entries are removed, and damaged ones.
    """

    def remains(entry: dict) -> bool:
        try:
            return is_known(entry)
        except (KeyError, TypeError):  # the entry lacks a key, or has a value of another type
            return False

    if path.exists():
        remaining = [entry for entry in read(path) if remains(entry)]
        atomic_write(path, "".join(json.dumps(e) + "\n" for e in remaining).encode())
