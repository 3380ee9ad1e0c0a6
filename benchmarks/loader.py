"""Packing and the training stream beside stock webdataset, ImageFolder, mosaicml-streaming, and the bare decoder.

    python -m benchmarks.loader --images DIR --metadata CSV [--limit 2000] [--size 128]

Prints one Markdown table. All streams read the same packed JPEGs, make batches of 64 of `size` pixels, and run one after
another in every round; a number is the median over the rounds. A stream starts before its clock does: workers are up and a
tenth of the images has come when it begins, so prefetched batches do not count for it. CPU seconds are user and system
time of this process and its workers. The mosaicml-streaming row needs that package, which wants another numpy: take a
virtual environment of its own.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import psutil
import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lesiongen.data import images
from lesiongen.data.augment import AugmentConfig, augment
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards, batch_of
from lesiongen.experiment import DataConfig
from lesiongen.ingest.packing import pack

BATCH = 64
CONFIG = AugmentConfig()  # random resized crop and one of 8 symmetries


def view(content: bytes, size: int) -> torch.Tensor:
    return augment(images.pixels(content), size, CONFIG, torch.Generator().manual_seed(0))


def decoded(raw: dict, size: int) -> dict:
    """A sample of stock webdataset or of an MDS: what ours come with, short of position, shard and checksum."""
    facts = json.loads(raw["json"])
    return {"key": raw.get("__key__", ""), "image": view(raw["jpg"], size), "label": 0, "facts": facts}


def stacked(samples: list[dict]) -> dict:
    numbers = dict.fromkeys(("position", "slot", "shard", "ordinal"), 0)
    return batch_of([s | numbers | {"bad": []} for s in samples])


class Loop(IterableDataset):
    """What no loader can beat: contents in memory, in one plain loop, and no batches made of the results."""

    def __init__(self, contents: list[bytes], make: Callable):
        self.contents, self.make = contents, make

    def __iter__(self) -> Iterator:
        each = map(self.make, cycle(self.contents))
        while True:
            yield {"image": list(islice(each, BATCH))}


def ours(shards: Path, workers: int) -> Iterator:
    return ImageShards(Packed([shards]), "train").train(0, BATCH, BATCH, CONFIG, seed=0, workers=workers)


def stock(shards: Path, size: int, workers: int) -> Iterator:
    urls = [str(p) for p in sorted(shards.glob("train-*.tar"))]
    data = wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=wds.split_by_node).repeat().shuffle(1000)
    return _loader(data.map(partial(decoded, size=size)).batched(BATCH, collation_fn=stacked), workers)


def folder(root: Path, size: int, workers: int) -> Iterator:
    """As its users write it, on PIL images."""
    steps = [v2.RandomResizedCrop(size, scale=(CONFIG.crop**2, 1), ratio=(1, 1)), v2.RandomHorizontalFlip()]
    steps += [v2.RandomVerticalFlip(), v2.RandomChoice([v2.Identity(), v2.RandomRotation((90, 90))]), v2.PILToTensor()]
    data = ImageFolder(root, v2.Compose(steps))
    extra = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
    batches = DataLoader(data, BATCH, shuffle=True, num_workers=workers, drop_last=True, **extra)
    return ({"image": x} for _ in cycle([0]) for x, _ in batches)


def mosaic(root: Path, size: int, workers: int) -> Iterator:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    data = _Mapped(StreamingDataset(local=str(root), shuffle=True, batch_size=BATCH), size)
    extra = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
    batches = DataLoader(data, BATCH, num_workers=workers, collate_fn=stacked, drop_last=True, **extra)
    return (batch for _ in cycle([0]) for batch in batches)


class _Mapped(IterableDataset):
    def __init__(self, data, size: int):
        self.data, self.size = data, size

    def __iter__(self) -> Iterator[dict]:
        return (decoded(raw, self.size) for raw in self.data)

    def __len__(self) -> int:
        return len(self.data)


def _loader(data, workers: int) -> Iterator:
    extra = {"prefetch_factor": 4} if workers else {}
    return iter(wds.WebLoader(data, batch_size=None, num_workers=workers, **extra))


def cpu() -> float:
    """User and system seconds of this process and those it has started, running or ended."""
    me = psutil.Process()
    own = me.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in me.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return total


def measure(make: Callable[[], Iterator], number: int) -> tuple[float, float]:
    """Images per second, CPU seconds per image; over `number` images, after a tenth as many."""
    batches = make()
    for _ in range(max(8, number // 10 // BATCH)):
        batch = next(batches)
    assert len(batch["image"]) == BATCH and batch["image"][0].dtype == torch.uint8
    count = -(-number // BATCH)
    used, began = cpu(), time.perf_counter()
    for _ in range(count):
        next(batches)
    wall, used = time.perf_counter() - began, cpu() - used
    del batches  # ends its workers
    return count * BATCH / wall, used / (count * BATCH)


def packing(data: DataConfig, where: Path) -> tuple[float, float]:
    used, began = cpu(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        pack(data, where)
    wall, used = time.perf_counter() - began, cpu() - used
    number = sum(s["count"] for s in Packed([where]).manifests[0]["shards"])
    return number / wall, used / number


def prepare(args, work: Path) -> tuple[DataConfig, list[dict]]:
    """Packs a subset of the images, and writes the same JPEG bytes as class folders and as MDS."""
    (work / "images").mkdir()
    chosen = sorted(p for p in Path(args.images).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[: args.limit]
    for path in chosen:
        (work / "images" / path.name).symlink_to(path.resolve())
    table = Path(args.metadata).read_text(encoding="utf-8").splitlines()
    names = {p.stem for p in chosen}
    kept = [line for line in table[1:] if names.intersection(line.split(","))]
    (work / "metadata.csv").write_text("\n".join([table[0], *kept]) + "\n", encoding="utf-8")
    data = DataConfig(str(work / "images"), str(work / "metadata.csv"), size=args.size, shard_samples=250, max_rejected=1.0)
    packing(data, work / "shards")
    samples = []
    for shard in sorted((work / "shards").glob("train-*.tar")):
        samples += wds.WebDataset(str(shard), shardshuffle=False)
    for s in samples:
        path = work / "folders" / (json.loads(s["json"]).get("dx") or "none") / f"{s['__key__']}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(s["jpg"])
    with contextlib.suppress(ImportError):
        from streaming import MDSWriter

        with MDSWriter(out=str(work / "mds"), columns={"jpg": "bytes", "json": "bytes"}) as writer:
            for s in samples:
                writer.write({k: s[k] for k in ("jpg", "json")})
    return data, samples


def compare(args, work: Path) -> None:
    data, samples = prepare(args, work)
    contents = [s["jpg"] for s in samples]
    size, shards, has_mosaic = args.size, work / "shards", (work / "mds").exists()
    contenders: dict[tuple[str, int], Callable[[], Iterator]] = {}
    contenders["bare JPEG decode", 0] = partial(iter, Loop(contents, images.pixels))
    contenders["bare decode + augment", 0] = partial(iter, Loop(contents, partial(view, size=size)))
    for workers in args.workers:
        contenders["this project", workers] = partial(ours, shards, workers)
        contenders["stock webdataset", workers] = partial(stock, shards, size, workers)
        contenders["ImageFolder", workers] = partial(folder, work / "folders", size, workers)
        if has_mosaic:
            contenders["mosaicml-streaming", workers] = partial(mosaic, work / "mds", size, workers)
    found: dict[tuple[str, int], list] = {key: [] for key in contenders}
    packed = []
    for number in range(args.rounds):
        for key, make in contenders.items():
            found[key].append(measure(make, args.number))
        packed.append(packing(data, work / f"again-{number}"))

    def ratio(mine: tuple[str, int], other: tuple[str, int]) -> str:
        """Medians of same-round ratios: what slows the machine slows both."""
        return f"{statistics.median(a[0] / b[0] for a, b in zip(found[mine], found[other], strict=True)):.2f}"

    def row(what: str, workers: str, values: list, *ratios: str) -> None:
        speed, cost = (statistics.median(v[i] for v in values) for i in (0, 1))
        print(f"| {what} | {workers} | {speed:,.0f} | {cost * 1e3:.2f} |", " | ".join(ratios), "|")

    print(f"{len(contents):,} images of {size} px, batches of {BATCH}, {os.cpu_count()} cores, {args.rounds} rounds\n")
    print("| | workers | images/s | CPU ms/image | this project ÷ it | it ÷ bare decode + augment |\n|---|---|---|---|---|---|")
    row("pack", str(data.processes or "auto"), packed, "", "")
    for name, workers in contenders:
        against = ratio(("this project", workers), (name, workers)) if ("this project", workers) in found else ""
        row(name, str(workers), found[name, workers], against, ratio((name, workers), ("bare decode + augment", 0)))
    if not has_mosaic:
        print("| mosaicml-streaming | | not installed | | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True)
    parser.add_argument("--metadata", required=True)
    parser.add_argument("--limit", type=int, default=2000, help="images to pack")
    parser.add_argument("--number", type=int, default=4000, help="images to time in each stream and round")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in every worker
    with tempfile.TemporaryDirectory() as work:
        compare(args, Path(work))


if __name__ == "__main__":
    main()
