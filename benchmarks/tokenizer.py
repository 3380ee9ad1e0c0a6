"""Our VQ-VAE-2 compared with rosinality/vq-vae-2-pytorch: speed of training and encoding, and quality after equal steps.

    git clone https://github.com/rosinality/vq-vae-2-pytorch PEER
    python -m benchmarks.tokenizer speed [--peer PEER] [--size 128] [--batch 16] [--compile] [--precision fp32]
    python -m benchmarks.tokenizer quality --peer PEER --shards SHARDS [--size 64] [--steps 1000]

Both nets have the same architecture: strides 4 and 2, hidden 128, two residual blocks of 32, K = 512, D = 64. Ours runs as
shipped, through DeepSpeed with clipping and codebook statistics. Theirs runs as published, and once more at its best: on a CPU
with our trainers' settings of the allocator, on a GPU with channels-last layout. Both have the same precision and the same
arithmetic modes.

`speed` runs each contender in a process of its own and times all of them in every round. It prints medians of the speeds and
of the ratios within rounds. `quality` trains the nets on the same batches and measures the held-out PSNR of the last weights;
"repaired" is their net with our quantizer instead of theirs.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.resident import reset_peak, status_bytes
from benchmarks.timing import DEVICE, Apart, warm_up
from hpc import dist
from hpc.dist import Topology
from hpc.train import allocator
from hpc.train.engine import Engine, EngineConfig
from hpc.train.math_modes import allow_tf32
from hpc.train.optim import OptimConfig, build_optimizer
from lesiongen.data.augment import AugmentConfig
from lesiongen.data.images import to_float, to_unit
from lesiongen.data.packed import Packed
from lesiongen.data.similarity import psnr
from lesiongen.data.stream import ImageShards
from lesiongen.evaluation.codes import usage_and_perplexity
from lesiongen.tokenizers import make
from lesiongen.tokenizers.losses import LossConfig, ReconstructionLoss
from lesiongen.tokenizers.objective import Objective
from lesiongen.tokenizers.vqvae2 import VQVAE2Config


class Ours:
    """Our net, trained by our engine."""

    def __init__(self, batch: int, lr: float = 3e-4, compiled: bool = False, precision: str = "fp32"):
        torch.manual_seed(0)
        allow_tf32(DEVICE)
        dist.init(Topology())
        self.module = Objective(make(VQVAE2Config(), 3, batch), ReconstructionLoss(LossConfig(), variance=0.05))
        settings = EngineConfig(compile=compiled, precision=precision)
        self.engine = Engine(self.module, build_optimizer(self.module, OptimConfig(lr=lr)), settings, batch)
        self.lr = lr

    def step(self, batch: dict) -> None:
        step = self.engine.step([{k: v.to(DEVICE) for k, v in batch.items()}], self.lr, {"stop": 0})
        self.module.net.update(step.statistics)

    @torch.no_grad()
    def codes(self, image: torch.Tensor) -> list[torch.Tensor]:
        self.module.eval()
        found = list(self.module.net.encode(to_float(image.to(DEVICE))).values())
        self.module.train()
        return found

    @torch.no_grad()
    def paint(self, image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        y, levels = self.module.net(to_float(image.to(DEVICE)))
        return y, [q.codes for q in levels.values()]


class Theirs:
    """Their net, trained as in their train_vqvae.py: Adam, no clipping, latent loss × 0.25."""

    def __init__(
        self,
        peer: Path,
        lr: float = 3e-4,
        compiled: bool = False,
        batch: int = 0,
        precision: str = "fp32",
        channels_last: bool = False,
    ):
        """Builds the net.

        Args:
            peer: Their checkout.
            lr: Learning rate.
            compiled: Whether to use torch.compile.
            batch: If above 0, replace their quantizers by ours, for this global batch size.
            precision: bf16 for autocast.
            channels_last: Whether images and filters are channels-last in memory.
        """
        allow_tf32(DEVICE)
        self.precision = precision
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        sys.path.insert(0, str(peer))
        import vqvae

        torch.manual_seed(0)
        self.net = vqvae.VQVAE().to(DEVICE, memory_format=self.layout)
        self.batch = batch
        if batch:
            self.net.quantize_t, self.net.quantize_b = Repaired(batch).to(DEVICE), Repaired(batch).to(DEVICE)
        self.forward = torch.compile(self.net) if compiled else self.net
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr)

    def step(self, batch: dict) -> None:
        x = to_float(batch["image"].to(DEVICE)).to(memory_format=self.layout)
        for q in self.repaired():
            q.where = (batch["slot"].to(DEVICE), batch["position"].to(DEVICE))
        self.net.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.precision == "bf16"):
            y, latent = self.forward(x)
            loss = F.mse_loss(y.float(), x) + 0.25 * latent.mean()
        loss.backward()
        self.optimizer.step()
        loss.item()  # their loop also reads the loss at each step
        for q in self.repaired():
            q.inner.update(q.seen)
            q.where = (None, None)

    def repaired(self) -> list[nn.Module]:
        """Returns our quantizers in their net, if they replace theirs."""
        return [self.net.quantize_t, self.net.quantize_b] if self.batch else []

    @torch.no_grad()
    def codes(self, image: torch.Tensor) -> list[torch.Tensor]:
        self.net.eval()
        *_, top, bottom = self.net.encode(to_float(image.to(DEVICE)))
        self.net.train()
        return [top, bottom]

    @torch.no_grad()
    def paint(self, image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        self.net.eval()
        x = to_float(image.to(DEVICE))
        *_, top, bottom = self.net.encode(x)
        y, _ = self.net(x)
        self.net.train()
        return y, [top, bottom]


class Repaired(nn.Module):
    """Our quantizer with their interface: [B, H, W, D] → (x, loss, codes).

    Attributes:
        where: slot and position of each sample, which the training step sets before forward().
        seen: Statistics of the last forward(), which the training step passes to update().
    """

    def __init__(self, batch: int):
        super().__init__()
        from lesiongen.tokenizers.quantize import build

        self.inner = build(VQVAE2Config(commitment=1.0), batch)
        self.where, self.seen = (None, None), None

    def forward(self, z_BHWD: torch.Tensor):
        found = self.inner(z_BHWD.movedim(-1, 1), *self.where)
        self.seen = found.statistics
        return found.x.movedim(1, -1), found.loss, found.codes


def random_batch(batch: int, size: int, number: int) -> dict:
    """Returns batch `number` of a sequence of smooth random images of `size` pixels."""
    rng = torch.Generator().manual_seed(number)
    image = torch.rand(batch, 3, size // 8, size // 8, generator=rng)
    image = F.interpolate(image, size=(size, size), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)
    slot = torch.arange(batch)
    return {"image": image, "slot": slot, "position": slot + number * batch}


def contender(make: Callable, size: int, batch: int) -> dict[str, Callable[[], object]]:
    """Builds a net and returns the two functions to time, "step" and "encode"."""
    net, batches = make(), cycle([random_batch(batch, size, i) for i in range(4)])
    return {"step": lambda: net.step(next(batches)), "encode": lambda: net.codes(next(batches)["image"])}


def speed(args: argparse.Namespace) -> None:
    """Prints a table of training and encoding speeds, and the peak memory of both nets."""
    mine = partial(Ours, args.batch, precision=args.precision)
    other = partial(Theirs, args.peer, precision=args.precision)
    kinds = {"ours, eager": (mine, True)}
    if args.peer:
        kinds["theirs, eager"] = (other, False)
        if DEVICE.type == "cpu":
            kinds["theirs, eager, our allocator"] = (other, True)
        else:
            kinds["theirs, eager, channels-last"] = (partial(other, channels_last=True), False)
    if args.compile:
        kinds["ours, compiled"] = partial(mine, compiled=True), True
        if args.peer:
            kinds["theirs, compiled"] = partial(other, compiled=True), False
            kinds["theirs, compiled, channels-last"] = partial(other, compiled=True, channels_last=True), False
    contenders = {name: Apart(partial(contender, make, args.size, args.batch), keep) for name, (make, keep) in kinds.items()}
    warm_up(contenders, "step")
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for kind in ("step", "encode"):
            for name, net in contenders.items():
                found.setdefault((kind, name), []).append(args.batch / net.timed(kind, args.number))
    threads = torch.get_num_threads()
    title = f"{args.size} px, batch {args.batch}, {args.precision}, {args.rounds} rounds of {args.number}"
    print(f"{title}, {threads} threads, {DEVICE}\n")
    peer = "theirs, eager" if args.peer else "ours, eager"
    print(f"| | images/s | ÷ {peer} |\n|---|---|---|")
    for (kind, name), speeds in found.items():
        ratios = [a / b for a, b in zip(speeds, found[kind, peer], strict=True)]
        print(f"| {kind}: {name} | {statistics.median(speeds):.1f} | {statistics.median(ratios):.2f} |")
    if args.compile and args.peer:
        ratios = [a / b for a, b in zip(found["step", "ours, compiled"], found["step", "theirs, compiled"], strict=True)]
        print(f"\nstep, compiled ÷ compiled: {statistics.median(ratios):.2f}")
    for who in ("ours", "theirs") if args.peer and DEVICE.type == "cpu" else ():
        print(f"peak memory of {who}, in a process of its own: {peak(args, who):.0f} MB more than after building the model")


def peak(args: argparse.Namespace, who: str) -> float:
    """Measures in a new process how many MB of resident memory five training steps add at their peak."""
    command = [sys.executable, "-m", "benchmarks.tokenizer", "peak", "--peer", str(args.peer), "--who", who]
    command += ["--size", str(args.size), "--batch", str(args.batch)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_peak(args: argparse.Namespace) -> None:
    """Prints what peak() reads; runs in the new process."""
    if args.who == "ours":
        allocator.keep_freed_memory(DEVICE)
    net = Ours(args.batch) if args.who == "ours" else Theirs(args.peer)
    reset_peak()
    before = status_bytes("VmRSS")
    for i in range(5):
        net.step(random_batch(args.batch, args.size, i))
    print((status_bytes("VmHWM") - before) / 2**20)


def quality(args: argparse.Namespace) -> None:
    """Trains each contender on the same batches and prints a table of held-out metrics."""
    packed = Packed([args.shards])
    data, held_out = ImageShards(packed, "train"), ImageShards(packed, "val")
    contenders = {f"ours, lr {lr:g}": lambda lr=lr: Ours(args.batch, lr) for lr in args.ours_lr}
    contenders |= {f"theirs, lr {lr:g}": lambda lr=lr: Theirs(args.peer, lr) for lr in (3e-4, 1e-4)}
    contenders |= {f"theirs repaired, lr {lr:g}": lambda lr=lr: Theirs(args.peer, lr, batch=args.batch) for lr in (3e-4,)}
    print(f"{packed.size} px, batch {args.batch}, {args.steps} steps, {sum(packed.counts['val'].values())} held-out images\n")
    print("| | PSNR | usage, perplexity top | bottom | minutes |\n|---|---|---|---|---|", flush=True)
    for name, start in contenders.items():
        net, began = start(), time.monotonic()
        batches = data.train(0, args.batch, args.batch, AugmentConfig(), seed=0, workers=1)
        for batch in islice(batches, args.steps):
            net.step({k: batch[k] for k in ("image", "slot", "position")})
        minutes = (time.monotonic() - began) / 60
        values, counts = [], [torch.zeros(512), torch.zeros(512)]
        for batch in held_out.held_out(32):
            y, codes = net.paint(batch["image"])
            values += psnr(to_unit(y), to_unit(to_float(batch["image"].to(DEVICE)))).tolist()
            for count, found in zip(counts, codes, strict=True):
                count += torch.bincount(found.flatten().cpu(), minlength=512)
        levels = [f"{u:.1%}, {p:.0f}" for u, p in map(usage_and_perplexity, counts)]
        print(f"| {name} | {statistics.mean(values):.2f} | {levels[0]} | {levels[1]} | {minutes:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "quality", "peak"], help="speed calls peak by itself, in new processes")
    parser.add_argument("--peer", type=Path, help="a checkout of rosinality/vq-vae-2-pytorch; only `speed` can do without")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="for speed; bf16 is autocast")
    parser.add_argument("--size", type=int, default=128, help="side of the images for speed, in pixels")
    parser.add_argument("--batch", type=int, default=16, help="global batch size")
    parser.add_argument("--number", type=int, default=5, help="calls timed in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also time both nets with torch.compile")
    parser.add_argument("--who", default="ours", help="whose memory `peak` measures: ours or theirs")
    parser.add_argument("--shards", type=Path, help="packed images for quality")
    parser.add_argument("--steps", type=int, default=1000, help="training steps for quality")
    parser.add_argument("--ours-lr", type=float, nargs="+", default=[3e-4], help="learning rates of our net for quality")
    args = parser.parse_args()
    {"speed": speed, "quality": quality, "peak": measure_peak}[args.what](args)


if __name__ == "__main__":
    main()
