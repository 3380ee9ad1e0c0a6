"""A signal at any moment of a job's start: the job ends as stopped early, and goes back into the queue.

The moments are counted in audit events of Python (imports and opened files), so that they are the same on every machine.
"""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from hpc import errors
from tests.conftest import DEMO, tiny
from tests.slurm.conftest import lesiongen, wait

LOCAL = Path(DEMO).parent / "cluster" / "local.yaml"
# Phases of a start, each with what ends it and the number of moments in it: what a signal met there has differed.
PHASES = {"submitit": 4, "project": 8, "torch": 4, "stage": 4}
# Python imports a module of this name by itself. In a rank of a job it sends the process the signal at event number MOMENT
# (0: never), and writes down the number of the first event after each phase.
HOOK = """
import os, sys
if "submitit.core._submit" in sys.orig_argv:
    ends = {"launch.job": "submitit", "torch": "project", "lesiongen.stages": "torch", "catalog.csv": "stage"}
    count, moment, number = [0], int(os.environ["MOMENT"]), int(os.environ["SIGNAL"])
    def hook(event, arguments):
        if event not in ("import", "open"):
            return
        count[0] += 1
        now = count[0]  # what follows opens a file itself
        reached = {ends.pop(str(arguments[0]).rpartition("/")[2], None), "signal" if now == moment else None} - {None}
        if reached:
            with os.fdopen(os.open(os.environ["EVENTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as file:
                for what in reached:
                    print(what, now, file=file)
        if now == moment and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            os.kill(os.getpid(), number)
    sys.addaudithook(hook)
"""


@pytest.fixture
def hooked(tmp_path, monkeypatch) -> Path:
    """Arms the hook for whatever Python starts; returns the file that it writes into."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"))
    monkeypatch.setenv("EVENTS", str(tmp_path / "events"))
    return tmp_path / "events"


@pytest.fixture
def scripts(tmp_path, monkeypatch, phantoms) -> list[Path]:
    """The batch scripts of two packing jobs; stand-ins for Slurm's commands.

    srun runs one rank here and reports it as srun does. sbatch queues nothing. scontrol refuses to requeue a job, and sbatch to
    submit it again.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    rank = "export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_NUM_NODES=1"
    rank += " SLURM_STEP_NODELIST=localhost SLURM_JOB_NODELIST=localhost"
    skip = 'while [ "${1#-}" != "$1" ]; do case $1 in --output|--error) shift;; esac; shift; done'
    no_more = "[ $1 != --parsable ] || { echo no more jobs >&2; exit 1; }"
    commands = {
        "srun": f'{skip}\n{rank}\n"$@"\nexit $?',
        "squeue": "exit 1",
        "sbatch": f"{no_more}; cd {tmp_path}; echo x >> calls; echo Submitted batch job $(wc -l < calls)",
        "scontrol": "[ $1 = show ] && echo JobState=RUNNING && exit; echo requeueing is disabled >&2; exit 1",
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    for name in ("a", "b"):
        lesiongen("submit", DEMO, "--cluster", LOCAL, *tiny(phantoms, tmp_path / "runs", name=name))
    return [next((tmp_path / "runs" / name / "jobs" / "shards").glob("*_submission.sh")) for name in ("a", "b")]


def run(script: Path, moment: int, number: int = 0) -> subprocess.Popen:
    """Starts the batch script from nothing; its rank gets the signal at the moment."""
    shutil.rmtree(script.parents[2] / "shards", ignore_errors=True)
    (script.parent / "attempts.jsonl").unlink(missing_ok=True)
    job = script.name.partition("_")[0]
    environment = os.environ | {"MOMENT": str(moment), "SIGNAL": str(number), "SLURM_JOB_ID": job}
    return subprocess.Popen(["bash", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.long
def test_a_signal_at_any_moment_of_the_start_leaves_a_stage_that_resumes(scripts, hooked):
    undisturbed = run(scripts[0], 0)
    output, _ = undisturbed.communicate(timeout=120)
    assert undisturbed.returncode == 0, output
    ends = dict(line.split() for line in hooked.read_text().splitlines())
    assert list(ends) == list(PHASES)
    moments, begin = [], 1
    for phase, number in PHASES.items():
        end = int(ends[phase])
        moments += [begin + (end - begin) * i // number for i in range(number)]
        begin = end
    for pair in zip(moments[::2], moments[1::2], strict=True):  # two at a time, on two cores; USR2 and TERM in turn
        signals = (signal.SIGUSR2, signal.SIGTERM)
        started = [run(script, *at) for script, *at in zip(scripts, pair, signals, strict=True)]
        for moment, process in zip(pair, started, strict=True):
            output, _ = process.communicate(timeout=120)
            assert process.returncode == errors.RESUMABLE, f"at event {moment}; phases end at {ends}\n{output}"
            assert "stopped early; not requeued (requeueing is disabled; no more jobs)" in output
            assert "Traceback" not in output
    assert hooked.read_text().count("signal") == len(moments)
    assert run(scripts[1], 0).wait(120) == 0


@pytest.mark.long
def test_slurm_requeues_a_job_that_is_signalled_while_it_starts(cluster, hooked, phantoms, tmp_path, monkeypatch):
    """The same on the real Slurm: 20 jobs, each stopped at another moment, are requeued once and complete."""
    jobs = {}
    for i in range(sum(PHASES.values())):
        monkeypatch.setenv("MOMENT", str(1 + 250 * i))
        monkeypatch.setenv("SIGNAL", str(int((signal.SIGUSR2, signal.SIGTERM)[i % 2])))
        said = lesiongen("submit", DEMO, "--cluster", LOCAL, *tiny(phantoms, tmp_path, name=f"start-{i}"))
        job, *others = (line.rpartition(" ")[2] for line in said.splitlines() if " job " in line)
        cluster.run("scancel", *others)
        jobs[job] = tmp_path / f"start-{i}"
    wait(lambda: all(cluster.job(j)["JobState"] == "COMPLETED" for j in jobs), 400, "all jobs to complete")
    stopped = hooked.read_text().splitlines()
    assert sum(line.startswith("signal") for line in stopped) >= 15
    for i, (job, folder) in enumerate(jobs.items()):
        assert json.loads((folder / "shards" / "stage.json").read_text())["done"]
        assert cluster.job(job)["Restarts"] == ("1" if f"signal {1 + 250 * i}" in stopped else "0")
