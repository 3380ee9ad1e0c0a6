"""Memory that a training step takes, without taking it: the step runs on tensors that have shapes but no storage."""

import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it, each storage once, until they are freed; `peak` is the most at a time."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        if function is torch.ops.aten.bincount.default:  # its length depends on values, which are not there: the least
            out = args[0].new_empty((kwargs or {}).get("minlength", 0))
        else:
            out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            # A view of something older takes no memory.
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in given:
                self._note(storage)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.bytes -= size


def peak_activations(make: Callable[[], tuple[nn.Module, dict]], bf16: bool = False) -> int:
    """Bytes beside weights and gradients at the worst moment of a forward and backward pass over one micro-batch.

    make() → the module in training mode, whose forward gives {"loss": …}, and a batch. Everything counts that a step holds:
    what autograd keeps, what checkpointing computes again, the loss's own tensors, under autocast the weights' copies."""
    with FakeTensorMode(allow_non_fake_inputs=True):  # a loss may hold a frozen network that was read from a file
        module, batch = make()
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # counted elsewhere
        with LiveBytes() as alive:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = module(batch)["loss"]
            loss.backward()
    return alive.peak
