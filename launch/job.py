"""A stage as a Slurm job: the object that submitit pickles on submission and calls on every rank when the job starts.

A signal can arrive while a rank is still importing modules, which takes seconds. Until the imports are done, USR2 and TERM
keep the system's default action and kill the process. Nothing is lost, because no work has been done yet. A Python handler
would instead run in the middle of an import, with half-initialised modules. srun reports the signal, and the last line of
the batch script (launch/requeue.py) requeues the job.

This module imports nothing of the project at its top, so that unpickling the job is quick and cannot fail.
"""

import contextlib
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

CHECK = "check"


@dataclass
class StageJob:
    """One stage of a resolved config. Every rank calls the object. After a requeue, calling it again resumes the stage.

    Attributes:
        config_yaml: The resolved config.
        stage: The stage's name.
        folder: The job's directory, where each rank records its exit code.
        out: Directory of the result; "" for the stage's directory in the run.
        code: Directory of the code that the job is to run.
        task: Number of this job among the tasks of a Slurm array, each of which makes a part of the result by itself.
        tasks: Number of tasks; 0 for a job that is no array.
    """

    config_yaml: str
    stage: str  # for a job that checks the nodes, CHECK
    folder: str
    out: str
    code: str
    task: int = 0
    tasks: int = 0

    def __call__(self) -> NoReturn:
        """Runs the stage on this rank, and ends the process with the exit code."""
        # submitit has installed a handler that ignores TERM. It installs none for USR2: see launch/executors.py.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        from hpc import errors
        from launch import requeue

        code = self._run()
        if code != errors.DONE:
            requeue.record_exit_code(Path(self.folder), code)
        # Exit at once. submitit would write a result that nobody reads, which fails on a full disk. The normal shutdown of the
        # interpreter would wait for ranks that have already exited. Slurm ends the data workers.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def _run(self) -> int:
        """Runs the stage on this rank and returns the exit code."""
        from hpc import config as hpc_config
        from hpc import dist
        from hpc.errors import UserError
        from launch.endings import exit_code_of, print_error, print_in_any_encoding
        from launch.rank import rank_main
        from lesiongen.experiment import Experiment

        print_in_any_encoding()
        if self.code != str(Path(hpc_config.__file__).parents[1]):  # Python 3.10 has no PYTHONSAFEPATH
            print(f"warning: this job runs the code in {Path(hpc_config.__file__).parents[1]}, not that of its submission")
        try:
            config = hpc_config.from_plain(Experiment, hpc_config.parse_yaml(self.config_yaml, "the job's config"))
        except UserError as error:  # the code has changed since the job was submitted, and now rejects the config
            print_error(error)
            return exit_code_of(error)
        topology = dist.from_slurm(os.environ)
        if self.stage.startswith(CHECK):
            from launch.check import check_main

            return check_main(config, topology, Path(self.folder))
        if self.tasks:
            rank, world = self.task * topology.world_size + topology.rank, self.tasks * topology.world_size
            topology = replace(topology, rank=rank, world_size=world, nodes=self.tasks * topology.nodes)
        return rank_main(config, self.stage, topology, Path(self.out) if self.out else None, bool(self.tasks))
