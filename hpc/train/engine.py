"""DeepSpeed: build, step, precision, ZeRO. The only file that imports deepspeed.

A model's forward(batch) returns {"loss": scalar, "metrics": {name: scalar}, "statistics": flat fp32 vector or None}. One
fused all-reduce per step carries the agreed flags, the metrics and the statistics (codebook counts and sums), before
the optimizer's step, so that every rank takes the same decision with the same numbers.
"""

import contextlib
import copy
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from hpc import dist
from hpc.config import volatile
from hpc.data.order import batch_share
from hpc.train.optim import Skippable


@dataclass(frozen=True)
class EngineConfig:
    zero: Literal[0, 1, 2, 3] = volatile(0)
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast over fp32 parameters
    accumulation: int = volatile(1)  # micro-batches per step on each rank
    clip: float = 1.0  # largest gradient norm; 0 = none
    offload: bool = volatile(False)  # optimizer state in CPU memory (ZeRO 1 to 3)
    average: float = 0.0  # half-life, in samples, of the averaged weights that are evaluated and exported; 0 = none
    compile: bool = volatile(False)
    channels_last: bool = volatile(True)  # layout of images and filters that convolutions are fastest in

    def __post_init__(self):
        if self.accumulation < 1 or self.clip < 0 or self.average < 0:
            raise ValueError("accumulation must be at least 1, clip and average at least 0")
        if self.offload and self.zero == 0:
            raise ValueError("offload needs zero to be 1, 2 or 3")

    def micro_batch(self, batch: int, world: int) -> int:
        """Samples in one micro-batch of one rank. Raises ValueError where the batch does not divide."""
        if batch % (world * self.accumulation):
            raise ValueError(
                f"the global batch of {batch} does not divide among {world} ranks × {self.accumulation} micro-batches; "
                f"make it a multiple of {world * self.accumulation}"
            )
        return len(batch_share(batch, 0, world)) // self.accumulation


@dataclass(frozen=True)
class Step:
    """What one optimizer step came to, the same on every rank. metrics are means over the global batch."""

    metrics: dict[str, float]
    statistics: torch.Tensor | None
    accepted: bool
    flags: dict[str, float]


class Engine:
    """A model under DeepSpeed."""

    def __init__(self, module: nn.Module, optimizer: Skippable, config: EngineConfig, batch: int, universal: bool = False):
        deepspeed = _import()
        self.world = torch.distributed.get_world_size()
        self.micro_batch = config.micro_batch(batch, self.world)
        self.config, self.optimizer = config, optimizer
        settings = {
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": config.accumulation,
            "gradient_clipping": config.clip,
            "zero_optimization": {"stage": config.zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        if config.offload:
            settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        if config.precision == "bf16":
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        if universal:
            settings["checkpoint"] = {"load_universal": True}
        self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self.module = self.deepspeed.module
        self.device = self.deepspeed.device
        if config.channels_last and config.zero == 0:  # ZeRO 1 to 3 lay filters flat; there images alone set the layout
            self.module.to(memory_format=torch.channels_last)
        self._broadcast_buffers()  # initialize() does so for parameters only
        self._probe = torch.zeros((), device=self.device)
        for parameter in self.module.parameters():
            parameter.register_hook(self._look)
        self.averages = [w.detach().clone() for w in self._weights()] if config.average else []
        if config.compile:
            self.deepspeed.compile()

    def _look(self, gradient: torch.Tensor) -> None:
        # Times zero: stays 0 for finite gradients, becomes NaN for any other, without a synchronisation.
        self._probe += gradient.detach().sum(dtype=torch.float32) * 0

    def _weights(self) -> list[torch.Tensor]:
        """The fp32 weights the optimizer works on: this rank's part of them under ZeRO 1 to 3."""
        if self.config.zero == 3:
            return self.deepspeed.optimizer.fp32_partitioned_groups_flat  # between steps its groups are empty
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, micro_batches: list[dict], lr: float, flags: dict[str, float], decay: float = 0.0) -> Step:
        """One optimizer step over this rank's micro-batches. `flags` are summed over ranks. A non-finite loss or gradient
        on any rank leaves the step out on all. decay: what averaged weights keep of themselves."""
        self._probe.zero_()
        total: dict[str, torch.Tensor] = {}
        statistics = None
        for number, batch in enumerate(micro_batches):
            out = self.deepspeed(_channels_last(batch) if self.config.channels_last else batch)
            self.deepspeed.backward(out["loss"])
            named = {"loss": out["loss"], **out["metrics"]}
            total = {k: total.get(k, 0) + v.detach().float() for k, v in named.items()}
            if out["statistics"] is not None:
                statistics = out["statistics"] if statistics is None else statistics + out["statistics"]
            if number + 1 < len(micro_batches):
                self.deepspeed.step()  # not the boundary: it only counts
        bad = (~torch.isfinite(self._probe + total["loss"])).float()
        values = [bad, *(torch.tensor(float(v), device=self.device) for v in flags.values()), *total.values()]
        packed = torch.stack([v.reshape(()).float() for v in values])
        if statistics is not None:
            packed = torch.cat([packed, statistics])
        dist.all_reduce_sum(packed)
        head = packed[: len(values)].tolist()
        self.optimizer.skip = head[0] > 0
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        norm = self._norm() if self.config.zero == 0 else None
        self.deepspeed.step()
        accepted = not self.optimizer.skip and self.deepspeed.was_step_applied()
        if accepted and self.averages:
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, self._weights(), 1 - decay)
        summed = dict(zip(flags, head[1:], strict=False))
        means = head[1 + len(flags) :]
        count = self.world * self.config.accumulation
        metrics = {k: v / count for k, v in zip(total, means, strict=True)}
        metrics["gradient_norm"] = float(self.deepspeed.get_global_grad_norm() if norm is None else norm)
        return Step(metrics, packed[len(values) :] if statistics is not None else None, accepted, summed)

    def _norm(self) -> torch.Tensor:
        """Of the whole gradient, before clipping; DeepSpeed tells it only under ZeRO 1 to 3."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within, averages and weights have changed places: so DeepSpeed gathers averages whole under any ZeRO stage."""

        def swap() -> None:
            with torch.no_grad():
                for average, weights in zip(self.averages, self._weights() if self.averages else [], strict=True):
                    kept = weights.clone()
                    weights.copy_(average), average.copy_(kept)

        swap()
        try:
            yield
        finally:
            swap()

    def _whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter in full, in fp32, one after the other. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.module.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            yield name, parameter.detach() if full is None else full.detach()

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Full fp32 weights, averaged where averaging is on, and buffers into an ordinary module of the same kind.
        Collective."""
        with self._averaged():
            for (name, ours), theirs in zip(self._whole(), module.parameters(), strict=True):
                assert ours.numel() == theirs.numel(), name
                theirs.copy_(ours.reshape(theirs.shape))
        for ours, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            theirs.copy_(ours)

    def save(self, folder: Path) -> None:
        """Writes this rank's part. Collective."""
        self.deepspeed.save_checkpoint(str(folder), tag="engine", save_latest=False)
        if dist.rank() == 0:
            save_file({k: v.contiguous() for k, v in self.module.named_buffers()}, folder / "buffers.safetensors")
        if self.averages:  # whole, so that any number of ranks may go on
            averages = {}
            with self._averaged():
                for name, full in self._whole():
                    if dist.rank() == 0:
                        averages[name] = full.to("cpu", copy=True, memory_format=torch.contiguous_format)
            if dist.rank() == 0:
                save_file(averages, folder / "average.safetensors")

    def load(self, folder: Path, universal: bool = False) -> None:
        """Loads what save() wrote, or what universal() made of it for another number of ranks. Collective."""
        if self.averages:  # by way of the weights, which come after
            averages = load_file(folder / "average.safetensors")
            for name, parameter in self.module.named_parameters():
                self._set_weights(parameter, averages[name].to(self.device))
            self.averages = [w.detach().clone() for w in self._weights()]
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        path, _ = self.deepspeed.load_checkpoint(str(folder), tag="universal" if universal else "engine")
        assert path is not None, f"no engine state in {folder}"
        if universal:  # under ZeRO 3 all groups come back with the first one's settings, and with one step counter
            for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay
            for state in self.optimizer.state.values():
                state["step"] = copy.deepcopy(state["step"])
        if self.config.zero == 0:  # moments come back in the layout they were saved in, and fused Adam reads raw memory
            for parameter, state in self.optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                        state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        # The universal format forgets buffers, and codebooks are buffers.
        for name, value in load_file(folder / "buffers.safetensors").items():
            self.module.get_buffer(name).copy_(value)

    @torch.no_grad()
    def _set_weights(self, parameter: nn.Parameter, full: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self.config.zero == 0:
            parameter.copy_(full)
        elif self.config.zero < 3:
            safe_set_full_fp32_param(parameter, full)
        else:  # its counterpart for ZeRO 3 does not pad
            size = parameter.partition_numel()
            padded = F.pad(full.flatten(), (0, size * self.world - full.numel()))
            safe_set_local_fp32_param(parameter, padded[dist.rank() * size :][:size])

    def _broadcast_buffers(self) -> None:
        if self.world > 1:
            for buffer in self.module.buffers():
                torch.distributed.broadcast(buffer, 0)


def _channels_last(batch: dict) -> dict:
    images = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and v.ndim == 4}
    return batch | {k: v.contiguous(memory_format=torch.channels_last) for k, v in images.items()}


def _import():
    # Its inference-only helper would compile for 42 s; its INFO lines would drown ours.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)
    return deepspeed
