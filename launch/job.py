"""A stage as a Slurm job: what submitit pickles when the job is submitted, and calls on every rank when it starts.

A signal may come at any moment of the start, which takes seconds of imports. Until the imports are done, USR2 and TERM keep
the system's default action and kill the process: nothing has been done yet that could be lost, and a Python handler that
runs in the middle of an import meets half-initialised modules. srun reports the signal, and the last line of the batch
script (launch/requeue.py) puts the job back into the queue.

This module imports nothing of the project at its top, so that unpickling the job is quick and cannot fail.
"""

import atexit
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass
class StageJob:
    """One stage of a resolved config. Every rank calls it; called again after a requeue, it resumes.

    Attributes:
        config_yaml: The resolved config.
        stage: The stage's name.
        folder: The job's folder, for the exit code of each rank.
    """

    config_yaml: str
    stage: str
    folder: str

    def __call__(self) -> str:
        # submitit has installed a handler that ignores TERM. (It leaves USR2 alone; see launch/executors.py.)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        from hpc import errors
        from launch import requeue

        code = self._run()
        if code != errors.DONE:
            requeue.note_ending(Path(self.folder), code)
            # Exit at once: an orderly shutdown of the interpreter would wait for ranks that are gone.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        # Skip the interpreter's shutdown once submitit has written the result; launch.endings.end says why. Slurm ends
        # the data workers.
        atexit.register(os._exit, code)
        return "done"

    def _run(self) -> int:
        from hpc import config as hpc_config
        from hpc import dist
        from hpc.errors import UserError
        from launch.endings import code_of, explain
        from launch.rank import rank_main
        from lesiongen.experiment import Experiment

        try:
            config = hpc_config.build(Experiment, hpc_config.parse_yaml(self.config_yaml, "the job's config"))
        except UserError as error:  # the code has changed since the job was submitted
            explain(error)
            return code_of(error)
        return rank_main(config, self.stage, dist.from_slurm(os.environ))
