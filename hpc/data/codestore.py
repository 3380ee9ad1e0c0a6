"""Sharded store of integer codes: one safetensors file per image shard and augmentation draw, a manifest written last.

Each file holds codes.<level> [S, h, w] in the smallest of uint8, uint16, int32; index [S] int64, the ordinal in the
image shard; and int16 columns (label, site, …), -1 for unknown. Files are written atomically under their final names,
so encoding is idempotent per file, parallel without locks, and resumes where it was.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from hpc.data import manifest
from hpc.errors import UserError
from hpc.run.rundir import atomic_write


def code_dtype(entries: int) -> np.dtype:
    """Smallest of uint8, uint16, int32 that holds codes 0 … entries-1."""
    return np.dtype(np.uint8 if entries <= 256 else np.uint16 if entries <= 65536 else np.int32)


def file_name(split: str, draw: int, shard: int) -> str:
    return f"{split}-{draw:02d}-{shard:06d}.safetensors"


def write_codes(folder: Path, split: str, draw: int, shard: int, arrays: dict[str, np.ndarray]) -> None:
    atomic_write(folder / file_name(split, draw, shard), save({k: np.ascontiguousarray(v) for k, v in arrays.items()}))


class CodeStore:
    """Reads a finished store. Files are mapped into memory: random reads cost what the page cache costs."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest = manifest.read(self.folder)
        self.levels = self.manifest["levels"]
        self.maps: dict[tuple[str, int, int], dict[str, np.ndarray]] = {}

    def shards(self, split: str) -> list[dict]:
        """Entries of a split's shards at draw 0, in order."""
        found = [s for s in self.manifest["shards"] if s["split"] == split and s["draw"] == 0]
        if not found:
            raise UserError(f"The code store {self.folder} holds no split '{split}'.")
        return sorted(found, key=lambda s: s["shard"])

    def draws(self, split: str) -> int:
        return 1 + max(s["draw"] for s in self.manifest["shards"] if s["split"] == split)

    def arrays(self, split: str, draw: int, shard: int) -> dict[str, np.ndarray]:
        """Read-only views of one file's arrays, by name."""
        key = split, draw, shard
        if key not in self.maps:
            self.maps[key] = _map(self.folder / file_name(*key))
        return self.maps[key]

    def gather_rows(self, split: str, where: Sequence, columns: list[str], dtype=None) -> dict[str, np.ndarray]:
        """CodeRows (draw, shard, ordinal), [N, 3], of the named arrays, in the order asked for; dtype: None = as stored."""
        draws, shards, rows = np.asarray(where, dtype=np.int64).reshape(-1, 3).T
        # By file, and within a file in the order in which it lies on disk.
        order = (draws << 56 | shards << 32 | rows).argsort()
        draws, shards, rows = draws[order], shards[order], rows[order]
        begins = np.flatnonzero(np.diff(draws << 32 | shards, prepend=-1)).tolist()
        found: dict[str, np.ndarray] = {}
        for begin, end in pairwise([*begins, len(order)]):
            arrays, wanted = self.arrays(split, int(draws[begin]), int(shards[begin])), rows[begin:end]
            for column in columns:
                source = arrays[column]
                assert wanted[-1] < len(source), f"row {wanted[-1]} of {len(source)}"
                if column not in found:
                    found[column] = np.empty((len(order), *source.shape[1:]), source.dtype)
                # Any other mode would write to a copy first.
                source.take(wanted, 0, out=found[column][begin:end], mode="clip")
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return {c: found[c].take(back, 0).astype(dtype or found[c].dtype, copy=False) for c in columns}

    def all(self, split: str, draw: int, columns: list[str]) -> dict[str, np.ndarray]:
        """The whole of a split's draw, concatenated over shards."""
        parts = [self.arrays(split, draw, entry["shard"]) for entry in self.shards(split)]
        return {c: np.concatenate([p[c] for p in parts]) for c in columns}


_DTYPES = {"U8": np.uint8, "U16": np.uint16, "I16": np.int16, "I32": np.int32, "I64": np.int64}


def _map(path: Path) -> dict[str, np.ndarray]:
    try:
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        length = int(raw[:8].view(np.uint64)[0])
        header = json.loads(raw[8 : 8 + length].tobytes())
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"The code shard {path} cannot be read ({error}). Run encode again, or restore it.") from None
    raw = raw.view(np.ndarray)  # an index into a memmap costs several times one into an array over the same memory
    out = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            out[name] = raw[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return out
