"""Features of images on disk: computed once for each file of images, by all ranks, and reused by every later evaluation.

A cache file holds the features of one shard of images, or of one file of the code store. It may hold further columns, such as
"pixels" (thumbnails). Its name contains the digest of what computes the columns and the checksum of the source, so a file never
has to be compared with settings: other images or other weights have another name. Files are written atomically. A file that
cannot be read or whose checksum differs is computed again. Deleting the folder loses nothing but time.

Data come from shards and code stores. They go to the rulers, the classifier, the utility test and the search for copies, which
read them file by file, so memory does not grow with the number of images.

Shapes: S images of a file, N images, D features.
"""

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hpc import dist
from hpc.data.storage import is_remote
from hpc.dist import Topology
from hpc.run.progress import progress_bar
from hpc.run.rundir import atomic_write

FEATURES_FOLDER = "features"
Columns = dict[str, np.ndarray]  # arrays by name, each with one row for each image


class Source(NamedTuple):
    """A file of images whose features are to be computed.

    Attributes:
        name: Name of the source, such as "train-000003".
        checksum: Changes whenever the images change.
        count: Number of images, S.
        batches: Reads the images, as uint8 batches [B, C, H, W].
    """

    name: str
    checksum: str
    count: int
    batches: Callable[[], Iterator[torch.Tensor]]


class Features:
    """The features of several files, in order. Reads them file by file.

    Attributes:
        paths: The cache files.
        counts: Number of images of each file.
        starts: Index of the first image of each file; one more entry at the end, the number of all images.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]):
        self.paths, self.counts = list(paths), list(counts)
        self.starts = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def part(self, index: int) -> np.ndarray:
        """Returns the features of one file, fp32 [S, D]."""
        return self.column(index, "features").astype(np.float32)

    def column(self, index: int, name: str) -> np.ndarray:
        """Returns a column of one file as it is stored, [S, …]."""
        with safe_open(self.paths[index], framework="numpy") as file:
            return file.get_tensor(name)

    def gather(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the features of the images with these indices, fp32 [N, D], in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        files = np.searchsorted(self.starts, indices, side="right") - 1
        out: np.ndarray | None = None
        for file in np.unique(files).tolist():
            rows = np.flatnonzero(files == file)
            features = self.part(file)
            if out is None:
                out = np.empty((len(indices), features.shape[1]), np.float32)
            out[rows] = features[indices[rows] - self.starts[file]]
        return np.empty((0, 0), np.float32) if out is None else out


def cache_folder(beside: str | Path, otherwise: Path) -> Path:
    """Returns the folder of the cache: inside a local directory of images that can be written, else in the run.

    Args:
        beside: Directory or URL of the shards or codes.
        otherwise: The run's directory.
    """
    writable = not is_remote(beside) and Path(beside).is_dir() and os.access(beside, os.W_OK)
    return (Path(beside) if writable else otherwise) / FEATURES_FOLDER


def cached_columns(
    folders: Sequence[Path],
    sources: Sequence[Source],
    compute: Callable[[torch.Tensor], Columns],
    digest: str,
    topology: Topology,
    what: str,
) -> Features:
    """Returns columns of some sources, such as features, and computes those that no folder holds yet. Collective.

    Args:
        folders: For each source, the folder of its cache file.
        sources: The sources, the same on every rank.
        compute: Maps images, uint8 [B, C, H, W], to their rows of each column.
        digest: Names everything that `compute` depends on. It becomes part of the files' names.
        topology: This process among the ranks. Each rank computes a share of the sources.
        what: Text of the progress bar.
    """
    paths = [
        folder / f"{source.name}-{digest}-{source.checksum}.safetensors"
        for folder, source in zip(folders, sources, strict=True)
    ]
    missing = dist.run_on_leader(_missing, paths)
    mine = missing[topology.rank :: topology.world_size]
    if missing:
        with progress_bar(sum(sources[i].count for i in mine), what, shown=topology.leader) as progress:
            for i in mine:
                parts = []
                for batch in sources[i].batches():
                    parts.append(compute(batch))
                    progress.update(len(batch))
                write_arrays(paths[i], {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    dist.barrier()
    return Features(paths, [source.count for source in sources])


def _missing(paths: Sequence[Path]) -> list[int]:
    """Returns the indices of the cache files that are missing or damaged."""
    return [i for i, path in enumerate(paths) if read_arrays(path) is None]


def write_arrays(path: Path, arrays: Columns) -> None:
    """Writes a cache file with its checksum, atomically."""
    arrays = {name: np.require(array, requirements="C") for name, array in arrays.items()}
    atomic_write(path, save(arrays, {"crc32": str(_crc32(arrays))}))


def read_arrays(path: Path) -> Columns | None:
    """Reads a cache file. Returns None if it is missing, or holds something else than what was written."""
    # TypeError and ValueError: a damaged header without a checksum, or with types that NumPy does not know
    with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError, ValueError):
        with safe_open(path, framework="numpy") as file:
            names: list[str] = file.keys()
            arrays = {name: file.get_tensor(name) for name in names}
            return arrays if _crc32(arrays) == int(file.metadata()["crc32"]) else None
    return None


def _crc32(arrays: Columns) -> int:
    """Returns the checksum of all arrays, in the order of their names."""
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(arrays[name], crc)
    return crc
