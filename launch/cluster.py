"""The cluster file, configs/cluster/X.yaml: which resources the job of each stage requests from Slurm."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpc import config as hpc_config
from hpc.errors import UserError
from hpc.run.rundir import STAGE_KINDS
from lesiongen.stages.base import Stage

SBATCH = ("partition", "account", "qos", "constraint", "reservation")  # fields with the names of options of sbatch


@dataclass(frozen=True)
class Resources:
    """What the job of one stage requests from Slurm."""

    nodes: int = 1
    tasks_per_node: int = 1  # each task is one rank
    gpus_per_node: int = 0
    gpu_type: str | None = None  # as `sinfo -o %G` prints it: a100
    cpus_per_task: int = 1
    mem_gb: float | None = 8  # memory per node; null = what the partition gives
    mem_per_cpu_gb: float | None = None  # in place of mem_gb, for clusters that ask for it
    mem_per_gpu_gb: float | None = None  # likewise
    minutes: int = 60  # time limit
    partition: str | None = None  # this and the next five fields are options of sbatch
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclusive: bool = False
    # Any other option of sbatch. true = an option without a value; false and null = leave an option of `extra` above out.
    extra: dict[str, Any] = field(default_factory=dict)
    srun: tuple[str, ...] = ()  # options of srun, such as --cpu-bind=cores

    def __post_init__(self):
        if min(self.nodes, self.tasks_per_node, self.cpus_per_task, self.minutes) < 1:
            raise ValueError("nodes, tasks_per_node, cpus_per_task and minutes must be above 0")
        if any(memory is not None and memory <= 0 for memory in (self.mem_gb, self.mem_per_cpu_gb, self.mem_per_gpu_gb)):
            raise ValueError(
                "mem_gb must be above 0, or null for what the partition gives; likewise mem_per_cpu_gb, mem_per_gpu_gb"
            )
        if self.mem_per_cpu_gb and self.mem_per_gpu_gb:
            raise ValueError("sbatch accepts mem_per_cpu_gb or mem_per_gpu_gb, not both")
        if 0 < self.gpus_per_node < self.tasks_per_node:
            raise ValueError(
                f"tasks_per_node={self.tasks_per_node} ranks would share gpus_per_node={self.gpus_per_node} GPUs; "
                "request one GPU per task"
            )

    @property
    def ranks(self) -> int:
        """The number of ranks of the job."""
        return self.nodes * self.tasks_per_node

    def options(self) -> dict[str, object]:
        """Returns the options of sbatch that request this, but for nodes and tasks. There is none that was not asked for."""
        found: dict[str, object] = {name: getattr(self, name) for name in SBATCH}
        found |= {"time": self.minutes, "cpus-per-task": self.cpus_per_task}
        found["exclusive"] = self.exclusive or None
        if self.gpus_per_node:
            found["gpus-per-node"] = f"{self.gpu_type}:{self.gpus_per_node}" if self.gpu_type else self.gpus_per_node
        if self.mem_per_cpu_gb or self.mem_per_gpu_gb:
            found |= {"mem-per-cpu": _megabytes(self.mem_per_cpu_gb), "mem-per-gpu": _megabytes(self.mem_per_gpu_gb)}
        elif not any(option.startswith("mem") and self.extra[option] for option in self.extra):  # sbatch accepts one way
            found["mem"] = _megabytes(self.mem_gb)
        return {name: value for name, value in (found | self.extra).items() if value not in (None, False)}


def _megabytes(gigabytes: float | None) -> str | None:
    return f"{int(gigabytes * 1024)}MB" if gigabytes else None


@dataclass(frozen=True)
class ClusterConfig:
    """The content of a cluster file, configs/cluster/X.yaml."""

    partition: str | None = None  # this and the next three fields are options of sbatch, for stages that have no other
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    python: str | None = None  # Python interpreter on the compute nodes; null = the interpreter that submits
    container: str | None = None  # what runs a command in a container, such as "apptainer exec --nv /images/lesiongen.sif"
    environment: dict[str, str] = field(default_factory=dict)  # environment variables of the job
    setup: tuple[str, ...] = ()  # shell lines that run before the stage, such as "module load cuda"
    signal_seconds: int = 120  # time between the warning signal and the time limit, to save and requeue
    extra: dict[str, Any] = field(default_factory=dict)  # any other option of sbatch; that of a stage wins
    default: Resources = field(default_factory=Resources)  # resources of every stage
    # Resources that differ for a stage, by its name: {tokenizer: {nodes: 2}}. "prior" stands for every level's prior.
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def has_gpus(self) -> bool:
        """Whether any stage requests GPUs, by gpus_per_node or by an option of sbatch."""
        requests = [hpc_config.to_plain(self.default), {"extra": self.extra}, *self.stages.values()]
        options = [option for request in requests for option in (request.get("extra") or {}).items()]
        named = any(name.startswith("gpus") or (name == "gres" and "gpu" in str(value)) for name, value in options if value)
        return named or any(request.get("gpus_per_node") for request in requests)

    def resources(self, stage: Stage) -> Resources:
        """Returns the resources of a stage: the common settings, changed by `default`, changed by the stage's in `stages`.

        A stage that several ranks do not make faster gets one task, and one GPU at most.
        """
        common = {name: getattr(self, name) for name in ("partition", "account", "qos", "constraint")}
        default = hpc_config.to_plain(self.default)
        changes = self.stages.get(stage.name) or self.stages.get(stage.name.partition("-")[0]) or {}
        extra = self.extra | default["extra"] | (changes.get("extra") or {})
        merged = common | {k: v for k, v in default.items() if k not in common or v is not None} | changes | {"extra": extra}
        resources = hpc_config.from_plain(Resources, merged, f"stages.{stage.name}")
        if stage.parallel:
            return resources
        return replace(resources, nodes=1, tasks_per_node=1, gpus_per_node=resources.gpus_per_node and 1)


def load_cluster(path: str) -> ClusterConfig:
    """Reads a cluster file. Raises UserError for a mistake in the file; the message names the key."""
    cluster = hpc_config.from_plain(ClusterConfig, hpc_config.read_yaml(Path(path)))
    for name in cluster.stages:
        if name.partition("-")[0] not in STAGE_KINDS:
            raise UserError(f"{path}: stages.{name} is not a stage. The stages are {', '.join(STAGE_KINDS)}.")
    return cluster
