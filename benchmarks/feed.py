"""Whether the data stream feeds the GPU: images a second that the stream delivers, and that a VQ-VAE-2 step consumes.

    python -m benchmarks.feed [--images DIR --metadata CSV] [--number 1500] [--size 256] [--workers N]

The images are packed first; without --images they are drawn. The stream is the project's own: decoding, augmentation, and the
copy to the device one batch ahead. The step is that of configs/gpu/one-256.yaml's tokenizer, in bf16 on a GPU.
"""

import argparse
import contextlib
import io
import os
import tempfile
import time
from itertools import islice
from pathlib import Path

from benchmarks.timing import DEVICE, timed
from hpc import dist
from hpc.dist import Topology
from hpc.train.engine import Engine, EngineConfig
from hpc.train.math_modes import allow_tf32
from hpc.train.optim import OptimConfig, build_optimizer
from hpc.train.prefetch import on_device
from lesiongen.data.augment import AugmentConfig
from lesiongen.data.config import DataConfig
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.ingest import phantom
from lesiongen.ingest.packing import pack
from lesiongen.tokenizers import make
from lesiongen.tokenizers.losses import LossConfig, ReconstructionLoss
from lesiongen.tokenizers.objective import Objective
from lesiongen.tokenizers.vqvae2 import VQVAE2Config

BATCH = 32
AUGMENT = AugmentConfig(crop=0.8, brightness=0.1, contrast=0.1, saturation=0.1)


def packed_images(work: Path, images: str | None, metadata: str | None, size: int, number: int) -> ImageShards:
    """Packs the images, or drawn ones, and returns the training split."""
    if not images:
        phantom.write(work / "drawn", lesions_per_class=max(4, number // 7), size=size, progress=False)
        images, metadata = str(work / "drawn" / "images"), str(work / "drawn" / "metadata.csv")
    pack(DataConfig(images, metadata, size=size, shard_samples=250, max_rejected=1.0), work / "shards")
    return ImageShards(Packed([work / "shards"]), "train")


def engine_of(size: int, batch: int) -> Engine:
    """Builds the tokenizer's engine; small for small images, as in a rehearsal."""
    dist.init(Topology())
    hidden = 256 if size >= 128 else 16
    config = VQVAE2Config(hidden=hidden, residual_hidden=hidden // 4, dim=64, entries=1024 if size >= 128 else 64)
    module = Objective(make(config, 3, batch), ReconstructionLoss(LossConfig(ssim=0.1), variance=0.05))
    precision = "bf16" if DEVICE.type == "cuda" else "fp32"
    return Engine(module, build_optimizer(module, OptimConfig()), EngineConfig(precision=precision), batch)


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of images")
    parser.add_argument("--metadata", help="CSV with the images' labels")
    parser.add_argument("--number", type=int, default=1500, help="images that are read in the measurement")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="data workers")
    arguments = parser.parse_args()
    allow_tf32(DEVICE)
    with tempfile.TemporaryDirectory() as work:
        with contextlib.redirect_stdout(io.StringIO()):  # packing prints its tables
            data = packed_images(Path(work), arguments.images, arguments.metadata, arguments.size, arguments.number)
        batch = min(BATCH, max(1, arguments.number // 4))
        stream = on_device(data.train(0, batch, batch, AUGMENT, 0, arguments.workers), DEVICE)
        first = next(stream)  # also starts the workers
        steps = max(1, arguments.number // batch)
        began = time.perf_counter()
        for _ in islice(stream, steps):
            pass
        delivered = steps * batch / (time.perf_counter() - began)
        engine = engine_of(arguments.size, batch)
        inputs = {name: first[name] for name in ("image", "slot", "position")}
        for _ in range(2):
            engine.step([inputs], 1e-4, {})
        consumed = batch / timed(lambda: engine.step([inputs], 1e-4, {}), 3)
    print(f"{arguments.size} px, batch {batch}, {arguments.workers} data workers, {DEVICE}\n")
    print("| | images/s |\n|---|---|")
    print(f"| stream delivers | {delivered:,.0f} |\n| VQ-VAE-2 step consumes | {consumed:,.0f} |")
    print(f"\ndelivered ÷ consumed: {delivered / consumed:.2f}")


if __name__ == "__main__":
    main()
