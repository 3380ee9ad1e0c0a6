"""evaluate: samples + real images + trained models → report/.

The stage asks three questions: are the samples like real images, does it help to train with them, and do they reveal training
images? It writes metrics.json, report.html, and a metrics log with pictures, which MLflow follows. docs/report.md describes the
figures. Samples are compared with two sets of real images: the training split, and the held-out images (val and test together).
"""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc import dist
from hpc.config import digest, read_yaml, to_plain
from hpc.data.codestore import CodeStore
from hpc.dist import Topology
from hpc.run import rundir
from hpc.run.metrics_log import MetricsLog, metric_name, read_metrics
from lesiongen.data import images
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.evaluation.fidelity import diversity, fidelity
from lesiongen.evaluation.held_out import evaluate_tokenizer
from lesiongen.evaluation.likeness import likeness
from lesiongen.evaluation.subject import Subject
from lesiongen.experiment import Experiment
from lesiongen.ingest.licences import merge_counts
from lesiongen.priors.export import load_prior
from lesiongen.stages.base import Stage, digest_of, packed, packed_locations, require
from lesiongen.tokenizers.export import load_tokenizer
from lesiongen.tokenizers.tokenizer import Tokenizer

SCHEMA = 2  # of metrics.json; docs/report.md


def stage(config: Experiment) -> Stage:
    """Returns the stage that compares the run's samples with real images."""
    needs = ("shards", "tokenizer", "codes", *(f"prior-{level}" for level in config.levels), "samples")
    identity = {"evaluate": to_plain(config.evaluate, volatile=False), "seed": config.seed}
    return Stage("report", needs, identity, run)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    """Evaluates the run and returns the digest of all metrics. Collective.

    All ranks measure the tokenizer and compute features of real images; rank 0 does the rest.
    """
    shards = packed(config)
    net, about = load_tokenizer(require(config, "tokenizer"), topology.device)
    test = ImageShards(shards, "test")
    if topology.leader:
        print(f"reconstructing {len(test):,} test images")
    quality, pictures = evaluate_tokenizer(net, test, config.evaluate.batch)
    subject = Subject(
        config.evaluate,
        config.seed,
        topology,
        shards,
        packed_locations(config),
        CodeStore(require(config, "codes")),
        net,
        require(config, "samples"),
        config.directory,
    )
    return dist.run_on_leader(_finish, config, folder, subject, about["data"], quality, pictures)


def _finish(
    config: Experiment, folder: Path, subject: Subject, tokenizer_data: dict, quality: dict, pictures: dict[str, bytes]
) -> str:
    """Measures everything and writes the report.

    Args:
        config: The run's config.
        folder: Directory of the report.
        subject: The images and models.
        tokenizer_data: Licences, attributions and sources of the images that the tokenizer was trained on.
        quality: The tokenizer's metrics on the test split.
        pictures: The tokenizer's pictures on the test split (name → PNG).

    Returns:
        The digest of all metrics.
    """
    shards = subject.shards
    metrics: dict = {"schema": SCHEMA, "made": _made(config, subject)}
    # floor_psnr is the PSNR of a tokenizer that gives all pixels one colour.
    floor_psnr = -10 * math.log10(max(shards.moments["data_variance"], 1e-10))
    metrics["tokenizer"] = quality | {"floor_psnr": floor_psnr, "entries": subject.net.entries}
    metrics["priors"] = _prior_metrics(config, subject.net)
    metrics["likeness"] = likeness(subject)
    metrics["classifier"] = fidelity(subject.judged, subject.classes, subject.trained_on)
    metrics["diversity"] = diversity(subject)
    metrics["data"] = _data_metrics(shards, subject) | merge_counts(shards.about, tokenizer_data)
    metrics = _without_nan(metrics)
    return digest(metrics)
