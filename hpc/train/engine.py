"""The DeepSpeed engine: one optimizer step over all ranks, precision, ZeRO, averaged weights.

No other file imports deepspeed. The training loop builds an Engine and calls step(). The model's forward(batch) returns
{"loss": scalar, "metrics": {name: scalar}, "statistics": flat fp32 vector or None}.

Invariant: all ranks accept or skip the same steps. One all-reduce per step, before the optimizer's step, sums the flags, the
metrics and the statistics (codebook counts and sums), so that all ranks decide from the same numbers.
"""

import contextlib
import copy
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from hpc import dist
from hpc.config import volatile
from hpc.data.order import batch_share
from hpc.train.optim import SkippableOptimizer


@dataclass(frozen=True)
class EngineConfig:
    """How a training step runs on the ranks."""

    zero: Literal[0, 1, 2, 3] = volatile(0)  # ZeRO stage
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; parameters stay fp32
    accumulation: int = volatile(1)  # micro-batches per step on each rank
    clip: float = 1.0  # largest gradient norm; 0 = no clipping
    offload: bool = volatile(False)  # keep the optimizer state in CPU memory (ZeRO 1 to 3)
    average: float = 0.0  # half-life of the averaged weights, in samples; evaluation and export use them; 0 = no averaging
    compile: bool = volatile(False)  # compile the model with torch.compile
    channels_last: bool = volatile(True)  # store images and filters channels-last, the fastest layout for convolutions

    def __post_init__(self):
        if self.accumulation < 1 or self.clip < 0 or self.average < 0:
            raise ValueError("accumulation must be at least 1, clip and average at least 0")
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
        accepted: False if the weights were not updated because a loss or gradient was not finite.
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
        averages: Averaged weights, one fp32 tensor for each tensor of _weights(); empty if averaging is off.
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
        deepspeed = _import_deepspeed()
        self.world_size = torch.distributed.get_world_size()
        self.micro_batch = config.micro_batch(batch, self.world_size)
        self.config, self.optimizer = config, optimizer
        settings = _deepspeed_config(config, batch, self.micro_batch, universal)
        if config.precision == "bf16":
            _autocast_forward(module)
        self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        dist.set_group_timeouts()
        self.module = self.deepspeed.module
        self.device = self.deepspeed.device
        # ZeRO 1 to 3 store filters in flat buffers, which have no channels-last layout. So they convert only the images.
        if config.channels_last and config.zero == 0:
            self.module.to(memory_format=torch.channels_last)
        self._broadcast_buffers()
        self._nonfinite = torch.zeros((), device=self.device)  # 0 while all gradients of the step are finite, else NaN
        for parameter in self.module.parameters():
            parameter.register_hook(self._accumulate_nonfinite)
        self.averages = [w.detach().clone() for w in self._weights()] if config.average else []
        if config.compile:
            self.deepspeed.compile()

    def step(self, micro_batches: list[dict], lr: float, flags: dict[str, float], decay: float = 0.0) -> Step:
        """Runs forward and backward over this rank's micro-batches, then one optimizer step. Collective.

        If a loss or gradient is not finite on any rank, no rank updates its weights.

        Args:
            micro_batches: The micro-batches of this rank.
            lr: The learning rate of this step.
            flags: Values of this rank that are summed over all ranks, such as a request to stop.
            decay: The weight of the old average in the new average, 0 to 1.
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

        # Update the weights, unless a rank had a non-finite value.
        self.optimizer.skip = nonfinite_ranks > 0
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        norm = self._gradient_norm() if self.config.zero == 0 else None  # before deepspeed.step() clips the gradients
        self.deepspeed.step()
        accepted = not self.optimizer.skip and self.deepspeed.was_step_applied()
        if accepted and self.averages:
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, self._weights(), 1 - decay)

        # Turn the sums into the result.
        summed_flags, summed_metrics = sums[: len(flags)], sums[len(flags) :]
        count = self.world_size * self.config.accumulation
        metrics = {name: value / count for name, value in zip(totals, summed_metrics, strict=True)}
        metrics["gradient_norm"] = self.deepspeed.get_global_grad_norm() if norm is None else norm
        reduced_statistics = packed[len(scalars) :] if statistics is not None else None
        return Step(metrics, reduced_statistics, accepted, dict(zip(flags, summed_flags, strict=True)))

    def _forward_backward(self, micro_batches: list[dict]) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Accumulates gradients. Returns this rank's sums of the loss and metrics, and the sum of the statistics."""
        self._nonfinite.zero_()
        totals: dict[str, torch.Tensor] = {}
        statistics = None
        for number, batch in enumerate(micro_batches):
            out = self.deepspeed(_channels_last(batch) if self.config.channels_last else batch)
            self.deepspeed.backward(out["loss"])
            named = {"loss": out["loss"], **out["metrics"]}
            totals = {k: totals.get(k, 0) + v.detach().float() for k, v in named.items()}
            if out["statistics"] is not None:
                statistics = out["statistics"] if statistics is None else statistics + out["statistics"]
            if number + 1 < len(micro_batches):
                self.deepspeed.step()  # only counts the micro-batch; the next call, in step(), updates the weights
        return totals, statistics

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Copies the full fp32 weights and the buffers into a module. Collective.

        If averaging is on, the averaged weights are copied.

        Args:
            module: A module of the same architecture, without DeepSpeed.
        """
        with self._averages_in_weights():
            for (name, source), target in zip(self._full_parameters(), module.parameters(), strict=True):
                assert source.numel() == target.numel(), name
                target.copy_(source.reshape(target.shape))
        for source, target in zip(self.module.buffers(), module.buffers(), strict=True):
            target.copy_(source)

    def save(self, folder: Path) -> None:
        """Writes the engine's state into a folder. Collective.

        Every rank writes its part of engine/, in DeepSpeed's own format. Rank 0 writes buffers.safetensors and, if averaging is
        on, average.safetensors.
        """
        self.deepspeed.save_checkpoint(str(folder), tag="engine", save_latest=False)
        if dist.rank() == 0:
            save_file({k: v.contiguous() for k, v in self.module.named_buffers()}, folder / "buffers.safetensors")
        if self.averages:  # saved in full, not in partitions, so that any number of ranks can load them
            averages = {}
            with self._averages_in_weights():
                for name, full in self._full_parameters():
                    if dist.rank() == 0:
                        averages[name] = full.to("cpu", copy=True, memory_format=torch.contiguous_format)
            if dist.rank() == 0:
                save_file(averages, folder / "average.safetensors")

    def load(self, folder: Path, universal: bool = False) -> None:
        """Loads what save() wrote. Collective.

        Args:
            folder: The checkpoint.
            universal: Read universal/, which checkpoint.to_universal() makes for another number of ranks or ZeRO stage,
                instead of engine/.
        """
        if self.averages:
            # Write the full averages into the weights, which splits the averages among the ranks as ZeRO splits the weights.
            # Then copy this rank's part from the weights. load_checkpoint() below overwrites the weights.
            averages = load_file(folder / "average.safetensors")
            for name, parameter in self.module.named_parameters():
                self._set_weights(parameter, averages[name].to(self.device))
            self.averages = [w.detach().clone() for w in self._weights()]
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        path, _ = self.deepspeed.load_checkpoint(str(folder), tag="universal" if universal else "engine")
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

    def _accumulate_nonfinite(self, gradient: torch.Tensor) -> None:
        """Adds 0 to self._nonfinite for a finite gradient and NaN otherwise.

        So step() checks all gradients at once, without a device synchronisation for each gradient.
        """
        self._nonfinite += gradient.detach().sum(dtype=torch.float32) * 0

    def _gradient_norm(self) -> torch.Tensor:
        """Returns the norm of the whole gradient. DeepSpeed itself reports the norm before clipping only under ZeRO 1 to 3."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    def _weights(self) -> list[torch.Tensor]:
        """Returns the fp32 weights that the optimizer updates: under ZeRO 1 to 3, this rank's partition."""
        if self.config.zero == 3:  # here the optimizer's parameter groups are empty between steps
            return self.deepspeed.optimizer.fp32_partitioned_groups_flat
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @contextlib.contextmanager
    def _averages_in_weights(self) -> Iterator[None]:
        """Swaps averages and weights inside the block, so that reading the weights under any ZeRO stage gives the averages."""

        def swap() -> None:
            with torch.no_grad():
                for average, weights in zip(self.averages, self._weights() if self.averages else [], strict=True):
                    previous = weights.clone()
                    weights.copy_(average), average.copy_(previous)

        swap()
        try:
            yield
        finally:
            swap()

    def _full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the name and the full fp32 value of each parameter. Gathers one parameter at a time. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.module.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            yield name, parameter.detach() if full is None else full.detach()

    @torch.no_grad()
    def _set_weights(self, parameter: nn.Parameter, full: torch.Tensor) -> None:
        """Sets the fp32 weights of a parameter; under ZeRO 1 to 3, each rank sets its partition."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self.config.zero == 0:
            parameter.copy_(full)
        elif self.config.zero < 3:
            safe_set_full_fp32_param(parameter, full)
        else:
            # Under ZeRO 3 all partitions have the same size, but safe_set_full_fp32_param() does not pad the weights to it. So
            # pad the weights here and set this rank's partition.
            size = parameter.partition_numel()
            padded = F.pad(full.flatten(), (0, size * self.world_size - full.numel()))
            safe_set_local_fp32_param(parameter, padded[dist.rank() * size :][:size])

    def _match_moments_layout(self) -> None:
        """Gives each moment of the optimizer the memory layout of its parameter.

        DeepSpeed loads moments in the layout in which they were saved, which differs if channels_last has changed since. The
        fused Adam kernel ignores strides, so the kernel would update a weight with the moments of another weight.
        """
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def _broadcast_buffers(self) -> None:
        """Copies rank 0's buffers to all ranks. deepspeed.initialize() copies only the parameters."""
        if self.world_size > 1:
            for buffer in self.module.buffers():
                torch.distributed.broadcast(buffer, 0)


def _autocast_forward(module: nn.Module) -> None:
    """Makes the module's forward run under bf16 autocast over fp32 parameters.

    DeepSpeed's own setting, torch_autocast, is not used: from ZeRO 1 on it exchanges the weights and gradients of linear layers
    and convolutions in bf16, so the result would depend on the ZeRO stage. Under ZeRO 3 it fails for a module that runs twice
    in a forward pass, because autocast caches the bf16 weights. The cache is therefore off.
    """
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    module.forward = torch.autocast(device_type, torch.bfloat16, cache_enabled=False)(module.forward)


def _deepspeed_config(config: EngineConfig, batch: int, micro_batch: int, universal: bool) -> dict:
    settings = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip,
        "zero_optimization": {"stage": config.zero},
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


def _import_deepspeed() -> ModuleType:
    """Imports deepspeed without its INFO log and without compiling its extension for shared-memory communication.

    Only inference uses that extension, and compiling it takes 42 s.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)
    return deepspeed
