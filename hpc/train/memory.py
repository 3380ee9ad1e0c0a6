"""The memory of a training step, measured without allocating it.

The step runs on fake tensors, which have a shape but no data. Every new storage is counted from its creation until it is
freed. `lesiongen plan` uses the result.
"""

import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are created inside its context and not yet freed, each storage once.

    Attributes:
        bytes: Bytes alive now.
        peak: The largest value of `bytes` so far.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self._counted = weakref.WeakSet()  # storages

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            # A view shares the storage of an input and needs no memory.
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in inputs:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._counted:
            return
        self._counted.add(storage)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._subtract, storage.nbytes())

    def _subtract(self, size: int) -> None:
        self.bytes -= size


def peak_activations(make: Callable[[], tuple[nn.Module, dict]], bf16: bool = False) -> int:
    """Returns the peak memory of forward and backward over one micro-batch, in bytes, without weights and gradients.

    The peak includes the tensors that autograd saves, those that activation checkpointing recomputes, the loss's own
    tensors and, under autocast, the bf16 copies of the weights.

    Args:
        make: Returns a module in training mode, whose forward returns {"loss": ...}, and a batch for it.
        bf16: Whether the step runs under bf16 autocast.
    """
    # A loss may hold real tensors: the weights of a frozen network, loaded from a file.
    with FakeTensorMode(allow_non_fake_inputs=True):
        module, batch = make()
        for parameter in module.parameters():
            # Free each weight's gradient at once; the caller counts weights and gradients.
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with LiveBytes() as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
                loss = module(batch)["loss"]
            loss.backward()
    return live.peak
