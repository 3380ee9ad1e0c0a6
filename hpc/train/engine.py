"""The DeepSpeed engine: one optimizer step over all ranks, precision, ZeRO, averaged weights.

The training loop calls build(), makes an Engine and calls step(). The model's forward(batch) returns
{"loss": scalar, "metrics": {name: scalar}, "statistics": flat fp32 vector or None}.

Invariant: all ranks accept or skip the same steps. One all-reduce per step, before the optimizer's step, sums the flags, the
metrics and the statistics (codebook counts and sums), so that all ranks decide from the same numbers.
"""

import contextlib
import copy
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hpc import dist
from hpc.config import volatile
from hpc.data.order import batch_share
from hpc.errors import UserError
from hpc.run.rundir import share
from hpc.train.averages import Averages
from hpc.train.optim import SkippableOptimizer
from hpc.train.stragglers import Stopwatch
from hpc.train.zero import Weights, build_divided, gathered, import_deepspeed, shape_of, without_hooks

MAX_BUCKET = 10**8  # elements that are sent at once; larger buffers do not make communication faster
COLLECTED_ELEMENTS = 2**23  # gradients that are checked together: few kernel launches, and 32 MB that are freed late


@dataclass(frozen=True)
class EngineConfig:
    """How a training step runs on the ranks."""

    zero: Literal[0, 1, 2, 3] = volatile(0)  # ZeRO stage
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; parameters stay fp32
    accumulation: int = volatile(1)  # micro-batches per step on each rank
    clip: float = 1.0  # largest gradient norm; 0 = no clipping
    offload: bool = volatile(False)  # keep the optimizer state in CPU memory (ZeRO 1 to 3)
    # Under ZeRO 3, samples are drawn while training only if the fp32 weights take at most this many GiB.
    gather_gib: float = volatile(8.0)
    average: float = 0.0  # half-life of the averaged weights, in samples; evaluation and export use them; 0 = no averaging
    compile: bool = volatile(False)  # compile the model with torch.compile
    channels_last: bool = volatile(True)  # store images and filters channels-last, the fastest layout for convolutions

    def __post_init__(self):
        if self.accumulation < 1 or min(self.clip, self.average, self.gather_gib) < 0:
            raise ValueError("accumulation must be at least 1; clip, average and gather_gib at least 0")
        if self.offload and self.zero == 0:
            raise ValueError("offload needs zero to be 1, 2 or 3")

    def micro_batch(self, batch: int, world: int) -> int:
        """Returns the number of samples in one micro-batch of one rank.

        Args:
            batch: Samples in the global batch.
            world: Number of ranks.

        Raises:
            ValueError: The batch does not divide evenly among ranks and micro-batches.
        """
        if batch % (world * self.accumulation):
            raise ValueError(
                f"the global batch of {batch} does not divide among {world} ranks × {self.accumulation} micro-batches; "
                f"make it a multiple of {world * self.accumulation}"
            )
        return len(batch_share(batch, 0, world)) // self.accumulation


@dataclass(frozen=True)
class Step:
    """The result of one optimizer step, identical on every rank.

    Attributes:
        metrics: Means over the global batch, and "gradient_norm" before clipping, which may still be on the device.
        statistics: The model's statistics, summed over micro-batches and ranks.
        accepted: False if the weights were not updated: a loss or gradient was not finite, or the loss was above its limit.
        flags: The flags given to step(), summed over ranks.
    """

    metrics: dict[str, float | torch.Tensor]
    statistics: torch.Tensor | None
    accepted: bool
    flags: dict[str, float]


class Engine:
    """Trains a model under DeepSpeed. The training loop makes one Engine on each rank and calls it.

    Attributes:
        config: The engine's config.
        optimizer: The optimizer. DeepSpeed calls its step().
        deepspeed: DeepSpeed's engine, which wraps the model and the optimizer.
        module: The model without DeepSpeed's wrapper. Under ZeRO 3 its parameters are partitioned.
        device: The device of the model.
        world_size: Number of ranks.
        micro_batch: Samples in one micro-batch of this rank.
        weights: Where the module's weights are, and how to read them.
        averages: The averaged weights; None if averaging is off.
        forward: The time of this rank's forward passes in training.
    """

    def __init__(
        self, module: nn.Module, optimizer: SkippableOptimizer, config: EngineConfig, batch: int, universal: bool = False
    ):
        """Wraps the model and the optimizer. Collective.

        Args:
            module: The model.
            optimizer: The optimizer of the module's parameters.
            config: The engine's config.
            batch: Samples in the global batch.
            universal: Whether load() will read DeepSpeed's universal format.
        """
        self.world_size = torch.distributed.get_world_size()
        self.micro_batch = config.micro_batch(batch, self.world_size)
        self.config, self.optimizer = config, optimizer
        sizes = communication_sizes([shape_of(p).numel() for p in module.parameters()])
        settings = _deepspeed_config(config, batch, self.micro_batch, universal, sizes)
        self._plain = without_hooks(module)
        if config.precision == "bf16":
            _autocast_forward(module)
        self.deepspeed, *_ = import_deepspeed().initialize(model=module, optimizer=optimizer, config=settings)
        dist.set_group_timeouts()
        self.module = self.deepspeed.module
        self.device = self.deepspeed.device
        # ZeRO 1 to 3 store filters in flat buffers, which have no channels-last layout. So they convert only the images.
        if config.channels_last and config.zero == 0:
            self.module.to(memory_format=torch.channels_last)
        self._place_buffers()
        self._nonfinite = torch.zeros((), device=self.device)  # 0 while all gradients of the step are finite, else NaN
        self._collected: list[torch.Tensor] = []  # gradients that are not yet checked
        self._collected_elements = 0  # their elements
        for parameter in self.module.parameters():
            parameter.register_hook(self._collect_gradient)
        self.weights = Weights(self.module, self.deepspeed.optimizer, config.zero)
        self.averages = Averages(self.weights) if config.average else None
        self.forward = Stopwatch(self.device)
        if config.compile:
            self.deepspeed.compile()

    def step(
        self,
        micro_batches: list[dict],
        lr: float,
        flags: dict[str, float],
        decay: float = 0.0,
        loss_limit: float = math.inf,
    ) -> Step:
        """Runs forward and backward over this rank's micro-batches, then one optimizer step. Collective.

        If a loss or gradient is not finite on any rank, or the loss is above its limit, no rank updates its weights.

        Args:
            micro_batches: The micro-batches of this rank.
            lr: The learning rate of this step.
            flags: Values of this rank that are summed over all ranks, such as a request to stop.
            decay: The weight of the old average in the new average, 0 to 1.
            loss_limit: The largest loss, as the mean over the global batch, with which the weights are updated.
        """
        totals, statistics = self._forward_backward(micro_batches)

        # Sum the non-finite flag, the caller's flags, the metrics and the statistics over the ranks in one all-reduce.
        nonfinite = (~torch.isfinite(self._nonfinite + totals["loss"])).float()
        scalars = [nonfinite, *torch.tensor([float(v) for v in flags.values()], device=self.device).unbind(), *totals.values()]
        packed = torch.stack([s.reshape(()).float() for s in scalars])
        if statistics is not None:
            packed = torch.cat([packed, statistics])
        dist.all_reduce_sum(packed)
        nonfinite_ranks, *sums = packed[: len(scalars)].tolist()

        # Update the weights, unless a rank had a non-finite value or the loss is too large.
        summed_flags, summed_metrics = sums[: len(flags)], sums[len(flags) :]
        count = self.world_size * self.config.accumulation
        metrics = {name: value / count for name, value in zip(totals, summed_metrics, strict=True)}
        self.optimizer.skip = nonfinite_ranks > 0 or metrics["loss"] > loss_limit
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        norm = self._gradient_norm() if self.config.zero == 0 else None  # before deepspeed.step() clips the gradients
        self.deepspeed.step()
        accepted = not self.optimizer.skip and self.deepspeed.was_step_applied()
        if accepted and self.averages:
            self.averages.update(decay)

        # Turn the sums into the result.
        metrics["gradient_norm"] = self.deepspeed.get_global_grad_norm() if norm is None else norm
        reduced_statistics = packed[len(scalars) :] if statistics is not None else None
        return Step(metrics, reduced_statistics, accepted, dict(zip(flags, summed_flags, strict=True)))

    def _forward_backward(self, micro_batches: list[dict]) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Accumulates gradients. Returns this rank's sums of the loss and metrics, and the sum of the statistics."""
        self._nonfinite.zero_()
        totals: dict[str, torch.Tensor] = {}
        statistics = None
        for number, batch in enumerate(micro_batches):
            with self.forward.running():
                out = self.deepspeed(_channels_last(batch) if self.config.channels_last else batch)
            self.deepspeed.backward(out["loss"])
            self._check_collected()
            named = {"loss": out["loss"], **out["metrics"]}
            totals = {k: totals.get(k, 0) + v.detach().float() for k, v in named.items()}
            if out["statistics"] is not None:
                statistics = out["statistics"] if statistics is None else statistics + out["statistics"]
            if number + 1 < len(micro_batches):
                self.deepspeed.step()  # only counts the micro-batch; the next call, in step(), updates the weights
        return totals, statistics

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Puts the model into evaluation mode inside the block, with the averaged weights if averaging is on. Collective."""
        with self.averages.in_model() if self.averages else contextlib.nullcontext():
            self.module.eval()
            try:
                yield
            finally:
                self.module.train()
                self.weights.end_forward()

    @contextlib.contextmanager
    def whole_module(self) -> Iterator[nn.Module]:
        """Gives the model in fp32 and without DeepSpeed's hooks, with whole weights on every rank. Collective.

        The module shares the weights of the engine's module. Under ZeRO 0 to 2 it takes no memory; under ZeRO 3 the weights
        are gathered inside the block. Inside the block the ranks may run it as often as each likes.
        """
        for plain, hooked in zip(self._plain.modules(), self.module.modules(), strict=True):
            plain._buffers = hooked._buffers  # the engine has moved the buffers to its device
        self.weights.end_forward()
        with gathered(self.module.parameters()):
            yield self._plain

    def fits_whole(self) -> bool:
        """Returns whether the config allows to gather the whole weights on every rank."""
        size = sum(4 * shape_of(parameter).numel() for parameter in self.module.parameters())
        return self.config.zero < 3 or size <= self.config.gather_gib * 2**30

    def save(self, folder: Path) -> None:
        """Writes the engine's state into a folder. Collective.

        Every rank writes its part of engine/, in DeepSpeed's own format, and if averaging is on its part of the averages.
        Rank 0 writes buffers.safetensors.
        """
        self.deepspeed.save_checkpoint(str(folder), tag="engine", save_latest=False)
        if dist.rank() == 0:
            save_file({k: v.contiguous() for k, v in self.module.named_buffers()}, folder / "buffers.safetensors")
            share(folder / "buffers.safetensors")
        if self.averages:
            self.averages.save(folder)

    def load(self, folder: Path, universal: bool = False) -> None:
        """Loads what save() wrote. Collective.

        Args:
            folder: The checkpoint.
            universal: Read universal/, which checkpoint.to_universal() makes for another number of ranks or ZeRO stage,
                instead of engine/.

        Raises:
            UserError: The checkpoint holds more than tensors and plain data.
        """
        if self.averages:  # this overwrites the master weights, so it comes before load_checkpoint()
            self.averages.load(folder)
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        try:
            path, _ = self.deepspeed.load_checkpoint(str(folder), tag="universal" if universal else "engine")
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{folder} holds objects that no training of this project saves, and that could run code ({error}). It was not "
                "loaded. Delete it, or restore it from a copy that you trust."
            ) from None
        assert path is not None, f"no engine state in {folder}"
        if universal:
            # Under ZeRO 3 DeepSpeed gives all parameter groups the settings of the first group, and all states the same
            # step tensor, which the optimizer would then increment several times a step.
            for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay
            for state in self.optimizer.state.values():
                state["step"] = copy.deepcopy(state["step"])
        if self.config.zero == 0:
            self._match_moments_layout()
        # DeepSpeed's universal format omits buffers, and codebooks are buffers.
        for name, value in load_file(folder / "buffers.safetensors").items():
            self.module.get_buffer(name).copy_(value)

    def _collect_gradient(self, gradient: torch.Tensor) -> None:
        """Hook of every parameter: keeps the gradient until enough are collected to check them at once.

        The check is here, because ZeRO 2 and 3 free a parameter's gradient during the backward pass.
        """
        self._collected.append(gradient.detach())
        self._collected_elements += gradient.numel()
        if self._collected_elements >= COLLECTED_ELEMENTS:
            self._check_collected()

    def _check_collected(self) -> None:
        """Adds 0 to self._nonfinite if all collected gradients are finite, else NaN. Does not wait for the device."""
        if self._collected:
            largest = torch._foreach_norm(self._collected, ord=torch.inf)  # of each gradient; unlike a sum it cannot overflow
            self._nonfinite += torch.stack([value.float() for value in largest]).sum() * 0
            self._collected, self._collected_elements = [], 0

    def _gradient_norm(self) -> torch.Tensor:
        """Returns the norm of the whole gradient. DeepSpeed itself reports the norm before clipping only under ZeRO 1 to 3."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    def _match_moments_layout(self) -> None:
        """Gives each moment of the optimizer the memory layout of its parameter.

        DeepSpeed loads moments in the layout in which they were saved, which differs if channels_last has changed since. The
        fused Adam kernel ignores strides, so the kernel would update a weight with the moments of another weight.
        """
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def _place_buffers(self) -> None:
        """Moves the buffers to the device and copies rank 0's to all ranks. deepspeed does it for parameters only."""
        for buffer in self.module.buffers():
            buffer.data = buffer.data.to(self.device)
            if self.world_size > 1:
                torch.distributed.broadcast(buffer, 0)


def build(build_module: Callable[[], nn.Module], config: EngineConfig, batch: int) -> nn.Module:
    """Builds a model for the engine; under ZeRO 3, divided among the ranks from the start. Collective.

    Args:
        build_module: Builds the model.
        config: The engine's config.
        batch: Samples in the global batch.
    """
    if config.zero < 3:
        return build_module()
    micro_batch = config.micro_batch(batch, torch.distributed.get_world_size())
    return build_divided(build_module, _deepspeed_config(config, batch, micro_batch))


def _autocast_forward(module: nn.Module) -> None:
    """Makes the module's forward run under bf16 autocast over fp32 parameters in training. Evaluation runs in fp32.

    DeepSpeed's own setting, torch_autocast, is not used: from ZeRO 1 on it exchanges the weights and gradients of linear layers
    and convolutions in bf16, so the result would depend on the ZeRO stage. Under ZeRO 3 it fails for a module that runs twice
    in a forward pass, because autocast caches the bf16 weights. The cache is therefore off.
    """
    device_type, forward = "cuda" if torch.cuda.is_available() else "cpu", module.forward

    def autocast_forward(batch: dict) -> dict:
        with torch.autocast(device_type, torch.bfloat16, enabled=module.training, cache_enabled=False):
            return forward(batch)

    module.forward = autocast_forward


def communication_sizes(parameters: list[int]) -> dict[str, int]:
    """Returns the sizes of DeepSpeed's communication buffers, in elements.

    DeepSpeed's defaults of 5e8 to 1e9 elements take gigabytes for a small model, and keep a model of that size whole under
    ZeRO 3.

    Args:
        parameters: The number of elements of each parameter.
    """
    bucket = max(*parameters, min(sum(parameters) // 32, MAX_BUCKET))
    sizes = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket, "stage3_prefetch_bucket_size": bucket}
    return sizes | {"stage3_max_live_parameters": 2 * bucket, "stage3_max_reuse_distance": bucket}


def _deepspeed_config(
    config: EngineConfig, batch: int, micro_batch: int, universal: bool = False, sizes: dict[str, int] | None = None
) -> dict:
    settings = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip,
        "zero_optimization": {"stage": config.zero} | (sizes or {}),
        # Accept the optimizers of hpc/train/optim.py: under ZeRO, and with the optimizer state in CPU memory.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,  # never print
    }
    if config.offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if universal:
        settings["checkpoint"] = {"load_universal": True}
    return settings


def _channels_last(batch: dict) -> dict:
    """Returns the batch with its 4-d tensors in channels-last layout."""
    images = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and v.ndim == 4}
    return batch | {k: v.contiguous(memory_format=torch.channels_last) for k, v in images.items()}
