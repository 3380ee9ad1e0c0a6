"""evaluate: samples + real images + trained models → report/.

The stage writes metrics.json, report.html, and a metrics log with pictures, which MLflow follows. Samples are compared with two
sets of real images: the training split, and the held-out images (val and test together).
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc import dist
from hpc.config import digest, read_yaml, to_plain
from hpc.dist import Topology
from hpc.run.metrics_log import MetricsLog, metric_name, read_metrics
from hpc.run.progress import progress_bar
from hpc.run.rundir import atomic_write
from lesiongen.data import images
from lesiongen.data.augment import dihedral
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.evaluation import classifier, plots, report
from lesiongen.evaluation.fidelity import fidelity_and_diversity
from lesiongen.evaluation.held_out import evaluate_tokenizer
from lesiongen.evaluation.image_sets import ImageSet, RealImages, SampleImages, refuse_shared
from lesiongen.evaluation.intervals import wilson
from lesiongen.evaluation.privacy import copies
from lesiongen.evaluation.privacy.nearest import Nearest, nearest_images
from lesiongen.evaluation.privacy.views import thumbnails
from lesiongen.experiment import Experiment
from lesiongen.ingest.licences import merge_counts
from lesiongen.stages.base import Stage, packed, require
from lesiongen.tokenizers.export import load_tokenizer
from lesiongen.tokenizers.tokenizer import Tokenizer

HELD_OUT = 2_000  # held-out images, at most, whose distances to the training images set the threshold for copies
TILES = 8  # images in a strip, and pairs in the picture of nearest neighbours


def stage(config: Experiment) -> Stage:
    """Returns the stage that compares the run's samples with real images."""
    needs = ("shards", "tokenizer", "codes", *(f"prior-{level}" for level in config.levels), "samples")
    identity = {"evaluate": to_plain(config.evaluate, volatile=False), "seed": config.seed}
    return Stage("report", needs, identity, run, parallel=False)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    """Evaluates the run and returns the digest of all metrics. Collective.

    All ranks measure the tokenizer; rank 0 does the rest.
    """
    net, facts = load_tokenizer(require(config, "tokenizer"), topology.device)
    test = ImageShards(packed(config), "test")
    if topology.leader:
        print(f"reconstructing {len(test):,} test images")
    metrics, pictures = evaluate_tokenizer(net, test, config.evaluate.batch)
    return dist.run_on_leader(_evaluate, config, folder, net, facts["data"], metrics, pictures)


def _evaluate(
    config: Experiment, folder: Path, net: Tokenizer, tokenizer_data: dict, quality: dict, pictures: dict[str, bytes]
) -> str:
    """Measures the samples, collects the metrics of the models, and writes the report.

    Args:
        config: The run's config.
        folder: Directory of the report.
        net: The tokenizer.
        tokenizer_data: Licences, attributions and sources of the images that the tokenizer was trained on.
        quality: The tokenizer's metrics on the test split.
        pictures: The tokenizer's pictures on the test split (name → PNG).

    Returns:
        The digest of all metrics.
    """
    # Read the images.
    shards = packed(config)
    train = RealImages(shards, ["train"])
    held_out = RealImages(shards, [split for split in shards.splits if split != "train"])
    refuse_shared(train.groups, held_out.groups)
    samples = SampleImages(require(config, "samples"), shards.classes, shards.size, shards.channels)

    # Collect the metrics. floor_psnr is the PSNR of a tokenizer that gives all pixels one colour.
    floor_psnr = -10 * math.log10(max(shards.moments["data_variance"], 1e-10))
    metrics = {"tokenizer": quality | {"floor_psnr": floor_psnr, "entries": net.entries}}
    metrics["priors"] = _prior_metrics(config, net)
    length, batch = config.evaluate.classifier_samples, config.evaluate.batch
    metrics["fidelity"], metrics["diversity"] = fidelity_and_diversity(
        net, train, held_out, samples, shards.classes, length, batch, config.seed
    )
    of_samples, of_held_out = _nearest_training_images(train, held_out, samples, config.seed)
    threshold = copies.threshold(of_held_out.distance)
    metrics["copies"] = _copy_metrics(of_samples.distance, of_held_out.distance, threshold)
    metrics["data"] = _data_metrics(shards, samples) | merge_counts(shards.about, tokenizer_data)
    metrics = _without_nan(metrics)

    # Draw the pictures, and write everything.
    closest = of_samples.distance.argsort()[:TILES].tolist()
    trainings = {name: require(config, name) for name in ("tokenizer", *(f"prior-{level}" for level in config.levels))}
    drawn = {
        "neighbours": _neighbours(of_samples, closest, train, samples),
        "curves": plots.curves({name: read_metrics(path) for name, path in trainings.items()}),
        "confusion": plots.confusion(metrics["fidelity"], shards.classes),
        "distances": plots.histogram(of_samples.distance.tolist(), of_held_out.distance.tolist(), threshold),
    }
    pictures = {name: png for name, png in (pictures | drawn).items() if png}
    strips = _strips(samples, train, shards.classes)
    page = report.page(config.name, metrics, pictures, strips, [float(of_samples.distance[i]) for i in closest])
    _write(folder, metrics, pictures, strips, page)
    return digest(metrics)


def _prior_metrics(config: Experiment, net: Tokenizer) -> dict[str, dict[str, float]]:
    """Returns the held-out metrics in each prior's export, and the bits per token of a uniform guess."""
    exports = {level: require(config, f"prior-{level}") / "export" / "config.yaml" for level in config.levels}
    uniform = {"uniform_bits": math.log2(net.entries)}
    return {level: read_yaml(path)["held_out"] | uniform for level, path in exports.items()}


def _nearest_training_images(
    train: RealImages, held_out: RealImages, samples: SampleImages, seed: int
) -> tuple[Nearest, Nearest]:
    """Finds the nearest training image of each sample, and of up to HELD_OUT held-out images."""
    drawn = torch.randperm(len(held_out.images), generator=torch.Generator().manual_seed(seed))[:HELD_OUT]
    queries = torch.cat([samples.images, held_out.images[drawn]])
    with progress_bar(len(train.images), "copies") as progress:
        found = nearest_images(thumbnails(queries), thumbnails(train.images), progress)
    number = len(samples.images)
    return found.select(slice(number)), found.select(slice(number, None))


def _copy_metrics(samples_N: np.ndarray, held_out_N: np.ndarray, threshold: float) -> dict:
    """Returns copy rate and distances of the samples, and below "held_out" those of the held-out images."""

    def measure(distance_N: np.ndarray) -> dict:
        hits, number = int((distance_N < threshold).sum()), len(distance_N)
        low, high = wilson(hits, number)
        rate = {"copies": hits, "number": number, "rate": hits / number, "low": low, "high": high}
        return rate | {"median_distance": float(np.median(distance_N)), "least_distance": float(distance_N.min())}

    return measure(samples_N) | {"threshold": threshold, "held_out": measure(held_out_N)}


def _data_metrics(shards: Packed, samples: SampleImages) -> dict:
    """Returns sizes and counts of the real images and the samples."""
    return {
        "size": shards.size,
        "channels": shards.channels,
        "counts": shards.counts,
        **shards.members,
        "sets": shards.sets,
        "lesions_in_two_splits": 0,  # refuse_shared has raised if there is one
        "rejected": shards.rejected,
        "generated": dict(Counter(row["label"] for row in samples.rows)),
    }


def _neighbours(nearest: Nearest, closest: list[int], train: RealImages, samples: SampleImages) -> bytes:
    """Draws the samples `closest` to the training images as PNG, each above its nearest training image, turned to match."""
    training = [dihedral(train.full([nearest.row[i, 2]]), int(nearest.form[i])) for i in closest]
    return images.encode_png(images.tile_images(torch.cat([samples.full(closest), *training]), len(closest)))


def _strips(samples: SampleImages, train: RealImages, classes: list[str]) -> report.Strips:
    """Returns a strip of samples and one of training images for each class. If no sample has a label, one pair for all."""
    strips = {name: (_strip(samples, label), _strip(train, label)) for label, name in enumerate(classes)}
    if not any(strip is not None for strip, _ in strips.values()):
        strips = {"": (_strip(samples, None), _strip(train, None))}
    return strips


def _strip(image_set: ImageSet, label: int | None) -> torch.Tensor | None:
    """Returns the first images of a class in one row, filled up with white, uint8 [C, H, W]. Label None means all images."""
    labels = image_set.labels
    rows = torch.arange(len(labels)) if label is None else torch.nonzero(labels == label).flatten()
    if not len(rows):
        return None
    tiles = classifier.shrink(image_set.full(rows[:TILES]), 128)
    blank = torch.full((TILES - len(tiles), *tiles.shape[1:]), 255, dtype=torch.uint8)
    return images.tile_images(torch.cat([tiles, blank]), TILES)


def _write(folder: Path, metrics: dict, pictures: dict[str, bytes], strips: report.Strips, page: str) -> None:
    """Writes the metrics log with its pictures, then metrics.json, and report.html last."""
    log = MetricsLog(folder)
    log.resume(-1)  # removes all lines and pictures of a killed evaluation: an evaluation starts from the beginning
    log.log(0, 0, dict(_flatten(metrics)))
    for name, png in pictures.items():
        log.image(name, 0, png)
    for side, name in enumerate(("samples", "training")):
        rows = [pair[side] for pair in strips.values() if pair[side] is not None]
        if rows:
            log.image(name, 0, images.encode_png(torch.cat(rows, 1)))
    atomic_write(folder / "metrics.json", json.dumps(metrics, indent=1).encode() + b"\n")
    atomic_write(folder / "report.html", page.encode())


def _without_nan(value: Any) -> Any:
    """Replaces non-finite numbers in nested metrics by None, because JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flatten(metrics: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers of nested metrics under names that MLflow accepts, such as "copies/held_out/rate"."""
    for key, item in metrics.items():
        name = prefix + "/".join(metric_name(part) for part in key.split("/"))
        if isinstance(item, dict):
            yield from _flatten(item, f"{name}/")
        elif isinstance(item, (int, float)):
            yield name, float(item)
