"""Floating-point operations of a model, and the share of what the hardware could do (MFU: arXiv:2204.02311, appendix B)."""

import re
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense bf16 multiply-adds count as two; vendors' data sheets, without sparsity. The first name that is in the device's counts.
PEAKS = {
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A100": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def training_flops(forward: Callable[[], object]) -> int:
    """Three times the forward pass, which forward() runs, best on the meta device. The backward pass costs twice as much;
    what checkpointing computes again does not count, nor does it count that a causal mask leaves half of attention out."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return 3 * counter.get_total_flops()


def peak_flops(device: torch.device) -> float | None:
    """Of one device in bf16, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def throughput(task, rate: float, world: int, device: torch.device) -> dict[str, float]:
    """Tokens and model FLOPs a second over all ranks, and MFU, from `rate` samples a second; as far as the task says what
    a sample is (tokens_per_sample, flops_per_sample) and the device is known."""
    found = {}
    if tokens := getattr(task, "tokens_per_sample", None):
        found["tokens_per_second"] = rate * tokens
    if flops := getattr(task, "flops_per_sample", None):
        found["model_flops_per_second"] = rate * flops
        if peak := peak_flops(device):
            found["mfu"] = rate * flops / (world * peak)
    return found
