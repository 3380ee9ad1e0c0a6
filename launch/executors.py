"""Where a stage runs: in this process, as ranks on this machine, or as a Slurm job. The only file that imports submitit."""

import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import submitit

import launch.local
from hpc import config as hpc_config
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run import journal
from launch.job import StageJob
from launch.rank import rank_main
from lesiongen.experiment import Experiment, check_ranks
from lesiongen.stages.base import Stage

SUBMITTED = "submitted.jsonl"


def inline(config: Experiment, stage: Stage) -> int:
    """In this process, one rank. Returns the exit code."""
    return rank_main(config, stage.name, Topology())


def local(config: Experiment, stage: Stage) -> int:
    """config.local.ranks processes on this machine. Returns the exit code."""
    alone = config.local.ranks == 1 or not stage.parallel
    return inline(config, stage) if alone else launch.local.run(config, stage)


@dataclass(frozen=True)
class Resources:
    """What one stage asks for."""

    nodes: int = 1
    tasks_per_node: int = 1  # one rank each
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    mem_gb: float = 8
    minutes: int = 60

    def __post_init__(self):
        if min(self.nodes, self.tasks_per_node, self.cpus_per_task, self.minutes) < 1 or self.mem_gb <= 0:
            raise ValueError("nodes, tasks_per_node, cpus_per_task, minutes and mem_gb must be above 0")

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node


@dataclass(frozen=True)
class ClusterConfig:
    """configs/cluster/X.yaml. `stages` overrides `default` by stage ("prior" stands for every level's)."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    python: str | None = None  # interpreter on the compute nodes; this one by default
    environment: dict[str, str] = field(default_factory=dict)
    setup: tuple[str, ...] = ()  # shell lines before the job: modules, conda
    signal_seconds: int = 120  # warning before the time limit, to save and requeue
    extra: dict[str, str] = field(default_factory=dict)  # any other sbatch option
    default: Resources = field(default_factory=Resources)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    def resources(self, stage: Stage) -> Resources:
        own = self.stages.get(stage.name) or self.stages.get(stage.name.partition("-")[0]) or {}
        found = hpc_config.build(Resources, hpc_config.plain(self.default) | own, f"stages.{stage.name}")
        if stage.parallel:
            return found
        return Resources(1, 1, found.gpus_per_node and 1, found.cpus_per_task, found.mem_gb, found.minutes)


def load_cluster(path: str) -> ClusterConfig:
    cluster = hpc_config.build(ClusterConfig, hpc_config.read_yaml(Path(path)))
    known = ("shards", "tokenizer", "codes", "prior", "samples", "report")
    for name in cluster.stages:
        if name.partition("-")[0] not in known:
            raise UserError(f"{path}: stages.{name} is no stage; known: {', '.join(known)}.")
    return cluster


class _Executor(submitit.SlurmExecutor):
    @classmethod
    def affinity(cls) -> int:
        return 2  # a dry run works where there is no Slurm


def slurm(config: Experiment, todo: list[Stage], cluster: ClusterConfig, dry: bool = False) -> dict[str, str]:
    """Submits stages as jobs that wait for those they need. Returns {stage: job id}; a dry run prints the scripts."""
    sent: dict[str, str] = {}
    for stage in todo:
        folder = (config.directory / "jobs" / stage.name).absolute()
        waits = [sent[name] for name in stage.needs if name in sent]
        executor = _executor(config, cluster, stage, folder, waits)
        if dry:
            sent[stage.name] = f"<{stage.name}>"
            print(f"# {'-' * 20} {stage.name}\n" + executor._make_submission_file_text(executor._submitit_command_str, "dry"))
            continue
        try:
            job = executor.submit(StageJob(hpc_config.to_yaml(config), stage.name, str(folder)))
        except submitit.core.utils.FailedJobError as error:
            subprocess.run(["scancel", *sent.values()] if sent else ["true"], timeout=60)  # no half of a pipeline
            reason = " ".join(line for line in str(error).splitlines() if "sbatch" in line) or str(error)
            raise UserError(f"Slurm refuses the job of {stage.name}, and none was left in the queue: {reason}") from None
        sent[stage.name] = job.job_id
        journal.append(folder / SUBMITTED, {"job": job.job_id, "after": waits, "time": time.time()})
    return sent


def _executor(config: Experiment, cluster: ClusterConfig, stage: Stage, folder: Path, waits: list[str]) -> _Executor:
    own = cluster.resources(stage)
    extra: dict[str, object] = {"requeue": True, **cluster.extra}
    if waits:
        extra |= {"dependency": "afterok:" + ":".join(waits), "kill-on-invalid-dep": "yes"}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    executor = _Executor(folder=folder, python=cluster.python)
    ended = f"exec {executor.python} -m launch.requeue {shlex.quote(str(folder))}"
    executor.update_parameters(
        job_name=f"{config.name}:{stage.name}",
        nodes=own.nodes,
        ntasks_per_node=own.tasks_per_node,
        cpus_per_task=own.cpus_per_task,
        gpus_per_node=own.gpus_per_node or None,
        mem=f"{int(own.mem_gb * 1024)}MB",
        time=own.minutes,
        partition=cluster.partition,
        account=cluster.account,
        qos=cluster.qos,
        constraint=cluster.constraint,
        signal_delay_s=cluster.signal_seconds,
        # The batch script outlives signals meant for its ranks, and its last line decides about the requeue. submitit would
        # install a handler of its own for the signal named here; USR1 is not used, so USR2 stays with launch/job.py.
        setup=["trap : TERM USR2", "export SUBMITIT_PREEMPT_SIGNAL=USR1", *cluster.setup, *exports],
        # Signals are ignored from here on, also by the Python that starts: without the requeue the job would be lost.
        teardown=["code=$?", "trap '' TERM USR2", f"[ $code = 0 ] || {ended} $code"],
        # A dead rank ends the step, as the others would wait for it in a collective; they have time to say why they end.
        srun_args=["--wait=30", f"--cpus-per-task={own.cpus_per_task}"],
        additional_parameters=extra,
    )
    return executor


def check_before_queue(config: Experiment, todo: list[Stage], cluster: ClusterConfig, dry: bool = False) -> None:
    """Raises UserError for what would fail after the queue: no Slurm here, a batch that does not divide among the ranks."""
    if not dry and not shutil.which("sbatch"):
        raise UserError("There is no sbatch on this machine. Submit from a login node of the cluster, or look with --dry.")
    for stage in todo:
        ranks = cluster.resources(stage).ranks
        if stage.name == "tokenizer":
            check_ranks(config.tokenizer.train, ranks, "tokenizer.train")
        elif stage.trains:
            level = stage.name.removeprefix("prior-")
            check_ranks(config.prior(level).train, ranks, f"priors.{level}.train")


EXECUTORS = {"inline": inline, "local": local, "slurm": slurm}
