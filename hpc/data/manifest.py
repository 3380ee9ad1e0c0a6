"""Manifests of sharded artefacts: written last, so that a directory without one does not exist."""

import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

from hpc.config import digest
from hpc.errors import UserError
from hpc.run.rundir import atomic_write

NAME = "manifest.json"


def crc32_file(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def describe(path: Path, **extra) -> dict:
    """The entry of one shard: {"name", "bytes", "crc32"} and what else the caller knows of it."""
    return {"name": path.name, "bytes": path.stat().st_size, "crc32": crc32_file(path), **extra}


def write(folder: Path, manifest: dict) -> str:
    """Writes the manifest atomically and returns its digest."""
    atomic_write(folder / NAME, json.dumps(manifest, indent=1).encode() + b"\n")
    return digest(manifest)


def read(folder: Path) -> dict:
    """The manifest of a finished directory. Raises UserError where there is none."""
    try:
        return parse((folder / NAME).read_bytes(), str(folder))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no finished data (no {NAME}). Run the stage that makes it first.") from None
    except OSError as error:
        raise UserError(f"{folder / NAME} cannot be read ({error}). Restore it, or make the stage again.") from None


def parse(content: bytes, where: str) -> dict:
    """A manifest from its bytes. Raises UserError for what is none, or names files that lie elsewhere."""
    try:
        found = json.loads(content)
        entries = [*found["shards"], *found.get("catalogs", [])]
        entries += [entry["index"] for entry in found["shards"] if "index" in entry]
        names = [entry["name"] for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}/{NAME} is damaged ({error!r}). Restore it, or make the stage again.") from None
    for name in names:
        # Manifests are as untrusted as shards: no path out of the folder, no URL, no command.
        if not plain(name):
            raise UserError(f"{where}/{NAME} names the file {name!r}, which is no plain file name; it is not to be trusted.")
    return found


def plain(name) -> bool:
    """Whether it names a file of a folder and nothing else."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,159}", name, re.ASCII) is not None


def verify(folder: Path, entries: Iterable[dict]) -> list[str]:
    """Compares every listed file with its bytes and checksum; returns one line for each that differs."""
    problems = []
    for entry in entries:
        path = folder / entry["name"]
        if not path.exists():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, {entry['bytes']} expected")
        elif crc32_file(path) != entry["crc32"]:
            problems.append(f"{path}: checksum differs, the content has changed")
    return problems
