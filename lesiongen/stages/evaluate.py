"""evaluate: samples + real images + trained models → report/.

The stage asks three questions: are the samples like real images, does it help to train with them, and do they reveal training
images? It writes metrics.json, report.html, share.html (the report without real images), private/neighbours.csv, and a metrics
log with pictures, which MLflow follows. docs/report.md describes the figures. Samples are compared with two sets of real
images: the training split, and the held-out images (val and test together).
"""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hpc import dist
from hpc.config import digest, read_yaml, to_plain
from hpc.data.codestore import CodeStore
from hpc.dist import Topology
from hpc.run import rundir
from hpc.run.metrics_log import MetricsLog, metric_name, read_metrics
from hpc.run.rundir import atomic_write
from lesiongen.data import images
from lesiongen.data.stream import ImageShards
from lesiongen.evaluation import parts, plots
from lesiongen.evaluation.backbone import check_backbone
from lesiongen.evaluation.fidelity import fidelity
from lesiongen.evaluation.held_out import evaluate_tokenizer
from lesiongen.evaluation.privacy.candidates import PRIVATE_FOLDER, Candidates
from lesiongen.evaluation.privacy.copies import Copies, write_neighbours
from lesiongen.evaluation.privacy.views import training_views
from lesiongen.evaluation.report import charts
from lesiongen.evaluation.report.page import page
from lesiongen.evaluation.report.pictures import nearest_pairs, strips
from lesiongen.evaluation.report.verdict import headline, in_lines, in_markdown, verdict
from lesiongen.evaluation.subject import Subject
from lesiongen.experiment import Experiment, SampleConfig
from lesiongen.ingest.licences import merge_counts
from lesiongen.priors.code_sampler import CodeSampler
from lesiongen.stages.base import (
    Stage,
    check_codes,
    decoder_stage,
    digest_of,
    load_decoder,
    load_priors,
    model_stages,
    packed,
    packed_locations,
    require,
)
from lesiongen.tokenizers.export import load_tokenizer
from lesiongen.tokenizers.tokenizer import Tokenizer

SCHEMA = 2  # of metrics.json


def stage(config: Experiment) -> Stage:
    """Returns the stage that compares the run's samples with real images."""
    identity = {"evaluate": to_plain(config.evaluate, volatile=False), "seed": config.seed}
    return Stage("report", _inputs(config), identity, run, check=lambda config: check_backbone(config.evaluate.features))


def _inputs(config: Experiment) -> tuple[str, ...]:
    """Returns the names of the artefacts that the stage reads."""
    return tuple(dict.fromkeys(("shards", "tokenizer", "codes", *model_stages(config), "samples")))


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    """Evaluates the run and returns the digest of all figures. Collective.

    All ranks compute features of real images and of training views, search for copies and measure the tokenizer; rank 0 does
    the rest.
    """
    shards, store, samples = packed(config), CodeStore(require(config, "codes")), require(config, "samples")
    # Refuse what cannot be evaluated before the long work begins. Subject loads the networks before it computes features.
    dist.run_on_leader(check_codes, config, store)
    dist.run_on_leader(Candidates(samples).check)
    net, about = load_decoder(config, topology.device)
    before = None
    if decoder_stage(config) == "polish":
        before, _ = load_tokenizer(require(config, "tokenizer"), topology.device)
    locations, made_by = packed_locations(config), digest_of(config, decoder_stage(config))
    subject = Subject(config.evaluate, config.seed, topology, shards, locations, store, net, samples, config.directory, before)
    views = training_views(config.directory, store, net, made_by, subject.backbone, topology)
    copies = parts.copies_of(subject, views, Candidates(samples))
    test = ImageShards(shards, "test")
    if topology.leader:
        print(f"reconstructing {len(test):,} test images")
    quality, pictures = evaluate_tokenizer(net, test, config.evaluate.batch)
    if before is not None:
        unpolished, _ = evaluate_tokenizer(before, test, config.evaluate.batch)
        quality |= {f"{name}_before_polish": unpolished[name] for name in ("psnr", "ssim", "mse", "nmse")}
    return dist.run_on_leader(_finish, config, folder, subject, copies, about["data"], quality, pictures)


def _finish(
    config: Experiment,
    folder: Path,
    subject: Subject,
    copies: Copies,
    tokenizer_data: dict,
    quality: dict,
    pictures: dict[str, bytes],
) -> str:
    """Measures everything and writes the report.

    Args:
        config: The run's config.
        folder: Directory of the report.
        subject: The images and models.
        copies: The training views that are nearest to the samples.
        tokenizer_data: Licences, attributions and sources of the images that the tokenizer was trained on.
        quality: The tokenizer's metrics on the test split.
        pictures: The tokenizer's pictures on the test split (name → PNG).

    Returns:
        The digest of all figures.
    """
    shards, priors = subject.shards, load_priors(config, subject.device)
    code_sampler = CodeSampler.of(priors, dict.fromkeys(priors, SampleConfig()), subject.device)
    candidates = Candidates(require(config, "samples"))
    # floor_psnr is the PSNR of a tokenizer that gives all pixels one colour.
    floor_psnr = -10 * math.log10(max(shards.moments["data_variance"], 1e-10))
    metrics: dict = {
        "schema": SCHEMA,
        "made": _made(config, subject),
        "tokenizer": quality | {"floor_psnr": floor_psnr, "entries": subject.net.entries},
        "priors": _prior_metrics(config, subject.net),
        "likeness": parts.likeness_part(subject),
        "classifier": fidelity(subject.judged, subject.classes, subject.trained_on)
        | {"about": f"{subject.judge.recipe.name}, images at {subject.judge.recipe.size} px"},
        "diversity": parts.diversity_part(subject),
        "utility": parts.utility_part(subject),
        "privacy": {"copies": copies.metrics(), **parts.audit_parts(subject, code_sampler)},
        "gate": parts.gate_part(subject, candidates),
        "fairness": parts.fairness_part(subject, code_sampler),
        "data": _data_metrics(subject) | merge_counts(shards.about, tokenizer_data),
    }
    metrics = _without_nan(metrics)
    metrics["verdict"] = verdict(metrics)
    pictures |= _pictures(config, metrics, copies)
    _write(config.name, folder, metrics, pictures, subject, copies, candidates)
    print(in_lines(metrics["verdict"]))
    return digest({part: content for part, content in metrics.items() if part != "made"})  # "made" has paths and the date


def _made(config: Experiment, subject: Subject) -> dict:
    """Returns how the samples and the report were made."""
    environment = rundir.environment()
    settings = ("seed", "guidance", "temperature", "top_k", "top_p", "number")
    return {
        "name": config.name,
        "date": time.strftime("%Y-%m-%d"),
        "commit": environment["versions"].get("commit", ""),
        "version": environment["versions"].get("lesiongen", ""),
        "command": f"lesiongen run {config.directory / 'config.yaml'}",
        **{key: getattr(config.sample, key) for key in settings},
        "gate": config.sample.gate is not None,
        "config": to_plain(config),
        "digests": {name: digest_of(config, name) for name in _inputs(config)},
        "backbone": subject.backbone.name,
        "backbone_digest": subject.backbone.digest,
    }


def _prior_metrics(config: Experiment, net: Tokenizer) -> dict[str, dict[str, float]]:
    """Returns the held-out metrics in each prior's export, and the bits per token of a uniform guess."""
    exports = {level: require(config, f"prior-{level}") / "export" / "config.yaml" for level in config.levels}
    uniform = {"uniform_bits": math.log2(net.entries)}
    return {level: read_yaml(path)["held_out"] | uniform for level, path in exports.items()}


def _data_metrics(subject: Subject) -> dict:
    """Returns sizes and counts of the real images and the samples."""
    shards = subject.shards
    return {
        "size": shards.size,
        "channels": shards.channels,
        "counts": shards.counts,
        **shards.group_counts,
        "sets": shards.sets,
        "lesions_in_two_splits": 0,  # Subject has raised if there is one
        "rejected": shards.rejected,
        "generated": dict(Counter(row["label"] for row in subject.samples.rows)),
    }


def _pictures(config: Experiment, metrics: dict, copies: Copies) -> dict[str, bytes]:
    """Draws learning curves, the confusion of classes, and the histogram of each kind of distance. Returns name → PNG."""
    trainings = {name: require(config, name) for name in model_stages(config)}
    drawn = {"curves": plots.curves({name: read_metrics(path) for name, path in trainings.items()})}
    measured = metrics["classifier"]["reason"] is None
    if measured and (confusion := charts.confusion(metrics["classifier"])):
        drawn["confusion"], _ = confusion
    for kind, threshold in copies.thresholds.items():
        sides = copies.samples[kind].closeness.tolist(), copies.held_out[kind].closeness.tolist()
        drawn[f"distances {kind}"] = charts.histogram(*sides, threshold)
    return {name: png for name, png in drawn.items() if png}


def _write(
    name: str,
    folder: Path,
    metrics: dict,
    pictures: dict[str, bytes],
    subject: Subject,
    copies: Copies,
    candidates: Candidates,
) -> None:
    """Writes the metrics log with its pictures and the private table, then metrics.json, and the two pages last."""
    shown = strips(subject.samples, subject.train, subject.classes)
    first = candidates.first_attempts()
    pairs = list(nearest_pairs(copies, first.codes, subject.store, subject.net))
    log = MetricsLog(folder)
    log.resume(-1)  # removes all lines and pictures of a killed evaluation: an evaluation starts from the beginning
    log.log(0, 0, dict(_flatten(metrics)) | {f"headline/{name}": v for name, v in headline(metrics).items()})
    for key, png in pictures.items():
        log.image(metric_name(key.replace(" ", "-")), 0, png)
    for side, key in enumerate(("samples", "training")):
        rows = [pair[side] for pair in shown.values() if pair[side] is not None]
        if rows:
            log.image(key, 0, images.encode_png(torch.cat(rows, 1)))
    if pairs:
        neighbours = torch.stack([*(pair.sample_CHW for pair in pairs), *(pair.real_CHW for pair in pairs)])
        log.image("neighbours", 0, images.encode_png(images.tile_images(neighbours, len(pairs))))
    write_neighbours(folder / PRIVATE_FOLDER / "neighbours.csv", [str(i) for i in first.indices], copies, subject.shards)
    atomic_write(folder / "metrics.json", json.dumps(metrics, indent=1).encode() + b"\n")
    atomic_write(folder / "note.md", in_markdown(metrics["verdict"]).encode())
    atomic_write(folder / "share.html", page(name, metrics, pictures, shown, share=True).encode())
    atomic_write(folder / "report.html", page(name, metrics, pictures, shown, pairs).encode())


def _without_nan(value: Any) -> Any:
    """Replaces non-finite numbers in nested metrics by None, because JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flatten(metrics: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers of nested metrics under names that MLflow accepts, such as "privacy/copies/any/copies".

    Of a figure with an interval, the value has the name of the figure. How the report was made is left out: those are settings.
    """
    for key, item in metrics.items():
        name = prefix + "/".join(metric_name(part) for part in str(key).split("/"))
        if key == "made":
            continue
        if isinstance(item, dict) and {"value", "low", "high"} <= item.keys():
            if item["value"] is not None:
                yield name, float(item["value"])
        elif isinstance(item, dict):
            yield from _flatten(item, f"{name}/")
        elif isinstance(item, (int, float)):
            yield name, float(item)
