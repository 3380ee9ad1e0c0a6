"""Packing and the training stream beside stock webdataset, ImageFolder, mosaicml-streaming, and the bare decoder.

    python -m benchmarks.loader --images DIR --metadata CSV [--limit 2000] [--size 128]

Prints one Markdown table. All streams read the same packed JPEGs and make batches of 64 images of `size` pixels. They run one
after another in every round; each number is the median over the rounds. Before the clock of a stream starts, its workers run
and a tenth of the images has been read, so batches that were prefetched meanwhile do not count. CPU seconds are user and
system time of this process and its workers. The row of mosaicml-streaming needs that package, which requires another version
of numpy; install it in a virtual environment of its own.
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
from lesiongen.data.stream import ImageShards, collate
from lesiongen.experiment import DataConfig
from lesiongen.ingest.packing import pack

BATCH = 64
CONFIG = AugmentConfig()  # random resized crop and one of 8 symmetries


def decode_view(content: bytes, size: int) -> torch.Tensor:
    """Decodes a JPEG and returns an augmented view of size × size pixels."""
    return augment(images.decode_tensor(content), size, CONFIG, torch.Generator().manual_seed(0))


def decode_sample(raw: dict, size: int) -> dict:
    """Decodes a raw sample of stock webdataset or mosaicml-streaming.

    Does the work that this project does for a sample, except for position, shard and checksum.
    """
    facts = json.loads(raw["json"])
    return {"key": raw.get("__key__", ""), "image": decode_view(raw["jpg"], size), "label": 0, "facts": facts}


def collate_other(samples: list[dict]) -> dict:
    """Makes a batch like this project's from samples of other loaders, which lack position, slot, shard and ordinal."""
    numbers = dict.fromkeys(("position", "slot", "shard", "ordinal"), 0)
    return collate([s | numbers | {"bad": []} for s in samples])


class BareLoop(IterableDataset):
    """Decodes images from memory in a plain loop, without collating them: an upper bound for the speed of one process."""

    def __init__(self, contents: list[bytes], decode: Callable[[bytes], torch.Tensor]):
        self.contents, self.decode = contents, decode

    def __iter__(self) -> Iterator[dict]:
        decoded = map(self.decode, cycle(self.contents))
        while True:
            yield {"image": list(islice(decoded, BATCH))}


def ours(shards: Path, workers: int) -> Iterator[dict]:
    """Returns this project's training stream."""
    return ImageShards(Packed([shards]), "train").train(0, BATCH, BATCH, CONFIG, seed=0, workers=workers)


def stock_webdataset(shards: Path, size: int, workers: int) -> Iterator[dict]:
    """Returns the stream of webdataset's own pipeline, with this project's decoding and augmentation."""
    urls = [str(p) for p in sorted(shards.glob("train-*.tar"))]
    data = wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=wds.split_by_node).repeat().shuffle(1000)
    data = data.map(partial(decode_sample, size=size)).batched(BATCH, collation_fn=collate_other)
    extra = {"prefetch_factor": 4} if workers else {}
    return iter(wds.WebLoader(data, batch_size=None, num_workers=workers, **extra))


def image_folder(root: Path, size: int, workers: int) -> Iterator[dict]:
    """Returns the stream of torchvision's ImageFolder, which decodes and augments PIL images."""
    steps = [v2.RandomResizedCrop(size, scale=(CONFIG.crop**2, 1), ratio=(1, 1)), v2.RandomHorizontalFlip()]
    steps += [v2.RandomVerticalFlip(), v2.RandomChoice([v2.Identity(), v2.RandomRotation((90, 90))]), v2.PILToTensor()]
    data = ImageFolder(root, v2.Compose(steps))
    extra = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
    batches = DataLoader(data, BATCH, shuffle=True, num_workers=workers, drop_last=True, **extra)
    return ({"image": x} for _ in cycle([0]) for x, _ in batches)


def mosaicml_streaming(root: Path, size: int, workers: int) -> Iterator[dict]:
    """Returns the stream of mosaicml-streaming's StreamingDataset."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    data = _Decoded(StreamingDataset(local=str(root), shuffle=True, batch_size=BATCH), size)
    extra = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
    batches = DataLoader(data, BATCH, num_workers=workers, collate_fn=collate_other, drop_last=True, **extra)
    return (batch for _ in cycle([0]) for batch in batches)


class _Decoded(IterableDataset):
    """Decodes the samples of a StreamingDataset."""

    def __init__(self, data: IterableDataset, size: int):
        self.data, self.size = data, size

    def __iter__(self) -> Iterator[dict]:
        return (decode_sample(raw, self.size) for raw in self.data)

    def __len__(self) -> int:
        return len(self.data)


def cpu_seconds() -> float:
    """Returns user and system seconds of this process and its child processes, running or ended."""
    process = psutil.Process()
    times = process.cpu_times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return total


def measure_stream(make: Callable[[], Iterator[dict]], number: int) -> tuple[float, float]:
    """Measures one stream over `number` images, after a tenth as many to warm up.

    Args:
        make: Starts the stream.
        number: Images to time, rounded up to whole batches.

    Returns:
        Images per second, and CPU seconds per image.
    """
    batches = make()
    for _ in range(max(8, number // 10 // BATCH)):
        batch = next(batches)
    assert len(batch["image"]) == BATCH and batch["image"][0].dtype == torch.uint8
    count = -(-number // BATCH)
    cpu_began, began = cpu_seconds(), time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu_began
    del batches  # ends the stream's workers
    return count * BATCH / seconds, cpu / (count * BATCH)


def measure_packing(data: DataConfig, folder: Path) -> tuple[float, float]:
    """Packs the images into a new folder and returns images per second, and CPU seconds per image."""
    cpu_began, began = cpu_seconds(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        pack(data, folder)
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu_began
    number = sum(s["count"] for s in Packed([folder]).manifests[0]["shards"])
    return number / seconds, cpu / number


def prepare(args: argparse.Namespace, work: Path) -> tuple[DataConfig, list[dict]]:
    """Packs a subset of the images, and writes the same JPEG bytes as class folders and, if installed, as MDS shards.

    Args:
        args: Arguments of the command line.
        work: Empty folder for all files.

    Returns:
        The config that packs the subset, and the raw samples of the training split.
    """
    # Link the chosen images and write their rows of the metadata.
    (work / "images").mkdir()
    paths = sorted(p for p in Path(args.images).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[: args.limit]
    for path in paths:
        (work / "images" / path.name).symlink_to(path.resolve())
    lines = Path(args.metadata).read_text(encoding="utf-8").splitlines()
    names = {p.stem for p in paths}
    rows = [line for line in lines[1:] if names.intersection(line.split(","))]
    (work / "metadata.csv").write_text("\n".join([lines[0], *rows]) + "\n", encoding="utf-8")
    # Pack them.
    data = DataConfig(str(work / "images"), str(work / "metadata.csv"), size=args.size, shard_samples=250, max_rejected=1.0)
    measure_packing(data, work / "shards")
    samples = []
    for shard in sorted((work / "shards").glob("train-*.tar")):
        samples += wds.WebDataset(str(shard), shardshuffle=False)
    # Write the same bytes for the other loaders.
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


def compare(args: argparse.Namespace, work: Path) -> None:
    """Measures packing and all streams and prints the table.

    Args:
        args: Arguments of the command line.
        work: Empty folder for all files.
    """
    data, samples = prepare(args, work)
    contents = [s["jpg"] for s in samples]
    size, shards, has_mosaic = args.size, work / "shards", (work / "mds").exists()
    # (name, workers) → function that starts the stream
    contenders: dict[tuple[str, int], Callable[[], Iterator[dict]]] = {}
    contenders["bare JPEG decode", 0] = partial(iter, BareLoop(contents, images.decode_tensor))
    contenders["bare decode + augment", 0] = partial(iter, BareLoop(contents, partial(decode_view, size=size)))
    for workers in args.workers:
        contenders["this project", workers] = partial(ours, shards, workers)
        contenders["stock webdataset", workers] = partial(stock_webdataset, shards, size, workers)
        contenders["ImageFolder", workers] = partial(image_folder, work / "folders", size, workers)
        if has_mosaic:
            contenders["mosaicml-streaming", workers] = partial(mosaicml_streaming, work / "mds", size, workers)
    # Measure all in every round.
    results: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in contenders}
    packing = []
    for number in range(args.rounds):
        for key, make in contenders.items():
            results[key].append(measure_stream(make, args.number))
        packing.append(measure_packing(data, work / f"again-{number}"))

    def ratio(key: tuple[str, int], other: tuple[str, int]) -> str:
        """The median ratio of two speeds of the same round. Other work on the machine slows both, so the ratio is steadier."""
        return f"{statistics.median(a[0] / b[0] for a, b in zip(results[key], results[other], strict=True)):.2f}"

    def print_row(name: str, workers: str, values: list[tuple[float, float]], *ratios: str) -> None:
        speed, cpu = (statistics.median(v[i] for v in values) for i in (0, 1))
        print(f"| {name} | {workers} | {speed:,.0f} | {cpu * 1e3:.2f} |", " | ".join(ratios), "|")

    # Print the table.
    print(f"{len(contents):,} images of {size} px, batches of {BATCH}, {os.cpu_count()} cores, {args.rounds} rounds\n")
    print("| | workers | images/s | CPU ms/image | this project ÷ it | it ÷ bare decode + augment |\n|---|---|---|---|---|---|")
    print_row("pack", str(data.processes or "auto"), packing, "", "")
    for name, workers in contenders:
        key, project = (name, workers), ("this project", workers)
        project_ratio = ratio(project, key) if project in results else ""
        print_row(name, str(workers), results[key], project_ratio, ratio(key, ("bare decode + augment", 0)))
    if not has_mosaic:
        print("| mosaicml-streaming | | not installed | | | |")


def main() -> None:
    """Reads the command line and runs the comparison in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="folder of JPEG or PNG images")
    parser.add_argument("--metadata", required=True, help="CSV with a row for each image")
    parser.add_argument("--limit", type=int, default=2000, help="images to pack")
    parser.add_argument("--number", type=int, default=4000, help="images to time in each stream and round")
    parser.add_argument("--size", type=int, default=128, help="side of the packed images and of the views, in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the table shows medians over them")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of data workers to compare")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in every data worker
    with tempfile.TemporaryDirectory() as work:
        compare(args, Path(work))


if __name__ == "__main__":
    main()
