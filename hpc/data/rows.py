"""Rows of a code store as tensors on a device: the whole split lies there where it fits; else rows come from mapped files."""

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch

from hpc.data.codestore import CodeStore

SHARE = {"cuda": 0.25, "cpu": 0.5}  # of free memory that a store may take; the model comes after it


class CodeRows:
    """take(where) → tensors of some columns of a split. resident: whether they lie on the device."""

    def __init__(self, store: CodeStore, split: str, columns: list[str], device: torch.device, resident: bool | None = None):
        """resident: None = if they fit."""
        self.store, self.split, self.columns, self.device = store, split, columns, device
        counts = {entry["shard"]: entry["count"] for entry in store.shards(split)}
        self.shards, numbers = np.array(list(counts)), np.array(list(counts.values()))
        self.starts = np.concatenate([[0], np.cumsum(numbers)[:-1]])
        self.size, self.draws = int(numbers.sum()), store.draws(split)
        self.resident = self.bytes() <= free_memory(device) * SHARE[device.type] if resident is None else resident
        self.tables = {c: self._load(c) for c in columns} if self.resident else {}

    def bytes(self) -> int:
        """Of all draws."""
        some = self.store.arrays(self.split, 0, int(self.shards[0]))
        each = sum(some[c].itemsize * math.prod(some[c].shape[1:]) for c in self.columns)
        return each * self.size * self.draws

    def all(self, draw: int = 0) -> np.ndarray:
        """Where each row of a draw lies, [N, 3]: draw, shard, ordinal."""
        counts = np.diff(np.append(self.starts, self.size))
        ordinals = np.arange(self.size) - np.repeat(self.starts, counts)
        return np.stack([np.full(self.size, draw), np.repeat(self.shards, counts), ordinals], 1)

    def gather_rows(self, where: Sequence) -> dict[str, torch.Tensor]:
        """CodeRows (draw, shard, ordinal), [N, 3], as int64 on the device, in the order asked for."""
        if not self.resident:
            found = self.store.gather_rows(self.split, where, self.columns, np.int64)
            return {c: torch.from_numpy(v).to(self.device) for c, v in found.items()}
        draws, shards, ordinals = np.asarray(where, dtype=np.int64).reshape(-1, 3).T
        index = draws * self.size + self.starts[self.shards.searchsorted(shards)] + ordinals
        index = torch.from_numpy(index).to(self.device)
        return {column: table[index].long() for column, table in self.tables.items()}

    def _load(self, column: str) -> torch.Tensor:
        """All draws in order, file by file: there is never a second copy of the whole."""
        places = [(draw, shard) for draw in range(self.draws) for shard in self.shards.tolist()]
        files = [self.store.arrays(self.split, draw, shard)[column] for draw, shard in places]
        kind = files[0].dtype
        if kind == np.uint16:  # torch can do little with it
            kind = np.int16 if max(file.max() for file in files) < 2**15 else np.int32
        first = torch.from_numpy(np.empty((0, *files[0].shape[1:]), kind))
        table = torch.empty((self.draws * self.size, *first.shape[1:]), dtype=first.dtype, device=self.device)
        for part, file in zip(table.split([len(file) for file in files]), files, strict=True):
            part.copy_(torch.from_numpy(file.astype(kind)))
        return table


def free_memory(device: torch.device) -> float:
    """Bytes free on a GPU, or for this one of the machine's ranks in its memory, as far as the job may use that."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [psutil.virtual_memory().available]
    if granted := os.environ.get("SLURM_MEM_PER_NODE"):  # in MiB; 0 = all
        free += [int(granted) * 2**20] * (granted != "0")
    with contextlib.suppress(OSError, ValueError):  # a container's, or a job's; "max" = none
        free.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)
    return min(free) / ranks
