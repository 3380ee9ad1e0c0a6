"""Where a stage runs: in this process, as ranks on this machine, or as a Slurm job. The only file that imports submitit."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import submitit

from hpc import config as hpc_config
from hpc import errors, journal, rundir
from hpc.dist import Topology
from hpc.errors import UserError
from lesiongen.experiment import Experiment, check_ranks
from lesiongen.stages.base import Stage
from launch.job import StageJob
from launch.work import rank_main

SUBMITTED = "submitted.jsonl"

# ---------------------------------------------------------------------------------------------------- this machine


def inline(config: Experiment, stage: Stage) -> int:
    """In this process, one rank. Returns the exit code."""
    return rank_main(config, stage.name, Topology())


def local(config: Experiment, stage: Stage) -> int:
    """config.local.ranks processes on this machine. The first that fails ends the others. Returns the exit code."""
    ranks = config.local.ranks
    if ranks == 1 or not stage.parallel:
        return inline(config, stage)
    folder = config.directory / "jobs" / stage.name
    rundir.atomic_write(folder / "config.yaml", hpc_config.to_yaml(config).encode())
    common = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _free_port(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // ranks)),
    }
    processes = []
    for rank in range(ranks):
        env = os.environ | {k: str(v) for k, v in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        command = [sys.executable, "-m", "launch", "rank", str(folder / "config.yaml"), stage.name]
        # Rank 0 speaks to the terminal, the others into files. Their own session: Ctrl-C reaches us, and we pass it on.
        out = None if rank == 0 else open(folder / f"rank-{rank}.log", "ab")  # noqa: SIM115
        processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True))
        if out:
            out.close()
    return _watch(processes, folder)


def _watch(processes: list[subprocess.Popen], folder: Path) -> int:
    def forward(number, _frame):
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    try:
        while True:
            codes = [p.poll() for p in processes]
            failed = [(rank, c) for rank, c in enumerate(codes) if c]
            if failed:
                time.sleep(0.5)  # ranks that end together say why themselves
                break
            if all(c == 0 for c in codes):
                return errors.DONE
            time.sleep(0.05)
        deadline = time.monotonic() + 15  # ranks that stop together for the same reason need no killing
        while time.monotonic() < deadline and any(p.poll() is None for p in processes) and failed[0][1] > 0:
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
    rank, code = failed[0]
    if code < 0:
        print(
            f"lesiongen: rank {rank} was killed by {signal.Signals(-code).name}; its log is "
            f"{folder / f'rank-{rank}.log' if rank else 'above'}. Run the same command again to go on.",
            file=sys.stderr,
        )
        return errors.FAILED
    if rank and code == errors.FAILED:
        print(f"lesiongen: rank {rank} failed; its log is {folder / f'rank-{rank}.log'}.", file=sys.stderr)
    return code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ----------------------------------------------------------------------------------------------------------- Slurm


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
    if not dry and not shutil.which("sbatch"):
        raise UserError("There is no sbatch on this machine. Submit from a login node of the cluster, or look with --dry.")
    _check_ranks(config, cluster, todo)
    sent: dict[str, str] = {}
    for stage in todo:
        folder = (config.directory / "jobs" / stage.name).absolute()
        waits = [sent[name] for name in stage.needs if name in sent]
        executor = _executor(config, cluster, stage, folder, waits)
        if dry:
            sent[stage.name] = f"<{stage.name}>"
            print(f"# {'-' * 20} {stage.name}\n" + executor._make_submission_file_text(executor._submitit_command_str, "dry"))
            continue
        job = executor.submit(StageJob(hpc_config.to_yaml(config), stage.name))
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
        setup=[*cluster.setup, *exports],
        # One dead rank ends the step: the others would wait for it in a collective.
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={own.cpus_per_task}"],
        additional_parameters=extra,
    )
    return executor


def resubmission(job: StageJob):
    """What submitit wants back from a job's checkpoint()."""
    return submitit.helpers.DelayedSubmission(job)


def _check_ranks(config: Experiment, cluster: ClusterConfig, todo: list[Stage]) -> None:
    """A batch that does not divide is found before the queue, not after it."""
    for stage in todo:
        ranks = cluster.resources(stage).ranks
        if stage.name == "tokenizer":
            check_ranks(config.tokenizer.train, ranks, "tokenizer.train")
        elif stage.trains:
            level = stage.name.removeprefix("prior-")
            check_ranks(config.prior(level).train, ranks, f"priors.{level}.train")


EXECUTORS = {"inline": inline, "local": local, "slurm": slurm}
