"""Runs the pipeline as jobs on a real Slurm: dependencies, two nodes, requeueing, a lost node, and refusals."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hpc.run import metrics_log, rundir
from hpc.run.rundir import read_stage_record
from tests.conftest import DEMO, tiny
from tests.slurm.conftest import lesiongen, wait

LOCAL = str(Path(DEMO).parent / "cluster" / "local.yaml")
COMMAND = [sys.executable, "-m", "launch"]  # the lesiongen command in a process of its own
STAGES = ["shards", "tokenizer", "codes", "prior-top", "prior-bottom", "samples", "report"]


def submit(*arguments) -> dict[str, str]:
    """Submits the pipeline. Returns {stage: job id}."""
    return dict(re.findall(r"^(\S+) +job (\d+)$", lesiongen("submit", DEMO, *arguments), re.MULTILINE))


def cluster_file(folder: Path, **more) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(Path(LOCAL).read_text()) | more))
    return path


def state(cluster, job: str) -> str:
    return cluster.job(job).get("JobState", "")


def wait_until_completed(cluster, jobs, seconds: float) -> None:
    def settled():
        states = [state(cluster, j) for j in jobs]
        assert not {"FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY"} & set(states), states
        return states == ["COMPLETED"] * len(jobs)

    wait(settled, seconds, f"jobs {jobs} to complete")


def curve(stage: Path, names=("train/loss", "val/mse")) -> dict:
    return {(r["samples"], n): r[n] for r in metrics_log.read_metrics(stage) for n in names if n in r}


def files(run: Path) -> set[str]:
    """Returns the files that the stages wrote, without logs, locks and the files of MLflow's follower.

    What a prior's picture can show depends on the priors that are trained by then, so these pictures are left out too.
    """
    found = {p.relative_to(run) for p in run.rglob("*") if p.is_file() and not p.parent.match("prior-*/images")}
    return {str(p) for p in found if p.parts[0] in ("config.yaml", *STAGES) and p.name != ".lock"}


def test_the_pipeline_as_jobs_makes_what_run_makes(cluster, phantoms, tmp_path):
    """Jobs write the same results as `lesiongen run`, although two nodes pack the shards."""
    command = [*COMMAND, "run", DEMO, *tiny(phantoms, tmp_path / "local")]
    local_run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    nodes = cluster_file(tmp_path, stages={"shards": {"nodes": 2, "tasks_per_node": 2}})
    jobs = submit("--cluster", nodes, *tiny(phantoms, tmp_path / "slurm"))
    assert list(jobs) == STAGES
    local, slurm = tmp_path / "local" / "tiny", tmp_path / "slurm" / "tiny"
    assert f"job {jobs['report']} PENDING (Dependency)" in lesiongen("status", slurm)
    output, _ = local_run.communicate(timeout=200)
    assert local_run.returncode == 0, output
    wait_until_completed(cluster, jobs.values(), 200)
    for stage in STAGES:
        assert read_stage_record(local / stage)["digest"] == read_stage_record(slurm / stage)["digest"], stage
    assert files(local) == files(slurm)
    for stage in ("tokenizer", "prior-top", "prior-bottom"):
        assert curve(local / stage) == curve(slurm / stage)
    for image in (local / "samples" / "images").rglob("*.png"):
        assert image.read_bytes() == (slurm / image.relative_to(local)).read_bytes()
    assert (tmp_path / "local" / "mlflow.db").exists()
    assert not (tmp_path / "slurm" / "mlflow.db").exists(), "a compute node wrote to SQLite"
    times = {stage: cluster.job(jobs[stage]) for stage in ("prior-top", "prior-bottom")}
    assert max(t["StartTime"] for t in times.values()) < min(t["EndTime"] for t in times.values())
    assert lesiongen("status", slurm).count(" done ") == len(STAGES)
    assert "everything is done" in lesiongen("submit", DEMO, "--cluster", LOCAL, *tiny(phantoms, tmp_path / "slurm"))


@pytest.mark.long
def test_two_nodes_stop_together_and_go_on_as_if_undisturbed(cluster, phantoms, packed, tmp_path):
    """Also tests that dependent jobs wait for a requeued job, and that a stage without training is requeued too."""
    own = {"inputs.shards": packed, "tokenizer.train.engine.zero": 2, "tokenizer.train.samples": 2560}
    own |= {"tokenizer.train.log_every": 80, "tokenizer.train.eval_every": 1280, "tokenizer.train.save_every": 2560}
    own |= {"priors.top.train.samples": 100_000, "priors.bottom.train.samples": 100_000}
    local, slurm = (tiny(phantoms, tmp_path / runs, **own) for runs in ("local", "slurm"))
    nodes = cluster_file(tmp_path, stages={"tokenizer": {"nodes": 2, "tasks_per_node": 2}})
    undisturbed = subprocess.Popen([*COMMAND, "train", "tokenizer", DEMO, *local, "local.ranks=4"], stderr=subprocess.DEVNULL)
    jobs, run = submit("--cluster", nodes, *slurm), tmp_path / "slurm" / "tiny"
    refused = lesiongen("submit", DEMO, "--cluster", nodes, *slurm, code=2)
    assert f"tokenizer (job {jobs['tokenizer']})" in refused
    wait(lambda: len(curve(run / "tokenizer")) >= 8, 90, "some steps")
    assert cluster.job(jobs["tokenizer"])["NodeList"] == "n[1-2]"
    assert re.search(rf"tokenizer +started +█* +\d+%.*job {jobs['tokenizer']} RUNNING", lesiongen("status", run))
    cluster.run("scancel", "--signal=USR2", jobs["tokenizer"])
    wait(lambda: state(cluster, jobs["tokenizer"]) == "PENDING", 30, "the requeue")
    stopped = curve(run / "tokenizer")
    assert 8 <= len(stopped) < 32, "the training did not stop in the middle"
    assert len(list((run / "tokenizer" / "checkpoints").glob("step-*/MANIFEST.json"))) == 1
    wait_until_completed(cluster, [jobs["tokenizer"]], 120)
    assert undisturbed.wait(60) == 0
    expected, found = (curve(tmp_path / runs / "tiny" / "tokenizer") for runs in ("local", "slurm"))
    assert stopped.items() <= found.items()
    assert found == pytest.approx(expected, rel=1e-6)

    started = run / "jobs" / "codes" / f"{jobs['codes']}_0_log.out"
    wait(lambda: started.exists() and started.stat().st_size, 30, "the job of codes to start")
    cluster.run("scancel", "--signal=USR2", jobs["codes"])
    wait_until_completed(cluster, [jobs["codes"]], 60)
    assert cluster.job(jobs["codes"])["Restarts"] == "1"
    assert "back in the queue" in lesiongen("logs", run, "--stage", "codes")

    wait(lambda: state(cluster, jobs["prior-top"]) == "RUNNING", 30, "the job of prior-top to start")
    cancelled = lesiongen("cancel", run)
    assert jobs["prior-top"] in cancelled
    assert jobs["report"] in cancelled
    assert jobs["codes"] not in cancelled
    rest = [jobs[s] for s in ("prior-top", "prior-bottom", "samples", "report")]
    wait(lambda: [state(cluster, j) for j in rest] == ["CANCELLED"] * 4, 30, "all to be cancelled")
    assert "no jobs to cancel" in lesiongen("cancel", run)


@pytest.mark.long
@pytest.mark.parametrize("which", ["first", "other"])
def test_a_lost_node_costs_no_more_than_the_steps_since_the_checkpoint(cluster, phantoms, packed, tmp_path, which):
    """first: the node of the batch script is lost, and Slurm requeues the job.

    other: the other node is lost, the remaining ranks fail, and the batch script requeues the job.
    """
    own = {"inputs.shards": packed, "tokenizer.train.samples": 3200, "tokenizer.train.log_every": 160}
    own |= {"tokenizer.train.eval_every": 3200, "tokenizer.train.save_every": 320}
    nodes = cluster_file(tmp_path, stages={"tokenizer": {"nodes": 2}})
    jobs, run = submit("--cluster", nodes, *tiny(phantoms, tmp_path, **own)), tmp_path / "tiny"
    checkpoints = run / "tokenizer" / "checkpoints"
    wait(lambda: len(list(checkpoints.glob("step-*/MANIFEST.json"))) > 1, 90, "two checkpoints")
    names = cluster.job(jobs["tokenizer"])["NodeList"]
    assert names == "n[1-2]"
    lost = "n1" if which == "first" else "n2"
    saved = max(p.parent.name for p in checkpoints.glob("step-*/MANIFEST.json"))
    try:
        cluster.kill_node(lost)
        wait_until_completed(cluster, [jobs["tokenizer"]], 150)
        assert lost not in cluster.job(jobs["tokenizer"])["NodeList"]
        assert cluster.job(jobs["tokenizer"])["Restarts"] == "1"
    finally:
        cluster.start_node(lost)
        lesiongen("cancel", run)
    rows = metrics_log.read_metrics(run / "tokenizer")
    assert [r["samples"] for r in rows if "train/loss" in r] == list(range(160, 3201, 160))
    assert int(saved.removeprefix("step-")) * 16 < 3200, "the training had ended before the node was lost"


@pytest.fixture
def without_scontrol(tmp_path) -> str:
    """Returns a PATH with the Slurm commands that a job needs, except scontrol."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "srun", "squeue", "bash", "date", "timeout"):
        (folder / name).write_text(f'#!/bin/sh\nexec {shutil.which(name)} "$@"\n')
        (folder / name).chmod(0o755)
    return str(folder)


def test_without_scontrol_a_job_and_those_after_it_are_submitted_again(cluster, phantoms, tmp_path, without_scontrol):
    """Also tests that a job waits for a stage in use, and that it knows when its allocation ends."""
    settings, run = tiny(phantoms, tmp_path), tmp_path / "tiny"
    jobs = submit("--cluster", cluster_file(tmp_path, environment={"PATH": without_scontrol}), *settings)
    log = run / "jobs" / "shards" / f"{jobs['shards']}_0_log"
    with rundir.lock(run / "shards"):
        wait(lambda: "waiting up to 300 s" in read(log.with_suffix(".err")), 60, "the job to meet the lock")
        environments = [environment(pid) for pid in cluster.job_processes()]
        ends = {int(e["SLURM_JOB_END_TIME"]) for e in environments if "SLURM_JOB_END_TIME" in e}
        assert ends == {int(cluster.run("date", "-d", cluster.job(jobs["shards"])["EndTime"], "+%s").stdout)}
        cluster.run("scancel", "--signal=USR2", jobs["shards"])
        wait(lambda: state(cluster, jobs["shards"]) == "FAILED", 30, "the job to end")
    assert cluster.job(jobs["shards"])["ExitCode"] == "75:0"
    logs = lesiongen("logs", run, "--stage", "shards")
    replaced = re.findall(r"(\d+) as (\d+)", re.search(r"cannot be requeued \(scontrol is not installed .*", logs)[0])
    assert [old for old, _ in replaced] == list(jobs.values())
    wait(lambda: state(cluster, jobs["report"]) == "CANCELLED", 30, "the old dependents to be cancelled")
    new = dict(zip(STAGES, (job for _, job in replaced), strict=True))
    assert f"job {new['report']} PENDING (Dependency)" in lesiongen("status", run)
    wait_until_completed(cluster, [new["shards"]], 60)
    wait(lambda: state(cluster, new["tokenizer"]) in ("RUNNING", "COMPLETED"), 30, "the next job to start")
    assert new["report"] in lesiongen("cancel", run)


def read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def environment(pid: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        return dict(v.split("=", 1) for v in read(Path(f"/proc/{pid}/environ")).split("\0") if "=" in v)
    return {}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, which holds less than the stages write."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine does not allow to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder])


@pytest.mark.long
def test_a_full_disk_sends_a_job_back_until_there_is_space(cluster, phantoms, tmp_path, small_disk):
    own = {"tokenizer.train.samples": 640, "tokenizer.train.save_every": 320}
    filler = small_disk / "filler"
    two_ranks = cluster_file(tmp_path, stages={"tokenizer": {"tasks_per_node": 2}})
    jobs, run = submit("--cluster", two_ranks, *tiny(phantoms, small_disk, **own)), small_disk / "tiny"
    wait_until_completed(cluster, [jobs["shards"]], 60)
    job = jobs["tokenizer"]
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - 200_000)  # room for logs and small files
    wait(lambda: cluster.job(job)["Restarts"] == "1" and state(cluster, job) == "PENDING", 120, "the job to be sent back")
    assert cluster.job(job)["Reason"] == "BeginTime"
    logs = lesiongen("logs", run, "--stage", "tokenizer")
    assert "lesiongen: the disk is full. Everything that was finished is intact." in logs
    assert "found the disk full or its stage in use; back in the queue, to resume in 2 minutes" in logs
    assert "Traceback" not in logs
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_until_completed(cluster, [job], 120)
    lesiongen("cancel", run)


@pytest.mark.long
@pytest.mark.parametrize("cause", ["preempted", "out of time", "out of time without a signal"])
def test_slurm_itself_stops_a_job(cluster, phantoms, packed, tmp_path, cause):
    """Slurm stops the job for a job of a higher partition that needs all nodes, or at the limit of two minutes.

    If no signal arrives before the limit, the ranks stop by the clock.
    """
    samples = 4800 if cause == "preempted" else 200_000
    own = {"inputs.shards": packed, "tokenizer.train.samples": samples, "tokenizer.train.eval_every": samples}
    own |= {"tokenizer.train.save_every": samples, "tokenizer.train.log_every": 160}
    extra = {"signal": "CONT@30"} if cause == "out of time without a signal" else {}
    nodes = cluster_file(tmp_path, default={"minutes": 2, "mem_gb": 4}, signal_seconds=30, extra=extra)
    jobs, run = submit("--cluster", nodes, *tiny(phantoms, tmp_path, **own)), tmp_path / "tiny"
    job = jobs["tokenizer"]
    wait(lambda: len(curve(run / "tokenizer")) > 2, 60, "some steps")
    if cause == "preempted":
        cluster.run("sbatch", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    wait(lambda: cluster.job(job)["Restarts"] == "1", 150, "the requeue")
    stopped = curve(run / "tokenizer")
    assert len(list((run / "tokenizer" / "checkpoints").glob("step-*/MANIFEST.json"))) == 1
    wait(lambda: len(curve(run / "tokenizer")) > len(stopped) + 2, 60, "more steps")
    lesiongen("cancel", run)
    assert stopped.items() <= curve(run / "tokenizer").items()
    logs = read(run / "jobs" / "tokenizer" / f"{job}_0_log.err")
    assert ("stopped by the end of the allocation" in logs) == (cause == "out of time without a signal")
