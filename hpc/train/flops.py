"""Floating-point operations of a model, and its model FLOPs utilisation (MFU; arXiv:2204.02311, appendix B).

A multiply-add counts as two operations. Task classes count the operations of one sample; the training loop logs the speed.
"""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from hpc.train.hardware import known_gpu


def training_flops(loss: Callable[[], torch.Tensor]) -> int:
    """Returns the operations of the forward and the backward pass of a training step.

    Causal attention is counted in full, although its mask makes half of it unnecessary.

    Args:
        loss: Runs the forward pass, best on the meta device, where it computes nothing. Activation checkpointing is to be off:
            what it computes again would be counted again.
    """
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def peak_flops(device: torch.device) -> float | None:
    """Returns the peak operations per second of one device in bf16, or None if nothing is known of the device."""
    known = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known[0] if known else None


def throughput(task: object, rate: float, world: int, device: torch.device) -> dict[str, float]:
    """Returns the training speed over all ranks, as metrics for the log.

    Args:
        task: The training task. Its attributes tokens_per_sample and flops_per_sample are optional.
        rate: Samples per second over all ranks.
        world: Number of ranks.
        device: The device of each rank.

    Returns:
        "tokens_per_second" if the task has tokens_per_sample; "model_flops_per_second" if the task has flops_per_sample;
        "mfu", the share of the devices' peak, if that peak is known too.
    """
    metrics = {}
    if tokens := getattr(task, "tokens_per_sample", None):
        metrics["tokens_per_second"] = rate * tokens
    if flops := getattr(task, "flops_per_sample", None):
        metrics["model_flops_per_second"] = rate * flops
        if peak := peak_flops(device):
            metrics["mfu"] = rate * flops / (world * peak)
    return metrics
