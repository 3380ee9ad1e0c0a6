"""A user's day on a real Slurm: the check of the nodes, the code that jobs run, a sweep, samples by a job."""

import re
from pathlib import Path

import pytest
import yaml

from hpc.run.rundir import read_stage_record
from launch import slurm
from tests.conftest import DEMO, tiny
from tests.slurm.conftest import lesiongen, wait

LOCAL = Path(DEMO).parent / "cluster" / "local.yaml"


def cluster_file(folder: Path, **more) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(LOCAL.read_text()) | more))
    return path


def log_of(run: Path, name: str) -> str:
    return "\n".join(path.read_text() for path in sorted((run / "jobs" / name).glob("*.out")))


def ends(cluster, job: str, seconds: float = 120) -> str:
    """Waits until a job has ended and returns its state."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    return wait(lambda: (found := cluster.job(job).get("JobState", "")) in over and found, seconds, f"job {job} to end")


@pytest.mark.long
def test_a_check_of_the_nodes_comes_first(cluster, phantoms, tmp_path):
    nodes = cluster_file(tmp_path, stages={"shards": {"nodes": 2, "tasks_per_node": 2}})
    out = lesiongen("submit", DEMO, "--cluster", nodes, "--check", "--until", "shards", *tiny(phantoms, tmp_path))
    jobs, run = dict(re.findall(r"^(\S+) +job (\d+)$", out, re.MULTILINE)), tmp_path / "tiny"
    assert list(jobs) == ["check", "shards"]
    assert f"afterok:{jobs['check']}" in cluster.job(jobs["shards"])["Dependency"]
    assert ends(cluster, jobs["check"]) == "COMPLETED", log_of(run, "check")
    log = log_of(run, "check")
    assert "check of 4 ranks on " in log and log.count("  ok ") == 2 and "WRONG" not in log, log
    assert ends(cluster, jobs["shards"]) == "COMPLETED"
    assert f"check  job {jobs['check']} COMPLETED" in lesiongen("status", run)
    assert not list((run / "jobs" / "check").glob("seen-*"))


def test_a_check_that_fails_keeps_the_stages_from_starting(cluster, phantoms, tmp_path):
    """The nodes lack what the job was promised: here, GPUs that torch can use."""
    nodes = cluster_file(tmp_path, environment={"SLURM_GPUS_ON_NODE": "2"})
    out = lesiongen("submit", DEMO, "--cluster", nodes, "--check", "--until", "shards", *tiny(phantoms, tmp_path))
    jobs = dict(re.findall(r"^(\S+) +job (\d+)$", out, re.MULTILINE))
    assert ends(cluster, jobs["check"]) == "FAILED"
    assert re.search(r"WRONG +rank 0 on \S+: the job has GPUs, but torch finds none", log_of(tmp_path / "tiny", "check"))
    assert ends(cluster, jobs["shards"]) == "CANCELLED"
    assert not (tmp_path / "tiny" / "shards").exists()


def test_a_job_runs_the_code_of_its_submission(cluster, phantoms, tmp_path):
    """The job is held until its copy of the code has been changed: the change shows which code runs."""
    held = cluster_file(tmp_path, extra={"hold": True})
    out = lesiongen("submit", DEMO, "--cluster", held, "--until", "shards", *tiny(phantoms, tmp_path))
    job, run = re.search(r"shards +job (\d+)", out)[1], tmp_path / "tiny"
    [code] = (run / "jobs" / "code").iterdir()
    with open(code / "launch" / "rank.py", "a") as file:
        file.write('\nprint("the code in", __file__, flush=True)\n')
    cluster.run("scontrol", "release", job)
    assert ends(cluster, job) == "COMPLETED"
    assert f"the code in {code / 'launch' / 'rank.py'}" in log_of(run, "shards")
    commit = read_stage_record(run / "shards")["environment"]["versions"]["commit"]
    assert commit == (code / "commit.txt").read_text()
    # The same code is not copied again; other code is.
    lesiongen("submit", DEMO, "--cluster", LOCAL, "--until", "tokenizer", *tiny(phantoms, tmp_path))
    assert list((run / "jobs" / "code").iterdir()) == [code]
    lesiongen("cancel", run)


@pytest.mark.long
def test_a_sweep_of_four_priors_over_one_unfinished_tokenizer(cluster, phantoms, tmp_path):
    command = ["sweep", DEMO, *tiny(phantoms, tmp_path), "--cluster", LOCAL, "--parallel", 2, "--until", "prior-bottom"]
    grid = ["--grid", "priors.top.model.layers=1,2", "--grid", "priors.bottom.model.layers=1,2"]
    out = lesiongen(*command, *grid)
    found = {name: jobs.split(", ") for name, jobs in re.findall(r"^(tiny-\S+): jobs (.+)$", out, re.MULTILINE)}
    assert len(found) == 4 and all(len(jobs) == 2 for jobs in found.values()), out
    [codes] = [record["job"] for record in slurm.submitted_jobs(tmp_path / "tiny", "codes")]
    first, _, third, _ = found.values()
    assert cluster.job(first[0])["Dependency"] == f"afterok:{codes}(unfulfilled)"
    assert f"afterany:{first[-1]}" in cluster.job(third[0])["Dependency"], "two runs may be active at once"
    # The same command again submits nothing while the jobs are queued.
    assert ": jobs " not in lesiongen(*command, *grid)
    for jobs in found.values():
        assert [ends(cluster, job, 300) for job in jobs] == ["COMPLETED"] * 2
    table = lesiongen(*command, *grid)
    assert table.count(" done ") == 4 and "best by bits_per_image: tiny-" in table
    assert len({read_stage_record(tmp_path / name / "prior-top")["inputs"]["codes"] for name in found}) == 1


@pytest.mark.long
def test_a_job_fills_a_directory_with_samples(cluster, phantoms, tmp_path):
    """The images do not depend on the number of ranks, and a second job goes on where a killed one stopped."""
    lesiongen("run", DEMO, *tiny(phantoms, tmp_path))
    run, name = tmp_path / "tiny", "samples-mel-28-seed5"
    command = ["sample", run, "--label", "mel", "-n", 28, "--seed", 5]
    nodes = cluster_file(tmp_path, stages={"samples": {"nodes": 2, "tasks_per_node": 2}})
    assert "is not in the run" in lesiongen(*command, "--cluster", nodes, "--out", tmp_path / "elsewhere", code=2)
    job = re.search(r"job (\d+)", lesiongen(*command, "--cluster", nodes))[1]
    assert "still in the queue" in lesiongen(*command, "--cluster", nodes, code=2)
    assert ends(cluster, job) == "COMPLETED"
    assert f"{name}  done  job {job} COMPLETED" in lesiongen("status", run)
    lesiongen(*command, "--out", tmp_path / "here")
    images = sorted((tmp_path / "here" / "images").rglob("*.png"))
    assert len(images) == 28
    for image in images:
        assert image.read_bytes() == (run / name / image.relative_to(tmp_path / "here")).read_bytes()


@pytest.mark.long
def test_an_array_fills_a_directory_with_samples(cluster, phantoms, tmp_path):
    """One of the tasks is cancelled: the job after the array makes its part. The images are those of one process."""
    lesiongen("run", DEMO, *tiny(phantoms, tmp_path), "--until", "prior-bottom")
    run, name = tmp_path / "tiny", "samples-mel-28-seed5"
    command = ["sample", run, "--label", "mel", "-n", 28, "--seed", 5]
    for wrong in (command, ["sample", run], [*command, "--cluster", LOCAL]):
        assert "needs --cluster FILE" in lesiongen(*wrong, "--array", 0 if "--cluster" in wrong else 3, code=2)
    held = cluster_file(tmp_path, extra={"hold": True})
    out = lesiongen(*command, "--cluster", held, "--array", 3)
    [parts] = re.findall(rf"^{name}-parts job (\d+), 3 tasks$", out, re.MULTILINE)
    [job] = re.findall(rf"^{name} job (\d+)$", out, re.MULTILINE)
    assert cluster.job(job)["Dependency"].startswith(f"afterany:{parts}")
    assert "still in the queue" in lesiongen(*command, "--cluster", held, "--array", 3, code=2)
    cluster.run("scancel", f"{parts}_1")
    cluster.run("scontrol", "release", job)
    assert f"{name}-parts  job {parts} PENDING (JobHeldUser)" in lesiongen("status", run)
    cluster.run("scontrol", "release", parts)
    assert ends(cluster, job) == "COMPLETED", log_of(run, name)
    codes = {path.name: path.stat().st_mtime for path in (run / name / "private" / "codes").iterdir()}
    assert len(codes) == 4 and max(codes, key=codes.get) == "000-000007.safetensors", "the cancelled task's batch came last"
    status = lesiongen("status", run)
    assert f"{name}  done  job {job} COMPLETED" in status and f"{name}-parts  job {parts} " in status
    lesiongen(*command, "--out", tmp_path / "here")
    for image in (tmp_path / "here" / "images").rglob("*.png"):
        assert image.read_bytes() == (run / name / image.relative_to(tmp_path / "here")).read_bytes()
    assert "holds these samples already" in lesiongen(*command, "--cluster", held, "--array", 3, code=2)
