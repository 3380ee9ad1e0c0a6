"""A short real training on this machine's GPU: pack, tokenizer, codes, priors, samples; leaves pictures and prints the figures.

    python -m benchmarks.train_real WORK OUT [--images DIR --metadata CSV] [--quick]

WORK holds the run. OUT gets samples.png, reconstructions.png and bits-*.png. Without --images the lesions are drawn.
"""

import argparse
import contextlib
import shutil
import sys
import time
from pathlib import Path

import torch

from hpc.run.metrics_log import read_metrics
from launch.commands import run_only
from lesiongen import experiment
from lesiongen.ingest import phantom

STAGES = ("shards", "tokenizer", "codes", "prior-top", "prior-bottom", "samples")


def settings(runs: Path, images: str, metadata: str, quick: bool) -> dict:
    """Returns the config of the run; tiny if `quick`."""
    bf16 = {"precision": "bf16" if torch.cuda.is_available() else "fp32"}
    lengths = {"tokenizer": 320, "prior": 320} if quick else {"tokenizer": 64_000, "prior": 96_000}
    hidden, width, layers, batch = (16, 32, 1, 16) if quick else (128, 384, 6, 64)
    every = {
        kind: {"samples": n, "batch": batch, "log_every": n // 10, "eval_every": n // 2, "save_every": n}
        for kind, n in lengths.items()
    }
    prior = {"model": {"layers": layers, "heads": 2 if quick else 6, "width": width}}
    optim = {"lr": 1e-3, "weight_decay": 0.1, "schedule": "cosine", "warmup": lengths["prior"] // 20}
    prior["train"] = every["prior"] | {"optim": optim, "engine": bf16}
    model = {"hidden": hidden, "residual_hidden": hidden // 4, "dim": 32, "entries": 64 if quick else 512}
    optim = {"lr": 6e-4, "schedule": "trapezoid", "warmup": lengths["tokenizer"] // 20}
    return {
        "name": "real",
        "runs": str(runs),
        "data": {
            "images": images,
            "metadata": metadata,
            "size": 32 if quick else 128,
            "max_rejected": 1.0,
            "workers": 1 if quick else 8,
        },
        "tokenizer": {"model": model, "loss": {"ssim": 0.1}, "train": every["tokenizer"] | {"optim": optim, "engine": bf16}},
        "encode": {"draws": 2 if quick else 4},
        "priors": {"top": prior, "bottom": prior},
        "sample": {"number": 14 if quick else 56, "guidance": 2.0, "batch": 14},
        "evaluate": {"batch": 32},
    }


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
    shutil.copy(config.directory / "samples" / "contact.png", arguments.out / "samples.png")
    for stage, picture in (("tokenizer", "reconstructions"), ("prior-top", "bits"), ("prior-bottom", "bits")):
        newest = sorted((config.directory / stage / "images").glob(f"{picture}-*.png"))[-1]
        shutil.copy(newest, arguments.out / f"{stage}-{picture}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
