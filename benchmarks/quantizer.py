"""Time and memory of a quantizer alone, compared with the one-hot form of most VQ-VAE code and with vector-quantize-pytorch.

    OMP_NUM_THREADS=1 python -m benchmarks.quantizer [--quick]

Prints a table within three minutes, for a step of forward, backward and update: K = 512 codes of D = 64 dimensions, grids of
32×32, fp32, on the GPU if there is one. Times are medians over rounds. Every round times every contender once, so that a busy
machine slows all of them alike. Memory is the peak growth of a fresh process during a step, on a GPU of the allocator,
without its input. vector-quantize-pytorch is measured where it is installed.
"""

import importlib.util
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.resident import reset_peak, status_bytes
from benchmarks.timing import DEVICE, timed
from lesiongen.tokenizers import quantize
from lesiongen.tokenizers.quantize import QUANTIZERS
from lesiongen.tokenizers.quantizer import QuantizerConfig

GRID, DIM, ENTRIES, DECAY, COMMITMENT = 32, 64, 512, 0.99, 0.25
BATCHES, ROUNDS = (16, 64), 15


class OneHot(nn.Module):
    """The usual way to write a VQ-VAE's quantizer, with four N×K matrices in memory."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codebook", torch.randn(ENTRIES, DIM) * DIM**-0.5)
        self.register_buffer("count", torch.ones(ENTRIES))
        self.register_buffer("total", self.codebook.clone())

    def forward(self, z_BDHW):
        z_BHWD = z_BDHW.permute(0, 2, 3, 1).contiguous()
        flat_ND = z_BHWD.view(-1, DIM)
        distances_NK = flat_ND.square().sum(1, keepdim=True) + self.codebook.square().sum(1) - 2 * flat_ND @ self.codebook.T
        codes_N1 = distances_NK.argmin(1, keepdim=True)
        onehot_NK = flat_ND.new_zeros(len(flat_ND), ENTRIES).scatter_(1, codes_N1, 1)
        q_BHWD = (onehot_NK @ self.codebook).view_as(z_BHWD)
        with torch.no_grad():
            self.count.mul_(DECAY).add_(onehot_NK.sum(0), alpha=1 - DECAY)
            self.total.mul_(DECAY).add_(onehot_NK.T @ flat_ND, alpha=1 - DECAY)
            self.codebook = self.total / (self.count + 1e-5)[:, None]
        loss = COMMITMENT * F.mse_loss(q_BHWD.detach(), z_BHWD)
        p = onehot_NK.mean(0)
        torch.exp(-(p * torch.log(p + 1e-10)).sum())
        return (z_BHWD + (q_BHWD - z_BHWD).detach()).permute(0, 3, 1, 2).contiguous(), loss


def contenders(batch: int) -> dict[str, Callable[[torch.Tensor], None]]:
    """Returns {name: function that does one training step on the vectors it is given}.

    Args:
        batch: Global batch size.
    """

    def ours(kind: str) -> Callable:
        config = QuantizerConfig(quantizer=kind, dim=DIM, entries=ENTRIES, decay=DECAY, commitment=COMMITMENT)
        quantizer, slot = quantize.build(config, batch).to(DEVICE), torch.arange(batch, device=DEVICE)

        def step(z):
            found = quantizer(z, slot, slot)
            (found.x.sum() + found.loss).backward()
            quantizer.update(found.statistics)

        return step

    def theirs(quantizer: nn.Module) -> Callable:
        def step(z):
            x, *_, loss = quantizer(z)
            (x.sum() + loss).backward()

        return step

    found = {"one-hot form": theirs(OneHot().to(DEVICE))}
    if importlib.util.find_spec("vector_quantize_pytorch"):
        from vector_quantize_pytorch import VectorQuantize

        options = {"decay": DECAY, "commitment_weight": COMMITMENT, "accept_image_fmap": True, "rotation_trick": False}
        found["vector-quantize-pytorch"] = theirs(VectorQuantize(DIM, codebook_size=ENTRIES, **options).to(DEVICE))
    return found | {f"ours, {kind}": ours(kind) for kind in QUANTIZERS}


def vectors(batch: int) -> torch.Tensor:
    """Returns random vectors to quantize, [B, D, H, W]."""
    z = torch.randn(batch, DIM, GRID, GRID, generator=torch.Generator().manual_seed(0))
    return z.to(DEVICE).requires_grad_()


def times(batch: int, rounds: int) -> dict[str, float]:
    """Measures the median seconds per step of each contender. The first round is a warm-up and does not count."""
    steps, found, z = contenders(batch), {}, vectors(batch)
    for _ in range(rounds + 1):
        for name, step in steps.items():
            z.grad = None
            found.setdefault(name, []).append(timed(partial(step, z)))
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def peak(name: str, batch: int) -> float:
    """Measures by how many MiB this process grows at its peak in a step.

    A step before it lets the libraries allocate what they allocate only once.
    """
    step, z = contenders(batch)[name], vectors(batch)
    step(z)
    z.grad = None
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        step(z)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    reset_peak()
    before = status_bytes("VmHWM")
    step(z)
    return (status_bytes("VmHWM") - before) / 2**20


def main() -> None:
    """Prints the table."""
    quick = "--quick" in sys.argv
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # in child processes, return freed memory at once
    print(f"{DEVICE}\n\n| vectors | | ms per step | million vectors/s | speed | extra MiB | memory |")
    print("|---|---|---|---|---|---|---|")
    for batch in (2,) if quick else BATCHES:
        taken, extra = times(batch, 1 if quick else ROUNDS), {}
        for name in taken:
            if DEVICE.type == "cuda":
                extra[name] = peak(name, batch)
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                extra[name] = pool.apply(peak, (name, batch))
        slow, large, number = taken["one-hot form"], extra["one-hot form"], batch * GRID**2
        for name, seconds in taken.items():
            rate, times_as_fast, share = number / seconds / 1e6, slow / seconds, extra[name] / large
            row = f"{seconds * 1e3:.1f} | {rate:.2f} | {times_as_fast:.2f}× | {extra[name]:.0f} | {share:.2f}×"
            print(f"| {number:,} | {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
