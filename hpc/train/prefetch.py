"""Moves batches to the training device, on a GPU one batch ahead of training."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


def on_device(batches: Iterable[dict], device: torch.device) -> Iterator[dict]:
    """Yields batches with their tensors on the device.

    On a GPU the next batch is copied on a stream of its own while the current one is trained on. Copies from pinned memory do
    not make the host wait.

    Args:
        batches: Dicts and lists of tensors; other values are passed on as they are.
        device: The device.
    """
    if device.type != "cuda":
        for batch in batches:
            yield _map_tensors(batch, lambda tensor: tensor.to(device))
        return
    copying, ahead = torch.cuda.Stream(device), None

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.device == device else tensor.pin_memory().to(device, non_blocking=True)

    for batch in batches:
        copying.wait_stream(torch.cuda.current_stream(device))  # tensors that are on the device already may still be computed
        with torch.cuda.stream(copying):
            copied = _map_tensors(batch, copy)
        if ahead is not None:
            yield _arrived(*ahead, device)
        ahead = copied, copying.record_event()
    if ahead is not None:
        yield _arrived(*ahead, device)


def _arrived(batch: dict, copied: torch.cuda.Event, device: torch.device) -> dict:
    """Makes the training stream wait for the copy, without making the host wait."""
    training = torch.cuda.current_stream(device)
    training.wait_event(copied)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(training)  # the allocator must not reuse the memory before the training stream has read it
        return tensor

    return _map_tensors(batch, keep)


def _map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Applies a function to every tensor in nested dicts and lists."""
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_tensors(item, function) for item in value]
    return function(value) if isinstance(value, torch.Tensor) else value
