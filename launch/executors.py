"""Executors, which run a stage: in this process, as several ranks on this machine, or as a Slurm job.

No other file imports submitit. The batch script of a Slurm job ends with launch/requeue.py, which requeues the job if the stage
is not done. launch/pipeline.py and launch/commands.py call the executors.
"""

import contextlib
import shlex
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import submitit

from hpc import config as hpc_config
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run import metrics_log
from launch import cost, slurm
from launch.job import StageJob
from launch.local import run_ranks
from launch.rank import rank_main
from lesiongen.experiment import Experiment, check_ranks
from lesiongen.stages.base import Stage, digest_of

# Line of the batch script. hpc/train/preempt.py reads the variable, which Slurm itself sets only in newer versions.
FIND_END_TIME = (
    'end=$(SLURM_TIME_FORMAT=%s timeout 20 squeue -h -j "$SLURM_JOB_ID" -o %e)'
    " && [[ $end =~ ^[0-9]+$ ]] && export SLURM_JOB_END_TIME=$end"
)
STAGE_KINDS = ("shards", "tokenizer", "codes", "polish", "prior", "samples", "report")


def run_local(config: Experiment, stage: Stage) -> int:
    """Runs a stage on this machine, as `config.local.ranks` processes if the stage is parallel, else in this process.

    Args:
        config: The run's config.
        stage: The stage to run.

    Returns:
        The exit code.
    """
    single = config.local.ranks == 1 or not stage.parallel
    return rank_main(config, stage.name, Topology()) if single else run_ranks(config, stage)


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


SBATCH = ("partition", "account", "qos", "constraint", "reservation")  # fields with the names of options


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
    environment: dict[str, str] = field(default_factory=dict)  # environment variables of the job
    setup: tuple[str, ...] = ()  # shell lines that run before the stage, such as "module load cuda"
    signal_seconds: int = 120  # time between the warning signal and the time limit, to save and requeue
    extra: dict[str, Any] = field(default_factory=dict)  # any other option of sbatch; that of a stage wins
    default: Resources = field(default_factory=Resources)  # resources of every stage
    # Resources that differ for a stage, by its name: {tokenizer: {nodes: 2}}. "prior" stands for every level's prior.
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

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


class _SlurmExecutor(submitit.SlurmExecutor):
    """submitit's executor, changed so that `submit --dry` works where Slurm is not installed."""

    @classmethod
    def affinity(cls) -> int:
        return 2  # 2 = available; submitit's own method returns -1 where srun is not installed


def awaited_jobs(config: Experiment) -> dict[str, str]:
    """Returns the results of other runs that jobs are still making: {name of the result: id of the job}."""
    found = {}
    for name in ("tokenizer", "codes", "polish"):
        if (other := getattr(config.inputs, name)) and digest_of(config, name) is None:
            run_dir = Path(other) if (Path(other) / "jobs").is_dir() else Path(other).parent
            job = slurm.last_job(run_dir, name)
            if job and slurm.may_be_running(job):
                found[name] = job
    return found


def submit_slurm(
    config: Experiment, todo: list[Stage], cluster: ClusterConfig, dry: bool = False, awaited: dict[str, str] | None = None
) -> dict[str, str]:
    """Submits one Slurm job per stage. Each job waits for the jobs of the stages that it needs, also for those of other runs.

    Args:
        config: The run's config.
        todo: The stages to submit, upstream first.
        cluster: The cluster file's content.
        dry: Whether to print the batch scripts and submit nothing.
        awaited: The jobs of other runs to wait for, from awaited_jobs().

    Returns:
        {stage name: job id}; in a dry run the ids are placeholders.

    Raises:
        UserError: Slurm refuses a job. The jobs that were already submitted are cancelled.
    """
    jobs: dict[str, str] = {}
    for stage in todo:
        folder = (config.directory / "jobs" / stage.name).absolute()
        dependencies = [others[name] for name in stage.needs for others in (jobs, awaited or {}) if name in others]
        executor = _make_executor(config, cluster, stage, folder, dependencies)
        if dry:
            jobs[stage.name] = f"<{stage.name}>"
            print(f"# {'-' * 20} {stage.name}\n" + executor._make_submission_file_text(executor._submitit_command_str, "dry"))
            continue
        try:
            with slurm.without_allocation():
                job = executor.submit(StageJob(hpc_config.to_yaml(config), stage.name, str(folder)))
        except submitit.core.utils.FailedJobError as error:
            # Do not leave half of a pipeline in the queue.
            if jobs:
                slurm.run("scancel", *jobs.values())
            reason = " ".join(line for line in str(error).splitlines() if "sbatch" in line) or str(error)
            raise UserError(
                f"Slurm refuses the job of {stage.name}; the jobs submitted before it were cancelled. Slurm's reason: {reason}"
            ) from None
        jobs[stage.name] = job.job_id
        slurm.record_job(config.directory, stage.name, job.job_id, dependencies)
    return jobs


def _make_executor(
    config: Experiment, cluster: ClusterConfig, stage: Stage, folder: Path, dependencies: list[str]
) -> _SlurmExecutor:
    """Returns an executor that submits the stage with its resources.

    Args:
        config: The run's config.
        cluster: The cluster file's content.
        stage: The stage to submit.
        folder: Directory of the job's files: batch script, pickled StageJob, logs.
        dependencies: Ids of the jobs that must succeed first.
    """
    resources = cluster.resources(stage)
    extra = {"requeue": True} | resources.options()
    if dependencies:
        # Slurm reads a comma as "and". A dependency of the user's holds for every stage.
        own = [str(extra["dependency"])] if "dependency" in extra else []
        extra |= {"dependency": ",".join(["afterok:" + ":".join(dependencies), *own]), "kill-on-invalid-dep": "yes"}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    executor = _SlurmExecutor(folder=folder, python=cluster.python)
    requeue = f"exec {executor.python} -m launch.requeue {shlex.quote(str(folder))}"
    executor.update_parameters(
        job_name=f"{config.name}:{stage.name}",
        signal_delay_s=cluster.signal_seconds,
        # The batch script must survive the signals that are meant for its ranks, because its last line requeues the job. So
        # trap sets the no-op handler ":". The ranks do not inherit a handler, but they would inherit an ignored signal.
        # submitit installs its own handler for the signal in SUBMITIT_PREEMPT_SIGNAL. Name USR1, which nobody sends, so that
        # hpc/train/preempt.py can handle USR2.
        setup=["trap : TERM USR2", "export SUBMITIT_PREEMPT_SIGNAL=USR1", *cluster.setup, *exports, FIND_END_TIME],
        # From here on the signals are ignored. The Python process of launch/requeue.py inherits this. If a signal killed that
        # process, the job would not be requeued.
        teardown=["code=$?", "trap '' TERM USR2", f"[ $code = 0 ] || {requeue} $code"],
        # If a rank dies, srun ends the other ranks, which would otherwise wait for the dead rank in a collective. The other
        # ranks have 30 seconds to print why they end.
        srun_args=["--wait=30", f"--cpus-per-task={resources.cpus_per_task}", *resources.srun],
        wckey=None,  # submitit's own default names itself, which clusters with accounting by wckey refuse
        nodes=resources.nodes,
        ntasks_per_node=resources.tasks_per_node,
        additional_parameters=extra,
    )
    return executor


def check_before_queue(config: Experiment, todo: list[Stage], cluster: ClusterConfig, dry: bool = False) -> None:
    """Checks for mistakes that would otherwise appear only after hours in the queue.

    Args:
        config: The run's config.
        todo: The stages that are about to be submitted.
        cluster: The cluster file's content.
        dry: Whether the batch scripts are only printed, so that Slurm need not be installed.

    Raises:
        UserError: Slurm is not installed here, or the batch of a training does not divide among its ranks.
    """
    if not dry and not shutil.which("sbatch"):
        raise UserError("There is no sbatch on this machine. Submit from a login node of the cluster, or print with --dry.")
    for stage in todo:
        if stage.trains:
            section, train = config.trainings[stage.name]
            check_ranks(train, cluster.resources(stage).ranks, section)
    if not dry:
        for line in warn_of_short_signals(config, todo, cluster.signal_seconds):
            print(line)


def warn_of_short_signals(config: Experiment, todo: list[Stage], signal_seconds: int) -> list[str]:
    """Returns a warning for each training that may need longer to save than the time between the signal and the limit.

    A save is expected to take as long as the slowest that an earlier job has logged; before the first, as long as the plan
    computes (launch/cost.py).

    Args:
        config: The run's config.
        todo: The stages that are about to be submitted.
        signal_seconds: That time in seconds.
    """
    plans: dict[str, cost.Training] = {}
    with contextlib.suppress(UserError):  # without the plan, the general minimum holds
        plans = {training.name: training for training in cost.trainings(config)}
    lines = []
    for stage in (stage for stage in todo if stage.trains):
        rows = metrics_log.read_metrics(config.directory / stage.name)
        saves = [row["checkpoint_seconds"] for row in rows if "checkpoint_seconds" in row]
        _, train = config.trainings[stage.name]
        step = max((train.batch / row["images_per_second"] for row in rows if row.get("images_per_second")), default=0.0)
        if not saves and stage.name in plans:
            saves = [cost.checkpoint_bytes(plans[stage.name]) / config.hardware.disk_gb_per_s / 1e9]
        needed = max(120.0, 3 * max(saves, default=0.0) + step)
        if signal_seconds < needed:
            lines.append(
                f"WARNING: {stage.name}: a step and a save may need more than signal_seconds={signal_seconds}. Set at least "
                f"{needed:.0f} in the cluster file, or the job may be killed before it has saved."
            )
    return lines
