"""evaluate: samples beside real images → report/: metrics.json, report.html, and lines and pictures for MLflow.

Real images stand in two rows beside the samples: the training split, and all that is held out (val and test).
"""

import contextlib
import csv
import json
import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from hpc import dist
from hpc.config import digest, plain, read_yaml
from hpc.data.shards import BadSample
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run.metrics_log import Tracker, metric_name, read_metrics
from hpc.run.progress import bar
from hpc.run.rundir import atomic_write
from lesiongen import report
from lesiongen.data import images
from lesiongen.data.augment import centre
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.experiment import Experiment
from lesiongen.ingest.licences import together
from lesiongen.metrics import classifier, copies
from lesiongen.stages.base import Stage, packed, require
from lesiongen.stages.tokenizer import held_out_figures, load_tokenizer, to_float, to_uint8

PER_CLASS = 200  # held-out images that are reconstructed, and whose features are compared
HELD_OUT = 2_000  # held-out images whose distances set what a copy is
TILES = 8  # pictures of a class in a sheet


def stage(config: Experiment) -> Stage:
    needs = ("shards", "tokenizer", "codes", *(f"prior-{level}" for level in config.levels), "samples")
    identity = {"evaluate": plain(config.evaluate, volatile=False), "seed": config.seed}
    return Stage("report", needs, identity, run, parallel=False)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    """The tokenizer's figures are taken by all ranks, the rest by rank 0. Returns the digest of all figures."""
    net, facts = load_tokenizer(require(config, "tokenizer"), topology.device)
    test = ImageShards(packed(config), "test")
    if topology.leader:
        print(f"reconstructing {len(test):,} test images")
    figures, shown = held_out_figures(net, test, config.evaluate.batch)
    return dist.leader_does(_evaluate, config, folder, net, facts["data"], figures, shown)


class Pictures:
    """Images in memory as thumbnails, 12 kB each, for figures; read again at full size to be shown.

    images: uint8 [N, C, ≤64, ≤64]; labels: int64 [N], -1 for unlabelled.
    """

    def __init__(self, size: int, channels: int, number: int, what: str):
        self.size, side = size, min(size, classifier.SIDE)
        self.images = torch.empty(number, channels, side, side, dtype=torch.uint8)
        self.labels = torch.full((number,), -1)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, bar(number, what) as progress:
            for first in range(0, number, 256):
                rows = range(first, min(first + 256, number))
                raw = [self.raw(i) for i in rows]  # one reader, one thread; decoding is what takes long
                for i, (image, facts) in zip(rows, pool.map(self._thumbnail, raw), strict=True):
                    self.images[i], self.labels[i] = image, self.note(i, facts)
                progress.update(len(rows))

    def _thumbnail(self, raw) -> tuple[torch.Tensor, dict]:
        image, facts = self.decode(raw)
        return classifier.shrink(image), facts

    def full(self, indices) -> torch.Tensor:
        """uint8 [B, C, size, size]."""
        return torch.stack([self.decode(self.raw(int(i)))[0] for i in indices])


class Real(Pictures):
    """Splits of the shards, unaugmented, in their order, whole on this rank."""

    def __init__(self, shards: Packed, names: list[str]):
        self.sets = [ImageShards(shards, name) for name in names]
        self.readers = [s.reader() for s in self.sets]
        self.numbers = {c: i for i, c in enumerate(self.sets[0].classes)}
        self.places = [(k, shard, i) for k, s in enumerate(self.sets) for shard, n in enumerate(s.counts) for i in range(n)]
        self.groups: dict[str, str] = {}  # group: split
        super().__init__(self.sets[0].size, self.sets[0].channels, len(self.places), f"read {' + '.join(names)}")

    def raw(self, i: int) -> tuple[int, dict]:
        k, shard, ordinal = self.places[i]
        with self._sound(k):
            return k, self.readers[k].read(shard, ordinal)

    def decode(self, raw: tuple[int, dict]) -> tuple[torch.Tensor, dict]:
        k, sample = raw
        with self._sound(k):
            image, facts = self.sets[k].image(sample)
        return centre(image, self.size), facts

    @contextlib.contextmanager
    def _sound(self, k: int):
        try:
            yield
        except BadSample as error:
            where = self.sets[k].packed.name
            raise UserError(f"The shards in {where} are damaged: {error}. See `lesiongen verify`.") from None

    def note(self, i: int, facts: dict) -> int:
        group = facts["group"]
        split = self.sets[self.places[i][0]].split
        refuse_shared({group: split}, self.groups)
        self.groups[group] = split
        return self.numbers.get(facts.get("dx", ""), -1)


def refuse_shared(a: dict[str, str], b: dict[str, str]) -> None:
    """Raises UserError for a lesion that is in two splits: no figure on held-out images would mean anything then."""
    for group in a.keys() & b.keys():
        if a[group] != b[group]:
            raise UserError(
                f"Lesion '{group}' is in two splits, {a[group]} and {b[group]}: pack the images again (--fresh shards)."
            )


class Samples(Pictures):
    """What the sample stage wrote, in the order of its table."""

    def __init__(self, folder: Path, classes: list[str], size: int, channels: int):
        self.folder, self.channels = folder, channels
        with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
            self.rows = list(csv.DictReader(file))
        self.numbers = {c: i for i, c in enumerate(classes)}
        super().__init__(size, channels, len(self.rows), "read samples")

    def raw(self, i: int) -> dict:
        return self.rows[i]

    def decode(self, raw: dict) -> tuple[torch.Tensor, dict]:
        try:
            image = images.read(self.folder / raw["file"], self.channels)
        except (OSError, images.BadImage) as error:
            path = self.folder / raw["file"]
            raise UserError(f"{path} cannot be read ({error}). Sample again (--fresh samples).") from None
        return centre(images.to_tensor(image), self.size), raw

    def note(self, i: int, facts: dict) -> int:
        return self.numbers.get(facts["label"], -1)


def _evaluate(config: Experiment, folder: Path, net, about: dict, tokenizer: dict, shown: dict[str, bytes]) -> str:
    shards, device = packed(config), next(net.parameters()).device
    classes = shards.classes
    train = Real(shards, ["train"])
    held_out = Real(shards, [s for s in shards.splits if s != "train"])
    refuse_shared(train.groups, held_out.groups)
    samples = Samples(require(config, "samples"), classes, shards.size, shards.channels)

    # The tokenizer's floor is what it would reach with one colour for every image.
    tokenizer |= {"floor_psnr": -10 * math.log10(max(shards.moments["data_variance"], 1e-10)), "entries": net.config.entries}
    exports = {level: require(config, f"prior-{level}") / "export" / "config.yaml" for level in config.levels}
    uniform = {"uniform_bits": math.log2(net.config.entries)}
    priors = {level: read_yaml(path)["held_out"] | uniform for level, path in exports.items()}
    metrics = {"tokenizer": tokenizer, "priors": priors}
    metrics["fidelity"], metrics["diversity"] = _recognised(config, net, train, held_out, samples, classes)

    with bar(len(train.images), "copies") as progress:
        drawn = torch.randperm(len(held_out.images), generator=torch.Generator().manual_seed(config.seed))[:HELD_OUT]
        queries = torch.cat([samples.images, held_out.images[drawn]])
        found = copies.nearest(queries, train.images, progress, device)
    ours, theirs = found.distance[: len(samples.images)], found.distance[len(samples.images) :]
    below = copies.threshold(theirs)
    metrics["copies"] = copies.copy_rate(ours, below) | {
        "threshold": below,
        "median_distance": float(ours.median()),
        "least_distance": float(ours.min()),
        "held_out": copies.copy_rate(theirs, below)
        | {"median_distance": float(theirs.median()), "least_distance": float(theirs.min())},
    }
    metrics["data"] = _data(shards, samples) | together(shards.about, about)  # a tokenizer of another run has its own
    metrics = _clean(metrics)

    closest = ours.argsort()[:TILES].tolist()
    near = [copies.turn(train.full([found.index[i]]), int(found.form[i])) for i in closest]
    sheets = {c: (_strip(samples, i), _strip(train, i)) for i, c in enumerate(classes)} if classes else {}
    if not any(left is not None for left, _ in sheets.values()):  # nothing was generated under a label
        sheets = {"": (_strip(samples, None), _strip(train, None))}
    stages = {"tokenizer": require(config, "tokenizer"), **{f"prior-{k}": v.parent.parent for k, v in exports.items()}}
    shown = shown | {
        "neighbours": images.png(images.grid(torch.cat([samples.full(closest), *near]), len(closest))),
        "curves": report.curves({name: read_metrics(path) for name, path in stages.items()}),
        "confusion": report.confusion(metrics["fidelity"], classes),
        "distances": report.histogram(ours.tolist(), theirs.tolist(), below),
    }
    shown = {name: png for name, png in shown.items() if png}
    distances = [float(ours[i]) for i in closest]
    page = report.page(config.name, metrics, shown, sheets, distances)

    tracker = Tracker(folder)
    tracker.resume(-1)  # a killed evaluation begins anew
    tracker.log(0, 0, dict(_flat(metrics)))
    for name, png in shown.items():
        tracker.image(name, 0, png)
    for side, name in enumerate(("samples", "training")):
        rows = [pair[side] for pair in sheets.values() if pair[side] is not None]
        if rows:
            tracker.image(name, 0, images.png(torch.cat(rows, 1)))
    tracker.close()
    atomic_write(folder / "metrics.json", json.dumps(metrics, indent=1).encode() + b"\n")
    atomic_write(folder / "report.html", page.encode())
    return digest(metrics)


def _recognised(config, net, train: Real, held_out: Real, samples: Samples, classes: list[str]) -> tuple[dict, dict]:
    """Fidelity and diversity: all by one classifier, over the classes that both samples and held-out images have."""
    common = sorted(set(samples.labels.tolist()) & set(held_out.labels.tolist()) & set(train.labels.tolist()) - {-1})
    reason = None
    if len(set(train.labels.tolist()) - {-1}) < 2:
        reason = "the training images have fewer than two classes, so there is nothing to tell apart"
    elif not common:
        reason = "no class has both samples and held-out images"
    if reason:
        return {"ratio": None, "reason": reason}, {"ratio": None, "reason": reason}
    length, device = config.evaluate.classifier_samples, next(net.parameters()).device
    with bar(length // classifier.BATCH * classifier.BATCH, "classifier") as progress:
        judge = classifier.train_classifier(train.images, train.labels, len(classes), length, config.seed, progress, device)
    some = classifier.at_most(held_out.labels, PER_CLASS)
    rebuilt = _reconstructed(config, net, held_out, some)
    pictures = {"samples": samples.images, "real": held_out.images, "reconstructions": rebuilt}
    labels = {"samples": samples.labels, "real": held_out.labels, "reconstructions": held_out.labels[some]}
    return classifier.compare(judge, pictures, labels, classes, common, PER_CLASS)


@torch.no_grad()
def _reconstructed(config, net, real: Real, indices: torch.Tensor) -> torch.Tensor:
    """Thumbnails of what the tokenizer makes of some images: no sample can be told better than these."""
    device, out = next(net.parameters()).device, []
    with bar(len(indices), "reconstruct") as progress:
        for part in indices.split(config.evaluate.batch):
            out.append(classifier.shrink(to_uint8(net(to_float(real.full(part).to(device)))[0]).cpu()))
            progress.update(len(part))
    return torch.cat(out)


def _strip(pictures: Pictures, label: int | None) -> torch.Tensor | None:
    """The first pictures of a class (None: of all) in one row, uint8 [C, H, W]; blank where there are too few."""
    rows = torch.arange(len(pictures.labels)) if label is None else torch.nonzero(pictures.labels == label).flatten()
    if not len(rows):
        return None
    tiles = classifier.shrink(pictures.full(rows[:TILES]), 128)
    blank = torch.full((TILES - len(tiles), *tiles.shape[1:]), 255, dtype=torch.uint8)
    return images.grid(torch.cat([tiles, blank]), TILES)


def _data(shards: Packed, samples: Samples) -> dict:
    return {
        "size": shards.size,
        "channels": shards.channels,
        "counts": shards.counts,
        "lesions": shards.groups,
        "lesions_in_two_splits": 0,  # refused above
        "rejected": shards.rejected,
        "generated": dict(Counter(row["label"] for row in samples.rows)),
    }


def _clean(value):
    """JSON has no nan: null says as much."""
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(value: dict, prefix: str = ""):
    """Numbers of a nested structure, under names that MLflow takes."""
    for key, item in value.items():
        name = prefix + "/".join(metric_name(part) for part in key.split("/"))
        if isinstance(item, dict):
            yield from _flat(item, f"{name}/")
        elif isinstance(item, (int, float)):
            yield name, float(item)
