"""What submitit pickles: __call__ and checkpoint(), nothing else."""

import atexit
import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass
class StageJob:
    """One stage of a resolved config, as a Slurm job with its folder. Every rank runs it; called again, it resumes."""

    config_yaml: str
    stage: str
    folder: str

    def __call__(self) -> str:
        from hpc import errors
        from hpc.train import preempt
        from launch import requeue

        try:
            with preempt.interruptible():  # before the imports, which take seconds
                code = self._run()
        except KeyboardInterrupt:
            code = errors.RESUMABLE
        if code != errors.DONE:
            requeue.note_ending(Path(self.folder), code)
            # At once: an interpreter that is shut down in order waits for the ranks that are gone.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        # After submitit has written the result; why is said in launch.work.end. Slurm ends the data workers.
        atexit.register(os._exit, code)
        return "done"

    def _run(self) -> int:
        from hpc import config as hpc_config
        from hpc import dist
        from hpc.errors import UserError
        from launch.work import code_of, explain, rank_main
        from lesiongen.experiment import Experiment

        try:
            config = hpc_config.build(Experiment, hpc_config.parse_yaml(self.config_yaml, "the job's config"))
        except UserError as error:  # the code has changed since the job was submitted
            explain(error)
            return code_of(error)
        return rank_main(config, self.stage, dist.from_slurm(os.environ))

    def checkpoint(self):
        """For a signal in the moment before __call__: run it again."""
        from launch.executors import resubmission

        return resubmission(self)
