"""What submitit pickles: __call__ and checkpoint(), nothing else."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

MAX_FAILURES = 3  # failures without a new checkpoint between them; preemptions are not counted


@dataclass
class StageJob:
    """One stage of a resolved config, as a Slurm job. Every rank runs it; it resumes by being called again."""

    config_yaml: str
    stage: str

    def __call__(self) -> str:
        from hpc import config as hpc_config
        from hpc import dist, errors
        from hpc.preempt import requeue
        from launch.work import rank_main
        from lesiongen.experiment import Experiment

        config = hpc_config.build(Experiment, hpc_config.parse_yaml(self.config_yaml, "the job's config"))
        topology = dist.detect()
        code = rank_main(config, self.stage, topology)
        if code == errors.DONE:
            return "done"
        again = code == errors.RESUMABLE and topology.leader
        if code == errors.FAILED:
            again = _may_retry(config.directory, self.stage)
        if again and (refused := requeue()):
            print(f"lesiongen: not requeued ({refused}); submit again to go on from the last checkpoint", file=sys.stderr)
            again = False
        if again or (code == errors.RESUMABLE and not topology.leader):
            # An exit now would fail the jobs that depend on this one: wait for Slurm to end it.
            print("lesiongen: requeued, waiting to be ended", file=sys.stderr, flush=True)
            time.sleep(300)
        sys.exit(code)

    def checkpoint(self):
        """For a signal that comes before the stage has its own handlers: run it again."""
        from launch.executors import resubmission

        return resubmission(self)


def _may_retry(run: Path, stage: str) -> bool:
    from hpc import checkpoint, journal

    path = run / "jobs" / stage / "failures.jsonl"
    saved = checkpoint.found(run / stage / "checkpoints")
    at = saved[-1].name if saved else "start"
    journal.append(path, {"at": at, "job": os.environ.get("SLURM_JOB_ID"), "time": time.time()})
    return sum(1 for entry in journal.read(path) if entry["at"] == at) < MAX_FAILURES
