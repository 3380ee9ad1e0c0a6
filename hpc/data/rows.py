"""Rows of a code store as tensors on a device.

A split lies in the device's memory where it fits; otherwise rows are read from the store's mapped files. Invariant: both ways
return the same rows. Data come from a CodeStore and go to the training and evaluation of the priors.
"""

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch

from hpc.data.codestore import CodeStore

# Share of the free memory that a split may use. The model is built after the split is loaded and needs the rest.
MEMORY_SHARE = {"cuda": 0.25, "cpu": 0.5}


class CodeRows:
    """Reads rows of chosen columns of one split. The prior stage makes one for each split.

    Attributes:
        size: Number of rows of a draw.
        draws: Number of draws.
        resident: Whether the columns of all draws lie in the device's memory.
    """

    def __init__(self, store: CodeStore, split: str, columns: list[str], device: torch.device, resident: bool | None = None):
        """Loads the columns into the device's memory, if resident.

        Args:
            store: The code store.
            split: The split.
            columns: Names of the columns to read.
            device: Device of the tensors.
            resident: Whether to hold the columns in the device's memory. None means: if they fit.
        """
        self.store, self.split, self.columns, self.device = store, split, columns, device
        counts = {entry["shard"]: entry["count"] for entry in store.shards(split)}
        self.shards, self.counts = np.array(list(counts)), np.array(list(counts.values()))
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])  # row of a draw with which each shard begins
        self.size, self.draws = int(self.counts.sum()), store.draws(split)
        if resident is None:
            resident = self.size_in_bytes() <= free_memory(device) * MEMORY_SHARE[device.type]
        self.resident = resident
        self.tables = {c: self._load(c) for c in columns} if self.resident else {}

    def size_in_bytes(self) -> int:
        """Returns the stored size of the columns of all draws."""
        arrays = self.store.arrays(self.split, 0, int(self.shards[0]))
        row_bytes = sum(arrays[c].itemsize * math.prod(arrays[c].shape[1:]) for c in self.columns)
        return row_bytes * self.size * self.draws

    def all(self, draw: int = 0) -> np.ndarray:
        """Returns (draw, shard, ordinal) of each row of a draw, [N, 3]."""
        ordinals = np.arange(self.size) - np.repeat(self.starts, self.counts)
        return np.stack([np.full(self.size, draw), np.repeat(self.shards, self.counts), ordinals], 1)

    def gather_rows(self, locations: Sequence) -> dict[str, torch.Tensor]:
        """Reads rows.

        Args:
            locations: (draw, shard, ordinal) of each row, [N, 3].

        Returns:
            A tensor [N, …] for each column, int64 on the device, in the order of the locations.
        """
        if not self.resident:
            rows = self.store.gather_rows(self.split, locations, self.columns, np.int64)
            return {c: torch.from_numpy(v).to(self.device) for c, v in rows.items()}
        draws, shards, ordinals = np.asarray(locations, dtype=np.int64).reshape(-1, 3).T
        index = draws * self.size + self.starts[self.shards.searchsorted(shards)] + ordinals
        index = torch.from_numpy(index).to(self.device)
        return {column: table[index].long() for column, table in self.tables.items()}

    def _load(self, column: str) -> torch.Tensor:
        """Returns a column of all draws on the device. Copies file by file, so memory never holds two copies of the column."""
        keys = [(draw, shard) for draw in range(self.draws) for shard in self.shards.tolist()]
        arrays = [self.store.arrays(self.split, draw, shard)[column] for draw, shard in keys]
        dtype = arrays[0].dtype
        if dtype == np.uint16:  # torch has few operations for uint16
            dtype = np.int16 if max(array.max() for array in arrays) < 2**15 else np.int32
        empty = torch.from_numpy(np.empty((0, *arrays[0].shape[1:]), dtype))
        table = torch.empty((self.draws * self.size, *empty.shape[1:]), dtype=empty.dtype, device=self.device)
        for part, array in zip(table.split([len(array) for array in arrays]), arrays, strict=True):
            part.copy_(torch.from_numpy(array.astype(dtype)))
        return table


def free_memory(device: torch.device) -> float:
    """Returns how many bytes this rank may still use.

    On a GPU that is the GPU's free memory. On a CPU it is the rank's share of the machine's available memory, or of the limit
    of the Slurm job or the container where that is lower.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [psutil.virtual_memory().available]
    if job_limit := os.environ.get("SLURM_MEM_PER_NODE"):  # in MiB; 0 means all memory of the node
        limits += [int(job_limit) * 2**20] * (job_limit != "0")
    with contextlib.suppress(OSError, ValueError):  # the container's or job's limit; the text "max" means none
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)
    return min(limits) / ranks
