"""The machines that a run is planned for, and what is known of GPUs. `lesiongen plan` and the speed metrics use it."""

import re
import time
from dataclasses import dataclass, replace

import psutil
import torch

# Part of a GPU's name → (operations per second in dense bf16, memory in GB), from the vendors' data sheets. known_gpu() uses
# the first name that occurs in the device's name, so special variants stand before the general name.
GPUS = {
    "GH200": (989e12, 96),
    "H200": (989e12, 141),
    "H100 PCIe": (756e12, 80),
    "H100 NVL": (835e12, 94),
    "H100": (989e12, 80),
    "H20": (148e12, 96),
    "B200": (2250e12, 180),
    "L40S": (362e12, 48),
    "L4": (121e12, 24),
    "A100": (312e12, 80),
    "A40": (150e12, 48),
    "A30": (165e12, 24),
    "A10": (125e12, 24),
    "RTX 4090": (165e12, 24),
    "RTX 3090": (71e12, 24),
}


@dataclass(frozen=True)
class HardwareConfig:
    """The machines that `lesiongen plan` computes for. Training does not read it. 0 and "" mean: as on this machine."""

    nodes: int = 1
    gpus: int = 0  # GPUs of each node; each has one rank
    gpu: str = ""  # name of the GPU, such as H100
    gpu_gb: float = 0.0  # memory of one GPU in GB; 0 = what is known of `gpu`
    host_gb: float = 0.0  # main memory of one node in GB
    utilisation: float = 0.35  # share of the peak speed that training is assumed to reach
    disk_gb_per_s: float = 1.0  # speed at which one node writes a checkpoint

    def __post_init__(self):
        if self.nodes < 1 or min(self.gpus, self.gpu_gb, self.host_gb) < 0:
            raise ValueError("nodes must be at least 1; gpus, gpu_gb and host_gb at least 0")
        if not 0 < self.utilisation <= 1 or self.disk_gb_per_s <= 0:
            raise ValueError("utilisation must be above 0 and at most 1, disk_gb_per_s above 0")
        if self.gpus and not (self.gpu_gb or known_gpu(self.gpu)):
            raise ValueError(f"nothing is known of the GPU '{self.gpu}'; set gpu_gb, or gpu to one of {', '.join(GPUS)}")


@dataclass(frozen=True)
class Machines:
    """What a plan needs to know of the machines.

    Attributes:
        name: What the plan prints.
        nodes: Number of machines.
        ranks_per_node: Ranks on each.
        gpu_bytes: Memory of one GPU; 0 for training on the CPU.
        host_bytes: Main memory of one machine.
        peak_flops: Operations per second of one rank in each precision, fp32 and bf16; {} if unknown.
    """

    name: str
    nodes: int
    ranks_per_node: int
    gpu_bytes: float
    host_bytes: float
    peak_flops: dict[str, float]

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node


def known_gpu(name: str) -> tuple[float, float] | None:
    """Returns the operations per second in dense bf16 and the memory in GB of a GPU, or None if GPUS does not have it."""
    return next((facts for part, facts in GPUS.items() if re.search(rf"\b{part}\b", name)), None)


def machines(config: HardwareConfig, ranks: int) -> Machines:
    """Returns the machines of a config. What the config leaves open is taken from this machine.

    Args:
        config: The config.
        ranks: Ranks on this machine, if the config names no GPUs.
    """
    host = config.host_gb * 1e9 or psutil.virtual_memory().total
    found = torch.cuda.device_count() if has_gpu() else 0
    if not config.gpus and found:
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        config = replace(config, gpus=min(ranks, found), gpu=torch.cuda.get_device_name(0), gpu_gb=memory)
    if config.gpus:
        peak, memory = known_gpu(config.gpu) or (None, 0)
        memory = config.gpu_gb or memory
        name = f"{config.nodes} × {config.gpus} {config.gpu or 'GPU'} of {memory:.0f} GB"
        # The peak of bf16 counts for fp32 too, which GPUs compute as TF32 at up to half of it.
        peaks = dict.fromkeys(("fp32", "bf16"), peak) if peak else {}
        return Machines(name, config.nodes, config.gpus, memory * 1e9, host, peaks)
    peaks = {name: cpu_flops(dtype) / ranks for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    return Machines(f"{ranks} rank{'s' * (ranks > 1)} on the CPU", config.nodes, ranks, 0, host, peaks)


def has_gpu() -> bool:
    """Returns whether this machine has a GPU that torch can use."""
    return torch.cuda.is_available()


def cpu_has_bf16() -> bool:
    """Returns whether this machine's CPU multiplies in bf16; another one emulates it, which is slower than fp32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.12 may lack it
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is ARM's


def cpu_flops(dtype: torch.dtype) -> float:
    """Measures the operations per second of this machine's CPU by matrix products; the fastest counts."""
    a, seconds = torch.ones(1024, 1024, dtype=dtype), []
    for _ in range(8):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(seconds)
