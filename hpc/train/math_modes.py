"""Arithmetic modes of a GPU, set once for every stage."""

import torch


def allow_tf32(device: torch.device) -> None:
    """On a GPU, lets fp32 matrix products and convolutions use TF32, and cuDNN choose its fastest kernels.

    TF32 rounds the inputs of a product to 10 bits of mantissa. Tensor cores then compute it several times faster. Codebook
    search and losses do not depend on more digits; the master weights and all sums stay fp32.

    Args:
        device: The device that this process computes on.
    """
    if device.type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True  # batches of a stage have one size, so each kernel is chosen once
