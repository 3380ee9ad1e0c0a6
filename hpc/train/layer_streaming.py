"""Runs a model that is larger than the memory of one device: its weights are copied to the device layer by layer.

The sample stage uses it for priors that do not fit a GPU. Each use of a layer copies its weights again, so this is slow; large
batches use the copies for more samples.
"""

import torch
from torch import nn


def stream_layers(module: nn.Module, device: torch.device, resident_bytes: int) -> nn.Module:
    """Prepares a module on the CPU for running on a device that cannot hold it.

    Layers are the submodules that have parameters of their own. While the budget lasts, layers move to the device for good, in
    the order in which they are defined. Every other layer is copied to the device before its forward pass, and the copy is
    freed after it.

    Args:
        module: The module, on the CPU, for inference only. A layer's parameters may be used in its own forward pass only.
        device: The device that computes.
        resident_bytes: Budget of the layers that stay on the device.

    Returns:
        The same module.
    """
    for layer in module.modules():
        own = dict(layer.named_parameters(recurse=False))
        size = sum(p.numel() * p.element_size() for p in own.values())
        resident_bytes -= size
        for name, buffer in layer.named_buffers(recurse=False):
            layer._buffers[name] = buffer.to(device)
        if own and resident_bytes >= 0:
            for parameter in own.values():
                parameter.data = parameter.data.to(device)
        elif own:
            _copy_when_used(layer, own, device)
    return module


def _copy_when_used(layer: nn.Module, own: dict[str, nn.Parameter], device: torch.device) -> None:
    """Adds hooks that copy a layer's parameters to the device for its forward pass."""
    kept = {name: parameter.data for name, parameter in own.items()}

    def copy_in(*_: object) -> None:
        for name, parameter in own.items():
            parameter.data = kept[name].to(device, non_blocking=True, copy=True)

    def free(*_: object) -> None:
        for name, parameter in own.items():
            parameter.data = kept[name]

    layer.register_forward_pre_hook(copy_in)
    layer.register_forward_hook(free)
