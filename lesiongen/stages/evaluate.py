"""evaluate: samples beside real images → report/: metrics.json, report.html, and lines and pictures for MLflow.

Two sets of real images stand beside the samples: the training split, and all that is held out (val and test).
"""

import json
import math
from collections import Counter
from pathlib import Path

import torch

from hpc import dist
from hpc.config import digest, plain, read_yaml
from hpc.dist import Topology
from hpc.run.metrics_log import MetricsLog, metric_name, read_metrics
from hpc.run.progress import bar
from hpc.run.rundir import atomic_write
from lesiongen.data import images
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.evaluation import classifier, copies, report
from lesiongen.evaluation.fidelity import fidelity_and_diversity
from lesiongen.evaluation.held_out import held_out_figures
from lesiongen.evaluation.pictures import Pictures, Real, Samples, refuse_shared
from lesiongen.experiment import Experiment
from lesiongen.ingest.licences import together
from lesiongen.stages.base import Stage, packed, require
from lesiongen.tokenizers.export import load_tokenizer
from lesiongen.tokenizers.tokenizer import Tokenizer

HELD_OUT = 2_000  # held-out images whose distances to the training images set what a copy is
TILES = 8  # pictures of a class in a sheet

Sheets = dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]  # class: strip of samples, strip of training images


def stage(config: Experiment) -> Stage:
    """The stage that compares the run's samples with real images."""
    needs = ("shards", "tokenizer", "codes", *(f"prior-{level}" for level in config.levels), "samples")
    identity = {"evaluate": plain(config.evaluate, volatile=False), "seed": config.seed}
    return Stage("report", needs, identity, run, parallel=False)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    """All ranks measure the tokenizer, rank 0 does the rest. Returns the digest of all figures. Collective."""
    net, facts = load_tokenizer(require(config, "tokenizer"), topology.device)
    test = ImageShards(packed(config), "test")
    if topology.leader:
        print(f"reconstructing {len(test):,} test images")
    figures, pictures = held_out_figures(net, test, config.evaluate.batch)
    return dist.run_on_leader(_evaluate, config, folder, net, facts["data"], figures, pictures)


def _evaluate(config: Experiment, folder: Path, net: Tokenizer, data: dict, tokenizer: dict, pictures: dict[str, bytes]) -> str:
    """Measures, draws, writes the report. `data`: licences and sources of the tokenizer's own training images."""
    shards = packed(config)
    train = Real(shards, ["train"])
    held_out = Real(shards, [s for s in shards.splits if s != "train"])
    refuse_shared(train.groups, held_out.groups)
    samples = Samples(require(config, "samples"), shards.classes, shards.size, shards.channels)

    # The floor of the tokenizer's PSNR is what one colour for every image would reach.
    tokenizer |= {"floor_psnr": -10 * math.log10(max(shards.moments["data_variance"], 1e-10)), "entries": net.entries}
    metrics = {"tokenizer": tokenizer, "priors": _prior_figures(config, net)}
    own = config.evaluate
    metrics["fidelity"], metrics["diversity"] = fidelity_and_diversity(
        net, train, held_out, samples, shards.classes, own.classifier_samples, own.batch, config.seed
    )
    ours, theirs = _nearest_training_images(net, train, held_out, samples, config.seed)
    below = copies.threshold(theirs.distance)
    metrics["copies"] = _copy_figures(ours.distance, theirs.distance, below)
    metrics["data"] = _data_figures(shards, samples) | together(shards.about, data)
    metrics = _clean(metrics)

    closest = ours.distance.argsort()[:TILES].tolist()
    stages = {name: require(config, name) for name in ("tokenizer", *(f"prior-{level}" for level in config.levels))}
    drawn = {
        "neighbours": _neighbours(ours, closest, train, samples),
        "curves": report.curves({name: read_metrics(path) for name, path in stages.items()}),
        "confusion": report.confusion(metrics["fidelity"], shards.classes),
        "distances": report.histogram(ours.distance.tolist(), theirs.distance.tolist(), below),
    }
    pictures = {name: png for name, png in (pictures | drawn).items() if png}
    sheets = _sheets(samples, train, shards.classes)
    page = report.page(config.name, metrics, pictures, sheets, [float(ours.distance[i]) for i in closest])
    _write(folder, metrics, pictures, sheets, page)
    return digest(metrics)


def _prior_figures(config: Experiment, net: Tokenizer) -> dict[str, dict[str, float]]:
    """Held-out figures of each exported prior, beside the bits of a uniform guess."""
    exports = {level: require(config, f"prior-{level}") / "export" / "config.yaml" for level in config.levels}
    uniform = {"uniform_bits": math.log2(net.entries)}
    return {level: read_yaml(path)["held_out"] | uniform for level, path in exports.items()}


def _nearest_training_images(
    net: Tokenizer, train: Real, held_out: Real, samples: Samples, seed: int
) -> tuple[copies.Nearest, copies.Nearest]:
    """The nearest training image of each sample, and of up to HELD_OUT held-out images."""
    drawn = torch.randperm(len(held_out.images), generator=torch.Generator().manual_seed(seed))[:HELD_OUT]
    queries = torch.cat([samples.images, held_out.images[drawn]])
    with bar(len(train.images), "copies") as progress:
        found = copies.nearest(queries, train.images, progress, next(net.parameters()).device)
    number = len(samples.images)
    parts = (slice(None, number), slice(number, None))
    ours, theirs = (copies.Nearest(found.distance[p], found.index[p], found.form[p]) for p in parts)
    return ours, theirs


def _copy_figures(ours_N: torch.Tensor, theirs_N: torch.Tensor, below: float) -> dict:
    """Copy rate and distances of samples, and beside them those of held-out images."""

    def of(distance_N: torch.Tensor) -> dict:
        distances = {"median_distance": float(distance_N.median()), "least_distance": float(distance_N.min())}
        return copies.copy_rate(distance_N, below) | distances

    return of(ours_N) | {"threshold": below, "held_out": of(theirs_N)}


def _data_figures(shards: Packed, samples: Samples) -> dict:
    return {
        "size": shards.size,
        "channels": shards.channels,
        "counts": shards.counts,
        "lesions": shards.groups,
        "lesions_in_two_splits": 0,  # a lesion in two splits was refused while the images were read
        "rejected": shards.rejected,
        "generated": dict(Counter(row["label"] for row in samples.rows)),
    }


def _neighbours(ours: copies.Nearest, closest: list[int], train: Real, samples: Samples) -> bytes:
    """PNG: the samples nearest to the training images, each above its nearest one, turned to match."""
    near = [copies.apply_symmetry(train.full([ours.index[i]]), int(ours.form[i])) for i in closest]
    return images.png(images.grid(torch.cat([samples.full(closest), *near]), len(closest)))


def _sheets(samples: Samples, train: Real, classes: list[str]) -> Sheets:
    """A strip of samples and one of training images for each class; for all together where no sample has a label."""
    sheets = {c: (_strip(samples, i), _strip(train, i)) for i, c in enumerate(classes)}
    if not any(strip is not None for strip, _ in sheets.values()):
        sheets = {"": (_strip(samples, None), _strip(train, None))}
    return sheets


def _strip(pictures: Pictures, label: int | None) -> torch.Tensor | None:
    """The first pictures of a class (None: of all) in one row, uint8 [C, H, W]; white where there are too few."""
    rows = torch.arange(len(pictures.labels)) if label is None else torch.nonzero(pictures.labels == label).flatten()
    if not len(rows):
        return None
    tiles = classifier.shrink(pictures.full(rows[:TILES]), 128)
    blank = torch.full((TILES - len(tiles), *tiles.shape[1:]), 255, dtype=torch.uint8)
    return images.grid(torch.cat([tiles, blank]), TILES)


def _write(folder: Path, metrics: dict, pictures: dict[str, bytes], sheets: Sheets, page: str) -> None:
    """Writes the metrics log and pictures for MLflow, metrics.json, and the page last."""
    tracker = MetricsLog(folder)
    tracker.resume(-1)  # an evaluation that was killed starts again: its lines and pictures are removed
    tracker.log(0, 0, dict(_flatten(metrics)))
    for name, png in pictures.items():
        tracker.image(name, 0, png)
    for side, name in enumerate(("samples", "training")):
        rows = [pair[side] for pair in sheets.values() if pair[side] is not None]
        if rows:
            tracker.image(name, 0, images.png(torch.cat(rows, 1)))
    tracker.close()
    atomic_write(folder / "metrics.json", json.dumps(metrics, indent=1).encode() + b"\n")
    atomic_write(folder / "report.html", page.encode())


def _clean(value):
    """Replaces non-finite numbers by None, which JSON writes as null; JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flatten(value: dict, prefix: str = ""):
    """Yields the numbers of nested metrics under names that MLflow takes, as in "copies/held_out/rate"."""
    for key, item in value.items():
        name = prefix + "/".join(metric_name(part) for part in key.split("/"))
        if isinstance(item, dict):
            yield from _flatten(item, f"{name}/")
        elif isinstance(item, (int, float)):
            yield name, float(item)
