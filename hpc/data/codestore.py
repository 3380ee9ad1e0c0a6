"""The code store: the integer codes of all images in sharded files, and a manifest that is written last.

There is one safetensors file for each image shard and each draw of augmentations. A file of S images holds
- codes.<level> [S, h, w], uint8, uint16 or int32, the smallest that holds the level's codes,
- index [S], int64: the ordinal of the image in its shard,
- further columns [S], int16: label, site and others, -1 for unknown.

The encode stage writes the store, and the priors read it. Invariant: a file is written atomically under its final name, so
every file that exists is complete. Ranks therefore write files in parallel without locks, and a stage that was killed resumes
with the files that are missing.
"""

import json
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike
from safetensors.numpy import save

from hpc.data import manifest
from hpc.errors import UserError
from hpc.run.rundir import atomic_write


def code_dtype(entries: int) -> np.dtype:
    """Returns the smallest of uint8, uint16 and int32 that holds the codes 0 to `entries` - 1."""
    return np.dtype(np.uint8 if entries <= 256 else np.uint16 if entries <= 65536 else np.int32)


def file_name(split: str, draw: int, shard: int) -> str:
    """Returns the name of the file with the codes of an image shard in a draw."""
    return f"{split}-{draw:02d}-{shard:06d}.safetensors"


def write_codes(folder: Path, split: str, draw: int, shard: int, arrays: dict[str, np.ndarray]) -> None:
    """Writes one file of a store.

    Args:
        folder: Directory of the store.
        split: Split of the image shard.
        draw: Draw of augmentations, from 0.
        shard: Number of the image shard.
        arrays: The columns by name, each [S, …].
    """
    atomic_write(folder / file_name(split, draw, shard), save({k: np.ascontiguousarray(v) for k, v in arrays.items()}))


MAX_MAPPED = 256  # files mapped at once: each takes a file descriptor, of which a process often has 1,024


class CodeStore:
    """Reads a finished store. Files are mapped into memory, so rows in the page cache are read without a system call.

    Attributes:
        folder: Directory of the store.
        manifest: The store's manifest.
        levels: The manifest's entries of the tokenizer's levels, coarse to fine.
    """

    def __init__(self, folder: Path):
        """Reads the manifest. Raises UserError where there is no finished store."""
        self.folder = Path(folder)
        self.manifest = manifest.read(self.folder)
        self.levels = self.manifest["levels"]
        self._entries = {(e["split"], e["draw"], e["shard"]): e for e in self.manifest["shards"]}
        self._mapped: OrderedDict[tuple[str, int, int], dict[str, np.ndarray]] = OrderedDict()  # least recently used first
        self._checked: set[tuple[str, int, int]] = set()  # files whose content this process has compared with the manifest

    def shards(self, split: str) -> list[dict]:
        """Returns the manifest's entries of a split at draw 0, sorted by shard.

        Raises:
            UserError: The store has no such split.
        """
        entries = [s for s in self.manifest["shards"] if s["split"] == split and s["draw"] == 0]
        if not entries:
            raise UserError(f"The code store {self.folder} holds no split '{split}'.")
        return sorted(entries, key=lambda s: s["shard"])

    def entry(self, split: str, draw: int, shard: int) -> dict:
        """Returns the manifest's entry of one file."""
        return self._entries[split, draw, shard]

    def draws(self, split: str) -> int:
        """Returns the number of draws of a split."""
        return 1 + max(s["draw"] for s in self.manifest["shards"] if s["split"] == split)

    def arrays(self, split: str, draw: int, shard: int) -> dict[str, np.ndarray]:
        """Returns read-only views of one file's arrays, by column.

        A file's content is checked when this process opens it for the first time.

        Raises:
            UserError: The file cannot be read, has changed since it was written, or holds codes or facts that do not exist.
        """
        key = split, draw, shard
        if key not in self._mapped:
            path = self.folder / file_name(*key)
            raw, self._mapped[key] = _map_file(path)
            if key not in self._checked:
                self._check(path, raw, self._mapped[key], self._entries[key])
                self._checked.add(key)
            if len(self._mapped) > MAX_MAPPED:  # arrays that a caller still holds stay valid
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(key)
        return self._mapped[key]

    def _check(self, path: Path, raw: np.ndarray, arrays: dict[str, np.ndarray], entry: dict) -> None:
        """Compares a file with the manifest. Codes and facts are indices of embeddings, so they must be in range."""
        if len(raw) != entry["bytes"] or zlib.crc32(raw) != entry["crc32"]:
            raise UserError(
                f"The code shard {path} has changed since it was written. Restore it, or encode again (--fresh codes)."
            )
        numbers = {f"codes.{level['name']}": (0, level["K"]) for level in self.levels}
        numbers |= {name: (-1, len(values)) for name, values in self.manifest.get("vocabularies", {}).items()}
        for name, (lowest, end) in numbers.items():
            if name in arrays and arrays[name].size and not lowest <= arrays[name].min() <= arrays[name].max() < end:
                raise UserError(
                    f"The code shard {path} holds {name} from {arrays[name].min()} to {arrays[name].max()}, but the store has "
                    f"{lowest} to {end - 1}. Its files do not belong together; encode again (--fresh codes)."
                )

    def gather_rows(
        self, split: str, locations: Sequence, columns: list[str], dtype: DTypeLike | None = None
    ) -> dict[str, np.ndarray]:
        """Reads rows of a split.

        Args:
            split: The split.
            locations: (draw, shard, ordinal) of each row, [N, 3].
            columns: Names of the arrays to read.
            dtype: Type of the result; None means the stored type.

        Returns:
            An array [N, …] for each column, in the order of the locations.
        """
        draws, shards, ordinals = np.asarray(locations, dtype=np.int64).reshape(-1, 3).T
        # Sort by file, and within a file by ordinal, which is the order on disk.
        order = (draws << 56 | shards << 32 | ordinals).argsort()
        draws, shards, ordinals = draws[order], shards[order], ordinals[order]
        file_starts = np.flatnonzero(np.diff(draws << 32 | shards, prepend=-1)).tolist()
        # Read file by file.
        rows: dict[str, np.ndarray] = {}
        for start, end in pairwise([*file_starts, len(order)]):
            arrays = self.arrays(split, int(draws[start]), int(shards[start]))
            in_file = ordinals[start:end]
            for column in columns:
                source = arrays[column]
                assert in_file[-1] < len(source), f"row {in_file[-1]} of {len(source)}"
                if column not in rows:
                    rows[column] = np.empty((len(order), *source.shape[1:]), source.dtype)
                # mode="clip": with the default mode, NumPy writes to a copy of `out` first.
                source.take(in_file, 0, out=rows[column][start:end], mode="clip")
        # Restore the order of the locations.
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return {c: rows[c].take(inverse, 0).astype(dtype or rows[c].dtype, copy=False) for c in columns}

    def all(self, split: str, draw: int, columns: list[str]) -> dict[str, np.ndarray]:
        """Returns whole columns of a split's draw, concatenated over its shards.

        Args:
            split: The split.
            draw: Draw of augmentations.
            columns: Names of the arrays to read.
        """
        parts = [self.arrays(split, draw, entry["shard"]) for entry in self.shards(split)]
        return {c: np.concatenate([p[c] for p in parts]) for c in columns}


_DTYPES = {"U8": np.uint8, "U16": np.uint16, "I16": np.int16, "I32": np.int32, "I64": np.int64}


def _map_file(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Maps a safetensors file into memory. Returns its bytes and read-only views of its arrays, by name.

    safetensors.safe_open does not replace this. With framework="numpy" it copies each slice that is read, which makes random
    batches 2 to 5 times slower. With framework="pt" it maps the file writable.
    """
    try:
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        length = int(raw[:8].view(np.uint64)[0])
        header = json.loads(raw[8 : 8 + length].tobytes())
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"The code shard {path} cannot be read ({error}). Run encode again, or restore the file.") from None
    raw = raw.view(np.ndarray)  # indexing a memmap takes several times as long as indexing an array over the same memory
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            arrays[name] = raw[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return raw, arrays
