"""The code store beside LMDB of pickles, as rosinality/vq-vae-2-pytorch uses it, and beside one .npy for each image.

    pip install --target /tmp/lmdb lmdb        (no dependency of the project)
    PYTHONPATH=/tmp/lmdb python -m benchmarks.codestore

Prints, for 10,015 images of two grids and K = 512: seconds to write all codes, time to read a batch of 32 random rows as int64
tensors, and size on disk; and how long the code store's check of its files takes. The page cache is warm. Times are the best of
ten rounds. Without lmdb its row is left out.
"""

import argparse
import pickle
import tempfile
import time
from collections import namedtuple
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from hpc.data import manifest
from hpc.data.codestore import CodeStore, code_dtype, file_name, write_codes
from hpc.data.rows import CodeRows

try:
    import lmdb
except ImportError:
    lmdb = None

K, BATCH, BATCHES, ROUNDS, SHARD = 512, 32, 200, 10, 1000
CodeRow = namedtuple("CodeRow", ["top", "bottom", "filename"])


class Contender(Protocol):
    """A way to store codes. Made from a folder and the codes of both levels, int64 [N, h, w]."""

    folder: Path

    def write(self) -> None:
        """Writes all codes to the folder."""

    def open(self) -> None:
        """Opens what was written, for reading."""

    def read(self, indices: list[int]) -> list[torch.Tensor]:
        """Returns the top and the bottom codes of some images, int64 [B, h, w] each."""


class Ours:
    """The code store of this project: shards of 1,000 images, with the columns that the encode stage writes; draw 0 only."""

    def __init__(self, folder: Path, top: np.ndarray, bottom: np.ndarray, resident: bool = False):
        """resident: Whether the rows are read from memory instead of from mapped files."""
        self.folder, self.resident = folder, resident
        self.codes = {"codes.top": top, "codes.bottom": bottom}

    def write(self) -> None:
        """Writes the shards and the manifest."""
        number, entries = len(self.codes["codes.top"]), []
        for shard, first in enumerate(range(0, number, SHARD)):
            arrays = {c: v[first : first + SHARD].astype(code_dtype(K)) for c, v in self.codes.items()}
            count = len(arrays["codes.top"])
            arrays |= {c: np.zeros(count, np.int16) for c in ("label", "site", "sex", "age_band", "licence")}
            write_codes(self.folder, "train", 0, shard, arrays | {"index": np.arange(count)})
            path = self.folder / file_name("train", 0, shard)
            entries.append(manifest.describe(path, split="train", draw=0, shard=shard, count=count))
        levels = [{"name": name.removeprefix("codes."), "K": K} for name in self.codes]
        manifest.write(self.folder, {"levels": levels, "shards": entries})

    def open(self) -> None:
        """Opens the store. Loads it into memory, if resident."""
        self.rows = CodeRows(CodeStore(self.folder), "train", [*self.codes, "label"], torch.device("cpu"), self.resident)
        self.locations = self.rows.all()

    def read(self, indices: list[int]) -> list[torch.Tensor]:
        """Reads the labels too, as prior training does."""
        columns = self.rows.gather_rows(self.locations[indices])
        return [columns[c] for c in self.codes]


class Pickles:
    """extract_code.py and LMDBDataset of rosinality/vq-vae-2-pytorch: a pickled row of int64 arrays for each image."""

    def __init__(self, folder: Path, top: np.ndarray, bottom: np.ndarray):
        self.folder, self.top, self.bottom = folder, top, bottom

    def write(self) -> None:
        """Writes all rows in one transaction."""
        env = lmdb.open(str(self.folder), map_size=2**36)
        with env.begin(write=True) as transaction:
            for i, (top, bottom) in enumerate(zip(self.top, self.bottom, strict=True)):
                row = CodeRow(top, bottom, f"nv/ISIC_{i:07d}.jpg")
                transaction.put(str(i).encode(), pickle.dumps(row))
        env.close()

    def open(self) -> None:
        """Opens the database with the settings of LMDBDataset."""
        self.env = lmdb.open(str(self.folder), max_readers=32, readonly=True, lock=False, readahead=False, meminit=False)

    def read(self, indices: list[int]) -> list[torch.Tensor]:
        """Reads each row in a transaction of its own, as LMDBDataset does."""
        rows = []
        for i in indices:
            with self.env.begin(write=False) as transaction:
                row = pickle.loads(transaction.get(str(i).encode()))
            rows.append((torch.from_numpy(row.top), torch.from_numpy(row.bottom)))
        return [torch.stack(level) for level in zip(*rows, strict=True)]


class Files:
    """One .npy of int64 codes for each image and level."""

    def __init__(self, folder: Path, top: np.ndarray, bottom: np.ndarray):
        self.folder, self.codes = folder, {"top": top, "bottom": bottom}

    def write(self) -> None:
        """Writes the files."""
        for name, codes in self.codes.items():
            for i, image_codes in enumerate(codes):
                np.save(self.folder / f"{i}-{name}.npy", image_codes)

    def open(self) -> None:
        """Does nothing: read() opens each file."""

    def read(self, indices: list[int]) -> list[torch.Tensor]:
        """Opens and reads two files for each image."""
        return [torch.from_numpy(np.stack([np.load(self.folder / f"{i}-{name}.npy") for i in indices])) for name in self.codes]


def prepare(contender: Contender, truth: dict[str, np.ndarray], written: bool) -> tuple[float, int]:
    """Writes and opens a contender's files, and asserts that they hold the codes.

    Args:
        contender: The contender.
        truth: The codes of each level, [N, h, w].
        written: Whether another contender has written the same files already.

    Returns:
        Seconds to write, and bytes on disk.
    """
    began = time.perf_counter()
    if not written:
        contender.write()
    seconds = time.perf_counter() - began
    contender.open()
    indices = list(range(0, len(next(iter(truth.values()))), 311))
    for read, codes in zip(contender.read(indices), truth.values(), strict=True):
        assert np.array_equal(read.numpy(), codes[indices])
    return seconds, sum(p.stat().st_blocks * 512 for p in contender.folder.iterdir() if p.is_file())


def checking_seconds(folder: Path) -> float:
    """Returns how long a process needs to open every file of a store for the first time, which checks their contents."""
    store, began = CodeStore(folder), time.perf_counter()
    for entry in store.shards("train"):
        store.arrays("train", 0, entry["shard"])
    return time.perf_counter() - began


def time_reads(contenders: dict[str, Contender], number: int) -> dict[str, float]:
    """Returns microseconds for a batch of each contender, the best of ROUNDS rounds.

    All contenders are timed in every round, so other work on the machine slows all of them alike.

    Args:
        contenders: The contenders by name.
        number: Number of images to draw the batches from.
    """
    batches = np.random.default_rng(0).integers(0, number, (BATCHES, BATCH)).tolist()
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            timed = batches[: BATCHES // 10] if isinstance(contender, Files) else batches  # files are slow
            began = time.perf_counter()
            for indices in timed:
                contender.read(indices)
            best[name] = min(best[name], (time.perf_counter() - began) / len(timed) * 1e6)
    return best


def main() -> None:
    """Measures all contenders on two sizes of grids and prints a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_015, help="images to write (default: %(default)s)")
    parser.add_argument("--folder", help="folder for the files (default: the system's temporary folder)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for bottom, top in ((16, 8), (64, 32)):
        rng = np.random.default_rng(0)
        truth = {n: rng.integers(0, K, (args.images, g, g)) for n, g in (("top", top), ("bottom", bottom))}
        print(f"{args.images:,} images, {bottom}² + {top}² codes")
        print(f"{'':<28}{'write, s':>10}{'batch, µs':>12}{'MB':>9}{'reads':>9}{'size':>8}")
        with tempfile.TemporaryDirectory(dir=args.folder) as root:
            folders = {name: Path(root) / name for name in ("ours", "lmdb", "npy")}
            for folder in folders.values():
                folder.mkdir()
            codes = tuple(truth.values())
            contenders: dict[str, Contender] = {"LMDB of pickles": Pickles(folders["lmdb"], *codes)} if lmdb else {}
            contenders |= {
                "one .npy per image": Files(folders["npy"], *codes),
                "code store, mapped": Ours(folders["ours"], *codes),
                "code store, in memory": Ours(folders["ours"], *codes, resident=True),
            }
            sizes = {name: prepare(c, truth, written=name == "code store, in memory") for name, c in contenders.items()}
            times = time_reads(contenders, args.images)
            # Ratios compare each contender with the first row.
            base = next(iter(contenders))
            for name, (seconds, size) in sizes.items():
                line = f"{name:<28}{seconds:>10.2f}{times[name]:>12.0f}{size / 1e6:>9.1f}"
                print(f"{line}{times[base] / times[name]:>8.1f}×{size / sizes[base][1]:>8.2f}", flush=True)
            seconds, size = min(checking_seconds(folders["ours"]) for _ in range(ROUNDS)), sizes["code store, mapped"][1]
            print(f"checking the code store, once for each process: {seconds:.2f} s, {size / seconds / 1e9:.1f} GB/s\n")


if __name__ == "__main__":
    main()
