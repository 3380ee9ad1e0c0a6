"""The memory of a training: activations measured on a step without data, the rest computed. `lesiongen plan` uses it.

The step runs on fake tensors, which have a shape but no data. Every new storage is counted from its creation until it is
freed. `python -m benchmarks.scale` compares the computed memory of each phase with measured peaks.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpc.train.engine import EngineConfig, communication_sizes

PHASES = ("start", "step", "evaluation", "save", "export")
FLATTENED_BYTES = 2 * 10**9  # DeepSpeed's ZeRO 0 copies gradients of this size into one tensor to sum them over the ranks


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


def peak_activations(make: Callable[[], tuple[nn.Module, dict]], bf16: bool = False, training: bool = True) -> int:
    """Returns the peak memory of one micro-batch, in bytes, without weights and gradients.

    The peak includes the tensors that autograd saves, those that activation checkpointing recomputes, the loss's own
    tensors and, under autocast, the bf16 copies of the weights.

    Args:
        make: Returns a module, whose forward returns {"loss": ...}, and a batch for it.
        bf16: Whether a training step runs under bf16 autocast.
        training: Whether to measure forward and backward of a training step, or a forward pass of an evaluation.
    """
    # A loss may hold real tensors: the weights of a frozen network, loaded from a file.
    with FakeTensorMode(allow_non_fake_inputs=True):
        module, batch = make()
        module.train(training)
        for parameter in module.parameters():
            # Free each weight's gradient at once; the caller counts weights and gradients.
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with LiveBytes() as live, torch.set_grad_enabled(training):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and training, cache_enabled=False):
                loss = module(batch)["loss"]
            if training:
                loss.backward()
    return live.peak


@dataclass(frozen=True)
class ModelSize:
    """What the memory of a training depends on.

    Attributes:
        parameters: Elements of each trainable parameter.
        step_bytes: Peak bytes of the activations of a training step over one micro-batch.
        evaluation_bytes: Peak bytes of the activations of an evaluation of one micro-batch.
    """

    parameters: tuple[int, ...]
    step_bytes: int
    evaluation_bytes: int

    @property
    def weights(self) -> int:
        """Bytes of the fp32 weights."""
        return 4 * sum(self.parameters)

    @property
    def largest(self) -> int:
        """Bytes of the largest parameter."""
        return 4 * max(self.parameters)

    @property
    def bucket(self) -> int:
        """Bytes of one of DeepSpeed's communication buffers."""
        return 4 * communication_sizes(list(self.parameters))["reduce_bucket_size"]


def device_bytes(size: ModelSize, config: EngineConfig, ranks: int, gloo: bool = False) -> dict[str, float]:
    """Computes the largest memory of a rank's device in each phase of a training.

    Follows Rajbhandari et al. 2020 (arXiv:1910.02054, section 3) with fp32 weights: 4 bytes each for a parameter, its gradient
    and Adam's two moments. ZeRO 1 to 3 add the fp32 copy that the optimizer updates. DeepSpeed's buffers are added.

    Args:
        size: The model.
        config: The engine's config: ZeRO stage, averages, offload.
        ranks: Number of ranks.
        gloo: Whether the ranks train on the CPU. Gloo copies all that it gathers and reduces.

    Returns:
        {phase of PHASES: bytes}.
    """
    zero, weights, bucket = config.zero, size.weights, size.bucket
    part = weights / ranks if zero else weights
    moments = 0.0 if config.offload else 2 * part
    master = part if zero and not config.offload else 0.0  # the fp32 copy that the optimizer updates
    average = part if config.average and not config.offload else 0.0
    if zero == 3:
        resident = 2 * part + bucket + master + moments + average  # parameters, gradients, the buffer of gradients
        gathered = 3 * bucket * (1 + gloo)  # two buckets of parameters in use, one on its way
        step = gathered + bucket + size.step_bytes
        start = 2 * part + master + 2 * bucket + average
        evaluation, export = gathered + size.evaluation_bytes, size.largest * (1 + gloo)
    else:
        resident = weights + master + moments + average
        step = {
            0: weights + max(size.step_bytes, min(weights, FLATTENED_BYTES) if ranks > 1 else 0),
            1: weights + 2 * bucket + max(size.step_bytes, 0 if gloo else part),
            2: max(part + 2 * bucket + size.step_bytes, weights if gloo else 2 * part),
        }[zero]
        start = (2 if gloo else 1) * weights if zero else weights + average
        start = max(start, weights + master + average)
        evaluation, export = size.evaluation_bytes, 0
    return {
        "start": start,
        "step": resident + step,
        "evaluation": resident + evaluation,
        "save": resident,
        "export": resident + export,
    }


def host_bytes(size: ModelSize, config: EngineConfig, ranks: int) -> dict[str, float]:
    """Computes the largest main memory that one rank with a GPU needs for the model in each phase.

    Arguments as for device_bytes().

    Returns:
        {phase of PHASES: bytes}, and "resume", while a checkpoint is read.
    """
    zero, weights = config.zero, size.weights
    part = weights / ranks if zero else weights
    offloaded = 3 * part if config.offload else 0.0
    start = {0: weights, 1: 2 * weights, 2: 2 * weights, 3: size.largest}[zero]  # where the model is built
    resume = {0: 3 * weights, 1: weights + 3 * part, 2: weights + 3 * part, 3: 4 * part}[zero]
    save = size.largest if zero == 0 else part  # tensors come from the GPU one at a time, and each part is one tensor
    save += part if config.average else 0
    return {
        "start": offloaded + start,
        "step": offloaded,
        "evaluation": offloaded,
        "save": offloaded + save,
        "export": offloaded + size.largest,
        "resume": offloaded + resume,
    }
