"""Append-only JSONL files that can be cut back to a checkpoint."""

import json
from pathlib import Path

from hpc.run.rundir import atomic_write


def append(path: Path, *entries: dict) -> None:
    """One write per call: readers see whole lines, or a torn last one, which read() drops."""
    if entries:
        with open(path, "a") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))


def read(path: Path) -> list[dict]:
    entries = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
    return entries


def cut_back(path: Path, samples: int) -> None:
    """Drops entries with "samples" above the given count: steps that no checkpoint holds never happened."""
    if path.exists():
        kept = [e for e in read(path) if e["samples"] <= samples]
        atomic_write(path, "".join(json.dumps(e) + "\n" for e in kept).encode())
