"""A short real training on this machine's GPU, of about three minutes; leaves pictures and prints the figures.

    python -m benchmarks.train_real WORK OUT [--images DIR --metadata CSV] [--quick]

The stages are pack, tokenizer, codes, polish, prior and samples; then samples and reconstructions are compared with held-out
images. WORK holds the run. OUT gets a picture of each training, and samples.png. Without --images the lesions are drawn.
"""

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from hpc.data.codestore import CodeStore
from hpc.dist import Topology
from hpc.run.metrics_log import read_metrics
from launch.commands import run_only
from lesiongen import experiment
from lesiongen.evaluation import parts
from lesiongen.evaluation.subject import Subject
from lesiongen.experiment import Experiment
from lesiongen.ingest import phantom
from lesiongen.stages.base import load_decoder, packed, packed_locations, require

STAGES = ("shards", "tokenizer", "codes", "polish", "prior-codes", "samples")
PICTURES = {
    "tokenizer": "images/reconstructions-*.png",
    "polish": "images/reconstructions-*.png",
    "prior-codes": "images/bits-*.png",
    "samples": "contact.png",
}


def settings(runs: Path, images: str, metadata: str, quick: bool) -> dict:
    """Returns the config of the run: 128 px, one grid of 16², K = 1,024, a GPT of 8 × 512; tiny if `quick`."""
    bf16 = {"precision": "bf16" if torch.cuda.is_available() else "fp32"}
    lengths = {"tokenizer": 64_000, "polish": 32_000, "prior": 72_000}
    hidden, width, layers, heads, batch = 256, 512, 8, 8, 128
    if quick:
        lengths = dict.fromkeys(lengths, 320)
        hidden, width, layers, heads, batch = 16, 32, 1, 2, 16

    def train(stage: str, lr: float, schedule: str, **optim: float) -> dict:
        samples = lengths[stage]
        every = {"log_every": samples // 10, "eval_every": samples // 2, "save_every": samples}
        rate = {"lr": lr, "schedule": schedule, "warmup": samples // 20}
        engine = bf16 | ({"average": samples // 16} if stage == "polish" else {})
        return {"samples": samples, "batch": batch, **every, "optim": rate | optim, "engine": engine}

    model = {"kind": "vqvae", "stride": 8, "hidden": hidden, "residual_layers": 3, "residual_hidden": hidden // 2, "dim": 64}
    prior = {"layers": layers, "heads": heads, "width": width, "dropout": 0.1, "token_dropout": 0.05, "modulate": True}
    return {
        "name": "real",
        "runs": str(runs),
        "data": {
            "images": images,
            "metadata": metadata,
            "size": 32 if quick else 128,
            "max_rejected": 1.0,
            "workers": 1 if quick else 8,
            "augment_on": "device",
        },
        "tokenizer": {
            "model": model | {"entries": 64 if quick else 1024},
            "loss": {"ssim": 0.1},
            "augment": {"crop": 0.8},
            "train": train("tokenizer", 6e-4, "trapezoid"),
        },
        "encode": {"draws": 2 if quick else 4, "augment": {"crop": 0.85}},
        "polish": {"train": train("polish", 8e-4, "trapezoid")},
        "priors": {
            "codes": {"model": prior, "stream": {"balance": 0.5}, "train": train("prior", 1e-3, "cosine", weight_decay=0.1)}
        },
        "sample": dict.fromkeys(("number", "batch"), 14 if quick else 504),
        "evaluate": {"batch": 32, "classifier_samples": 320 if quick else 6_000},
    }


def distances(config: Experiment) -> Iterator[str]:
    """Yields lines of a table: the distance of reconstructions and of samples to held-out images, by each ruler."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, _ = load_decoder(config, device)
    places = packed_locations(config), CodeStore(require(config, "codes")), net, require(config, "samples"), config.directory
    subject = Subject(config.evaluate, config.seed, Topology(), packed(config), *places)
    yield "| ruler | what | KID × 1000 | precision | recall | coverage |\n|---|---|---|---|---|---|"
    names = {"floor": "other real images", "tokenizer": "reconstructions", "both": "samples"}
    for ruler, found in parts.likeness_part(subject)["rulers"].items():
        for comparison, what in names.items():
            figures = [found["all"][comparison][key]["value"] for key in ("kid", "precision", "recall", "coverage")]
            yield f"| {ruler} | {what} | " + " | ".join("–" if f is None else f"{f:.2f}" for f in figures) + " |"


def main() -> int:
    """Parses the command line, trains, prints. Returns the exit code of the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images")
    parser.add_argument("--metadata")
    parser.add_argument("--quick", action="store_true", help="tiny, to check that everything runs")
    arguments = parser.parse_args()
    images, metadata = arguments.images, arguments.metadata
    if not images:
        drawn = arguments.work / "drawn"
        phantom.write(
            drawn, lesions_per_class=12 if arguments.quick else 150, size=48 if arguments.quick else 144, progress=False
        )
        images, metadata = str(drawn / "images"), str(drawn / "metadata.csv")
    config = experiment.make(settings(arguments.work, images, metadata, arguments.quick))
    print("| stage | seconds | held-out |\n|---|---|---|")
    for name in STAGES:
        began = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):  # packing prints its tables
            code = run_only(config, [name], [])
        if code:
            return code
        values = {k: v for row in read_metrics(config.directory / name) for k, v in row.items() if k.startswith("val/")}
        held_out = ", ".join(f"{k[4:]} {values[k]:.3f}" for k in ("val/psnr", "val/ssim", "val/bits_per_token") if k in values)
        print(f"| {name} | {time.perf_counter() - began:.1f} | {held_out} |", flush=True)
        if name in PICTURES:
            newest = sorted((config.directory / name).glob(PICTURES[name]))[-1]
            shutil.copy(newest, arguments.out / f"{name}.png")
    for line in distances(config):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
