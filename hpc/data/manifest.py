"""Manifests of sharded artefacts, such as packed shards and code stores.

manifest.json lists the files of a directory with their sizes and checksums. Invariant: the manifest is written last, so a
directory without a manifest is unfinished and is not read. Manifests may come from elsewhere and are untrusted: a manifest with
a name that is not a plain file name is refused.
"""

import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hpc.config import digest
from hpc.errors import UserError
from hpc.run.rundir import atomic_write

NAME = "manifest.json"


def crc32_file(path: Path) -> int:
    """Returns the crc32 of a file's content."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def describe(path: Path, **extra: Any) -> dict:
    """Returns the manifest's entry for a file: {"name", "bytes", "crc32"} and the extra keys, such as its split."""
    return {"name": path.name, "bytes": path.stat().st_size, "crc32": crc32_file(path), **extra}


def write(folder: Path, manifest: dict) -> str:
    """Writes a directory's manifest atomically and returns the manifest's digest."""
    atomic_write(folder / NAME, json.dumps(manifest, indent=1).encode() + b"\n")
    return digest(manifest)


def read(folder: Path) -> dict:
    """Reads the manifest of a finished directory.

    Raises:
        UserError: The directory has no manifest, or the manifest cannot be read or is not valid.
    """
    try:
        return parse((folder / NAME).read_bytes(), str(folder))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no finished data (no {NAME}). Run the stage that makes it first.") from None
    except OSError as error:
        raise UserError(f"{folder / NAME} cannot be read ({error}). Restore it, or run its stage again.") from None


def parse(content: bytes, location: str) -> dict:
    """Parses and checks a manifest.

    Args:
        content: The bytes of the manifest.
        location: Directory or address of the manifest, for error messages.

    Raises:
        UserError: The content is not a manifest, or lists a name that is not a plain file name.
    """
    try:
        manifest = json.loads(content)
        entries = [*manifest["shards"], *manifest.get("catalogs", [])]
        entries += [entry["index"] for entry in manifest["shards"] if "index" in entry]
        names = [entry["name"] for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{location}/{NAME} is damaged ({error!r}). Restore it, or run its stage again.") from None
    for name in names:
        # A path could lead out of the directory; a URL or a command could make the reader fetch or run anything.
        if not is_plain_name(name):
            raise UserError(
                f"{location}/{NAME} lists {name!r}, which is not a plain file name. The manifest is not to be trusted; get "
                "the data from its source again."
            )
    return manifest


def is_plain_name(name: Any) -> bool:
    """Returns whether a value is the plain name of a file: no path, URL or command."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,159}", name, re.ASCII) is not None


def verify(folder: Path, entries: Iterable[dict]) -> list[str]:
    """Compares files with their sizes and checksums in a manifest.

    Args:
        folder: The directory of the files.
        entries: The manifest's entries to check.

    Returns:
        One line of text for each file that is missing or differs.

    Raises:
        UserError: A file cannot be read, which says nothing about its content.
    """
    problems = []
    for entry in entries:
        path = folder / entry["name"]
        try:
            if path.stat().st_size != entry["bytes"]:
                problems.append(f"{path}: {path.stat().st_size} bytes, {entry['bytes']} expected")
            elif crc32_file(path) != entry["crc32"]:
                problems.append(f"{path}: checksum differs, the content has changed")
        except FileNotFoundError:
            problems.append(f"{path}: missing")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}). Correct its permissions or the file system.") from None
    return problems
