"""Tests of the code around the jobs that need no Slurm: batch scripts, the decision to requeue, signals, topology."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from hpc import dist, errors
from hpc.errors import UserError
from hpc.train.preempt import Interruptible, Preemption
from launch import requeue
from launch.executors import load_cluster, without_allocation
from lesiongen import experiment
from lesiongen.stages import stages
from tests.conftest import DEMO, tiny
from tests.slurm.conftest import lesiongen

CLUSTERS = Path(DEMO).parent / "cluster"


def scripts(text: str) -> dict[str, str]:
    """Returns {stage: batch script} from the output of `submit --dry`."""
    parts = text.split("# -------------------- ")[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


def test_dry_prints_the_batch_scripts_and_leaves_nothing_behind(phantoms, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    own = {
        "partition": "gpu",
        "account": "skin",
        "qos": "long",
        "constraint": "a100&nvlink",
        "environment": {"NCCL_SOCKET_IFNAME": "ib0", "WORDS": "two words"},
        "setup": ["module load cuda"],
        "signal_seconds": 77,
        "extra": {"exclude": "n7"},
        "default": {"cpus_per_task": 6, "mem_gb": 10, "minutes": 30},
        "stages": {"prior": {"nodes": 2, "tasks_per_node": 4, "gpus_per_node": 4}, "prior-top": {"minutes": 90}},
    }
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(own))
    runs = tmp_path / "runs"
    found = scripts(lesiongen("submit", DEMO, "--cluster", path, "--dry", *tiny(phantoms, runs)))
    assert list(found) == ["shards", "tokenizer", "codes", "prior-top", "prior-bottom", "samples", "report"]
    assert not runs.exists()
    common = ["--partition=gpu", "--account=skin", "--qos=long", "--constraint='a100&nvlink'", "--exclude=n7", "--requeue"]
    common += ["--signal=USR2@77", "--cpus-per-task=6", "--mem=10240MB"]
    for stage, script in found.items():
        assert {f"#SBATCH {line}" for line in common} <= set(script.splitlines()), stage
        for line in ("module load cuda", "export NCCL_SOCKET_IFNAME=ib0", "export WORDS='two words'"):
            assert line in script.splitlines()
        assert f"#SBATCH --job-name=tiny:{stage}\n" in script
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "dependency" not in found["shards"]
    assert "--dependency='afterok:<shards>'" in found["tokenizer"]
    assert "--dependency='afterok:<codes>'" in found["prior-top"]
    assert "--dependency='afterok:<codes>'" in found["prior-bottom"]
    assert "<prior-top>:<prior-bottom>" in found["samples"]
    assert "--kill-on-invalid-dep=yes" in found["samples"]
    wanted = {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=30"}
    assert {f"#SBATCH {line}" for line in wanted} <= set(found["prior-bottom"].splitlines())
    assert "--time=90" in found["prior-top"]
    assert "gpus" not in found["tokenizer"]


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda p: p.stem)
def test_cluster_files_of_the_project_fit_its_stages(path, phantoms, tmp_path):
    assert path.read_text().startswith("# What:")
    assert f"--cluster configs/cluster/{path.name}" in path.read_text()
    cluster, config = load_cluster(str(path)), experiment.load(DEMO, tiny(phantoms, tmp_path))
    for stage in stages(config).values():
        cluster.resources(stage)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"partion": "gpu"}, "did you mean 'partition'"),
        ({"stages": {"prio": {}}}, "stages.prio is not a stage"),
        ({"stages": {"prior": {"node": 2}}}, "did you mean 'nodes'"),
        ({"stages": {"tokenizer": {"nodes": 3}}}, "does not divide among 3 ranks"),
        ({"default": {"minutes": 0}}, "must be above 0"),
    ],
)
def test_mistakes_in_a_cluster_file_are_found_before_the_queue(own, message, phantoms, tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(own))
    assert message in lesiongen("submit", DEMO, "--cluster", path, "--dry", *tiny(phantoms, tmp_path), code=2)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(name, script) installs a shell script in place of a Slurm command."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def write(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{script}\n")
        (folder / name).chmod(0o755)

    return write


def test_a_refused_job_takes_those_before_it_out_of_the_queue(phantoms, tmp_path, command):
    refuse_third = "[ $number -lt 3 ] || { echo 'sbatch: error: no such partition' >&2; exit 1; }"
    command("sbatch", f"echo x >> calls; number=$(wc -l < calls); {refuse_third}; echo Submitted batch job 4$number")
    command("scancel", "echo $@ > cancelled")
    command("scontrol", "exit 1")
    output = lesiongen("submit", DEMO, "--cluster", CLUSTERS / "local.yaml", *tiny(phantoms, tmp_path), code=2)
    assert "refuses the job of codes" in output
    assert "no such partition" in output
    assert (tmp_path / "cancelled").read_text() == "41 42\n"


@pytest.fixture
def job(tmp_path, monkeypatch, command):
    """Returns the directory of job 7, which is running and whose ranks have ended.

    If the file `refusal` exists, the stand-in for scontrol refuses a requeue and prints the text of the file.
    """
    command("scontrol", "[ $1 = show ] && exec cat state; [ ! -e refusal ] || { cat refusal >&2; exit 1; }")
    (tmp_path / "state").write_text("JobId=7 JobState=RUNNING Reason=None")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    folder = tmp_path / "jobs" / "tokenizer"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("codes", [[75, 75], [75, 1, 1], [128 + signal.SIGUSR2], [128 + signal.SIGTERM]])
def test_a_stop_is_requeued_however_often(job, codes):
    if codes[0] < 128:
        for code in codes:
            requeue.record_exit_code(job, code)
    for _ in range(2 * requeue.MAX_FAILURES):
        assert requeue.requeue_unless_final(job, max(codes)) is None
    assert not (job / requeue.FAILURES).exists()


@pytest.mark.parametrize("code", [errors.FAILED, errors.HANG, 128 + signal.SIGKILL, 128 + signal.SIGSEGV])
def test_failures_are_limited_unless_a_checkpoint_lies_between(job, code, monkeypatch, capsys):
    for start in range(requeue.MAX_FAILURES - 1):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        assert requeue.requeue_unless_final(job, code) is None
    manifest = job.parent.parent / "tokenizer" / "checkpoints" / "step-000005" / "MANIFEST.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    for _ in range(requeue.MAX_FAILURES - 1):
        assert requeue.requeue_unless_final(job, code) is None
    assert requeue.requeue_unless_final(job, code) == code
    assert "3 times without a new checkpoint" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # the user has submitted the stage again
    assert requeue.requeue_unless_final(job, code) is None


@pytest.mark.parametrize("code", requeue.FINAL_CODES)
def test_what_would_end_the_same_is_not_started_again(job, code):
    for own in (errors.FAILED, code, errors.RESUMABLE):
        requeue.record_exit_code(job, own)
    assert requeue.requeue_unless_final(job, 137) == code


def test_a_job_that_slurm_is_ending_is_not_revived(job, capsys):
    (job.parent.parent / "state").write_text("JobState=COMPLETING")
    assert requeue.requeue_unless_final(job, errors.RESUMABLE) == errors.RESUMABLE
    assert "Slurm is ending it" in capsys.readouterr().err


def test_a_refusal_is_told(job, capsys):
    (job.parent.parent / "refusal").write_text("Requested operation is presently disabled")
    assert requeue.requeue_unless_final(job, errors.RESUMABLE) == errors.RESUMABLE
    assert "not requeued (Requested operation is presently disabled)" in capsys.readouterr().err


def test_signals_set_a_flag_in_the_loop_and_interrupt_elsewhere():
    before = signal.getsignal(signal.SIGUSR2)
    with Interruptible() as interruptible:
        with Preemption() as preemption:
            assert not preemption.requested
            signal.raise_signal(signal.SIGUSR2)
            assert preemption.requested
            assert preemption.reason == "SIGUSR2"
        assert not interruptible.signalled
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert interruptible.signalled
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0, "a library may swallow the KeyboardInterrupt, so a timer must run"
        signal.raise_signal(signal.SIGUSR2)  # must not raise a second KeyboardInterrupt
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGUSR2) == before


@pytest.mark.parametrize(("left", "requested"), [(10_000, False), (100, False), (-1, True)])
def test_the_end_of_the_allocation_is_a_stop(left, requested, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + left))
    preemption = Preemption()
    assert preemption.requested == requested
    assert preemption.margin == pytest.approx(min(120, max(0, left) / 10), abs=1)


def test_topology_of_a_slurm_step_in_spite_of_torchrun_variables():
    step = {"SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
    step |= {"SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_ID": "12345", "RANK": "0", "WORLD_SIZE": "1"}
    found = dist.from_slurm(step)
    assert (found.rank, found.world_size, found.local_rank, found.nodes, found.address) == (3, 4, 1, 2, "gpu07")
    again = dist.from_slurm(step | {"SLURM_RESTART_COUNT": "1"})
    assert found.port != again.port
    assert 20000 <= found.port < 32000


@pytest.mark.parametrize(
    ("own", "memory"),
    [
        ({"default": {"mem_gb": None}}, None),
        ({"default": {"mem_gb": 2.5}}, "--mem=2560MB"),
        ({"extra": {"mem-per-cpu": "4G"}}, "--mem-per-cpu=4G"),
        ({"extra": {"mem-per-gpu": "40G"}, "default": {"gpus_per_node": 1}}, "--mem-per-gpu=40G"),
    ],
)
def test_memory_is_requested_in_one_way_or_none(phantoms, tmp_path, own, memory):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(own))
    for script in scripts(lesiongen("submit", DEMO, "--cluster", path, "--dry", *tiny(phantoms, tmp_path / "runs"))).values():
        requested = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH --mem")]
        assert requested == ([memory] if memory else [])
        assert "wckey=submitit" not in script


def test_memory_of_nothing_is_refused(tmp_path):
    (tmp_path / "cluster.yaml").write_text("default: {mem_gb: 0}\n")
    with pytest.raises(UserError, match="mem_gb must be above 0, or null"):
        load_cluster(str(tmp_path / "cluster.yaml"))


def test_the_allocation_of_the_shell_is_not_handed_on(monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "500")
    monkeypatch.setenv("SBATCH_PARTITION", "debug")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    with without_allocation():
        assert "SLURM_MEM_PER_CPU" not in os.environ and os.environ["SLURM_CONF"] == "/etc/slurm.conf"
    assert os.environ["SLURM_MEM_PER_CPU"] == "500"
