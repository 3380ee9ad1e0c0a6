"""The code store beside LMDB of pickles, as rosinality/vq-vae-2-pytorch writes and reads it, and one .npy for each image.

    pip install --target /tmp/lmdb lmdb        (no dependency of the project)
    PYTHONPATH=/tmp/lmdb python -m benchmarks.codestore

10,015 images of two grids, K = 512: write all, read batches of 32 random rows as int64 tensors, size on disk. Warm page cache;
the best of ten rounds. Without lmdb its row is left out.
"""

import argparse
import pickle
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

from hpc.data import manifest
from hpc.data.codestore import CodeStore, code_dtype, write_codes
from hpc.data.rows import CodeRows

try:
    import lmdb
except ImportError:
    lmdb = None

K, BATCH, BATCHES, ROUNDS, SHARD = 512, 32, 200, 10, 1000
CodeRow = namedtuple("CodeRow", ["top", "bottom", "filename"])


class Ours:
    """Shards of 1,000 images with labels and the other columns; draw 0 only."""

    def __init__(self, folder: Path, top: np.ndarray, bottom: np.ndarray, resident: bool = False):
        self.folder, self.resident = folder, resident
        self.codes = {"codes.top": top, "codes.bottom": bottom}

    def write(self) -> None:
        number, entries = len(self.codes["codes.top"]), []
        for shard, first in enumerate(range(0, number, SHARD)):
            part = {c: v[first : first + SHARD].astype(code_dtype(K)) for c, v in self.codes.items()}
            count = len(part["codes.top"])
            part |= {c: np.zeros(count, np.int16) for c in ("label", "site", "sex", "age_band", "licence")}
            write_codes(self.folder, "train", 0, shard, part | {"index": np.arange(count)})
            path = self.folder / f"train-00-{shard:06d}.safetensors"
            entries.append(manifest.describe(path, split="train", draw=0, shard=shard, count=count))
        manifest.write(self.folder, {"levels": [], "shards": entries})

    def open(self) -> None:
        self.rows = CodeRows(CodeStore(self.folder), "train", [*self.codes, "label"], torch.device("cpu"), self.resident)
        self.places = self.rows.all()

    def read(self, indices: list[int]) -> list[torch.Tensor]:
        found = self.rows.gather_rows(self.places[indices])
        return [found[c] for c in self.codes]


class Pickles:
    """extract_code.py and LMDBDataset of rosinality/vq-vae-2-pytorch: a pickled row of int64 arrays for each image."""

    def __init__(self, folder: Path, top: np.ndarray, bottom: np.ndarray):
        self.folder, self.top, self.bottom = folder, top, bottom

    def write(self) -> None:
        env = lmdb.open(str(self.folder), map_size=2**36)
        with env.begin(write=True) as transaction:
            for i, (top, bottom) in enumerate(zip(self.top, self.bottom, strict=True)):
                row = CodeRow(top, bottom, f"nv/ISIC_{i:07d}.jpg")
                transaction.put(str(i).encode(), pickle.dumps(row))
        env.close()

    def open(self) -> None:
        self.env = lmdb.open(str(self.folder), max_readers=32, readonly=True, lock=False, readahead=False, meminit=False)

    def read(self, indices: list[int]) -> list[torch.Tensor]:
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
        for name, codes in self.codes.items():
            for i, one in enumerate(codes):
                np.save(self.folder / f"{i}-{name}.npy", one)

    def open(self) -> None:
        pass

    def read(self, indices: list[int]) -> list[torch.Tensor]:
        return [torch.from_numpy(np.stack([np.load(self.folder / f"{i}-{name}.npy") for i in indices])) for name in self.codes]


def prepare(contender, written: bool) -> tuple[float, int]:
    """Seconds to write, bytes on disk; opened, and checked to hold the truth."""
    began = time.perf_counter()
    if not written:
        contender.write()
    seconds = time.perf_counter() - began
    contender.open()
    indices = list(range(0, len(next(iter(TRUTH.values()))), 311))
    for found, codes in zip(contender.read(indices), TRUTH.values(), strict=True):
        assert np.array_equal(found.numpy(), codes[indices])
    return seconds, sum(p.stat().st_blocks * 512 for p in contender.folder.iterdir() if p.is_file())


def race(contenders: dict) -> dict[str, float]:
    """Microseconds a batch, the best of some rounds in which all take turns: the machine may be busy."""
    number = len(next(iter(TRUTH.values())))
    draws = np.random.default_rng(0).integers(0, number, (BATCHES, BATCH)).tolist()
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            some = draws[: BATCHES // 10] if isinstance(contender, Files) else draws
            began = time.perf_counter()
            for indices in some:
                contender.read(indices)
            best[name] = min(best[name], (time.perf_counter() - began) / len(some) * 1e6)
    return best


TRUTH: dict[str, np.ndarray] = {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=10_015)
    parser.add_argument("--folder", help="where to write; default: the system's temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for bottom, top in ((16, 8), (64, 32)):
        rng = np.random.default_rng(0)
        TRUTH.update({n: rng.integers(0, K, (args.images, g, g)) for n, g in (("top", top), ("bottom", bottom))})
        print(f"{args.images:,} images, {bottom}² + {top}² codes")
        print(f"{'':<28}{'write, s':>10}{'batch, µs':>12}{'MB':>9}{'reads':>9}{'size':>8}")
        with tempfile.TemporaryDirectory(dir=args.folder) as root:
            places = {name: Path(root) / name for name in ("ours", "lmdb", "npy")}
            for place in places.values():
                place.mkdir()
            codes = tuple(TRUTH.values())
            contenders = {"LMDB of pickles": Pickles(places["lmdb"], *codes)} if lmdb else {}
            contenders |= {
                "one .npy per image": Files(places["npy"], *codes),
                "code store, mapped": Ours(places["ours"], *codes),
            }
            contenders |= {"code store, in memory": Ours(places["ours"], *codes, resident=True)}
            sizes = {name: prepare(c, written=name == "code store, in memory") for name, c in contenders.items()}
            times = race(contenders)
            base = next(iter(contenders))
            for name, (wrote, size) in sizes.items():
                line = f"{name:<28}{wrote:>10.2f}{times[name]:>12.0f}{size / 1e6:>9.1f}"
                print(f"{line}{times[base] / times[name]:>8.1f}×{size / sizes[base][1]:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
