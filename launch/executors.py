"""Executors, which run a stage: in this process, as several ranks on this machine, or as a Slurm job.

No other file imports submitit. The batch script of a Slurm job ends with launch/requeue.py, which requeues the job if the stage
is not done. launch/pipeline.py and launch/commands.py call the executors.
"""

import shlex
from dataclasses import replace
from pathlib import Path

import submitit

from hpc import config as hpc_config
from hpc.dist import Topology
from hpc.errors import UserError
from launch import slurm, snapshot
from launch.cluster import ClusterConfig, Resources
from launch.job import CHECK, StageJob
from launch.local import run_ranks
from launch.rank import rank_main
from launch.requeue import ASK_HOST
from lesiongen.experiment import Experiment
from lesiongen.stages.base import Stage, digest_of, is_being_packed, packed_locations

# Line of the batch script. hpc/train/preempt.py reads the variable, which Slurm itself sets only in newer versions.
FIND_END_TIME = (
    'end=$(SLURM_TIME_FORMAT=%s timeout 20 squeue -h -j "$SLURM_JOB_ID" -o %e)'
    " && [[ $end =~ ^[0-9]+$ ]] && export SLURM_JOB_END_TIME=$end"
)
MAX_TASKS = 100_000  # of an array that may run at once; submitit's default is 256
CHECK_MINUTES = 10  # time limit of a job that checks the nodes


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


class _SlurmExecutor(submitit.SlurmExecutor):
    """submitit's executor, changed so that `submit --dry` works where Slurm is not installed."""

    @classmethod
    def affinity(cls) -> int:
        return 2  # 2 = available; submitit's own method returns -1 where srun is not installed


def awaited_jobs(config: Experiment) -> dict[str, str]:
    """Returns the results of other runs that jobs are still making: {name of the result: id of the job}."""
    unfinished = [path for path in packed_locations(config) if is_being_packed(path)] if config.inputs.shards else []
    others = {"shards": unfinished[0]} if len(unfinished) == 1 else {}  # more than one would need more than one job
    for name in ("tokenizer", "codes", "polish"):
        if (other := getattr(config.inputs, name)) and digest_of(config, name) is None:
            others[name] = other
    found = {}
    for name, other in others.items():
        run_dir = Path(other) if (Path(other) / "jobs").is_dir() else Path(other).parent
        job = slurm.last_job(run_dir, name)
        if job and slurm.may_be_running(job):
            found[name] = job
    return found


class Submission:
    """Submits the jobs of one run, one after another. If Slurm refuses a job, the jobs submitted before it are cancelled.

    Attributes:
        jobs: The jobs so far: {name of the stage, or of the check: job id}. In a dry run the ids are placeholders.
    """

    def __init__(self, config: Experiment, cluster: ClusterConfig, dry: bool = False):
        """Writes the code that the jobs are to run into the run directory.

        Args:
            config: The run's config.
            cluster: The cluster file's content.
            dry: Whether to print the batch scripts and submit nothing.
        """
        self.config, self.cluster, self.dry = config, cluster, dry
        self.jobs: dict[str, str] = {}
        self.code = snapshot.location(config.directory) if dry else snapshot.write(config.directory)

    def stages(
        self, todo: list[Stage], awaited: dict[str, str] | None = None, check: bool = False, after: tuple[str, ...] = ()
    ) -> dict[str, str]:
        """Submits a job for each stage. Each job waits for the jobs of the stages that it needs, also for those of other runs.

        Args:
            todo: The stages to submit, upstream first.
            awaited: The jobs of other runs to wait for, from awaited_jobs().
            check: Whether a small job that checks the nodes comes before the stages that have the same resources.
            after: Ids of jobs that must have ended, in whatever way, before a stage begins.

        Returns:
            The jobs.

        Raises:
            UserError: Slurm refuses a job.
        """
        checks: list[tuple[Resources, str]] = []
        for stage in todo:
            resources = self.cluster.resources(stage)
            dependencies = [others[name] for name in stage.needs for others in (self.jobs, awaited or {}) if name in others]
            if check:
                short = replace(resources, minutes=min(resources.minutes, CHECK_MINUTES))
                known = next((job for checked, job in checks if checked == short), None)
                if known is None:
                    known = self.submit(f"{CHECK}-{len(checks) + 1}" if checks else CHECK, short, [], requeue=False)
                    checks.append((short, known))
                dependencies.append(known)
            self.submit(stage.name, resources, dependencies, after=after)
        return self.jobs

    def samples(self, stage: Stage, out: Path, tasks: int = 0) -> dict[str, str]:
        """Submits a job that samples into a directory of the run which is not that of its stage.

        Args:
            stage: The stage that samples.
            out: The directory.
            tasks: Number of tasks of a Slurm array that comes first. Each task samples a part; the job finishes, and makes
                what tasks that failed have left out.

        Returns:
            The jobs.
        """
        resources, after = self.cluster.resources(stage), ()
        if tasks > 1:  # tasks are not requeued: the job makes what they leave out
            array = self.submit(f"{out.name}-parts", resources, [], requeue=False, out=out, stage=stage.name, tasks=tasks)
            after = (array,)
        self.submit(out.name, resources, [], out=out, stage=stage.name, after=after)
        return self.jobs

    def submit(
        self,
        name: str,
        resources: Resources,
        dependencies: list[str],
        requeue: bool = True,
        out: Path | None = None,
        stage: str | None = None,
        after: tuple[str, ...] = (),
        tasks: int = 0,
    ) -> str:
        """Submits one job, or an array of jobs, and returns its id.

        Args:
            name: Name of the job, and of its directory in jobs/.
            resources: What it requests.
            dependencies: Ids of the jobs that must succeed first.
            requeue: Whether a job that stops early or fails goes back into the queue.
            out: Directory of the result; None for the stage's directory in the run.
            stage: Name of the stage to run, if it is not `name`.
            after: Ids of jobs that must have ended, in whatever way.
            tasks: Number of tasks of an array, each of which makes a part of the result; 0 for one job.

        Raises:
            UserError: Slurm refuses the job.
        """
        folder = (self.config.directory / "jobs" / name).absolute()
        executor = self._executor(name, resources, folder, dependencies, after, requeue)
        if self.dry:
            self.jobs[name] = f"<{name}>"
            print(f"# {'-' * 20} {name}\n" + executor._make_submission_file_text(executor._submitit_command_str, "dry"))
            return self.jobs[name]
        job = StageJob(hpc_config.to_yaml(self.config), stage or name, str(folder), str(out or ""), str(self.code))
        try:
            with slurm.without_allocation(), executor.batch():  # submitit makes an array of several jobs
                submitted = [executor.submit(replace(job, task=task, tasks=tasks)) for task in range(tasks or 1)]
            self.jobs[name] = submitted[0].job_id.partition("_")[0]
        except submitit.core.utils.FailedJobError as error:
            # Do not leave half of a pipeline in the queue.
            if self.jobs:
                slurm.run("scancel", *self.jobs.values())
            reason = " ".join(line for line in str(error).splitlines() if "sbatch" in line) or str(error)
            raise UserError(
                f"Slurm refuses the job of {name}; the jobs submitted before it were cancelled. Slurm's reason: {reason}"
            ) from None
        slurm.record_job(self.config.directory, name, self.jobs[name], dependencies)
        return self.jobs[name]

    def _executor(
        self,
        name: str,
        resources: Resources,
        folder: Path,
        dependencies: list[str],
        after: tuple[str, ...],
        requeue: bool,
    ) -> _SlurmExecutor:
        """Returns an executor that submits a job; arguments as for submit(). `folder` is for script, pickled job and logs."""
        cluster = self.cluster
        extra = {"requeue": True} | resources.options()
        # Slurm reads a comma as "and". A dependency of the user's holds for every stage.
        conditions = [f"{word}:{':'.join(jobs)}" for word, jobs in (("afterok", dependencies), ("afterany", after)) if jobs]
        if conditions:
            own = [str(extra["dependency"])] if "dependency" in extra else []
            extra |= {"dependency": ",".join([*conditions, *own]), "kill-on-invalid-dep": "yes"}
        exports = [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
        # The job runs the code as it was on submission: the snapshot comes before an installed lesiongen, and without the
        # second line Python would look into the job's working directory first, which may be a clone.
        exports.append(f"export PYTHONPATH={shlex.quote(str(self.code))}${{PYTHONPATH:+:$PYTHONPATH}}")
        exports.append("export PYTHONSAFEPATH=1")
        python = f"{cluster.container} {cluster.python or 'python3'}" if cluster.container else cluster.python
        executor = _SlurmExecutor(folder=folder, python=python)
        decide = f"{executor.python} -m launch.requeue {shlex.quote(str(folder))} $code"
        end = f"exec {decide}" if requeue else "exit $code"
        if requeue and cluster.container:  # an image rarely has Slurm's commands: the batch script runs outside, and has them
            ask = f'[ $code = {ASK_HOST} ] && scontrol requeue "$SLURM_JOB_ID" && sleep 600'
            end = f"{{ {decide}; code=$?; {ask}; exit $code; }}"
        executor.update_parameters(
            job_name=f"{self.config.name}:{name}",
            signal_delay_s=cluster.signal_seconds,
            # The batch script must survive the signals that are meant for its ranks, because its last line requeues the job.
            # So trap sets the no-op handler ":". The ranks do not inherit a handler, but they would inherit an ignored signal.
            # submitit installs its own handler for the signal in SUBMITIT_PREEMPT_SIGNAL. Name USR1, which nobody sends, so
            # that hpc/train/preempt.py can handle USR2.
            setup=["trap : TERM USR2", "export SUBMITIT_PREEMPT_SIGNAL=USR1", *cluster.setup, *exports, FIND_END_TIME],
            # From here on the signals are ignored. The Python process of launch/requeue.py inherits this. If a signal killed
            # that process, the job would not be requeued.
            teardown=["code=$?", "trap '' TERM USR2", f"[ $code = 0 ] || {end}"],
            # If a rank dies, srun ends the other ranks, which would otherwise wait for the dead rank in a collective. The
            # other ranks have 30 seconds to print why they end.
            srun_args=["--wait=30", f"--cpus-per-task={resources.cpus_per_task}", *resources.srun],
            wckey=None,  # submitit's own default names itself, which clusters with accounting by wckey refuse
            array_parallelism=MAX_TASKS,
            nodes=resources.nodes,
            ntasks_per_node=resources.tasks_per_node,
            additional_parameters=extra,
        )
        return executor
