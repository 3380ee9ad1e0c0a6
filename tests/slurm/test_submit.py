"""Tests of the code around the jobs that need no Slurm: batch scripts, the decision to requeue, signals, topology."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from hpc import dist
from hpc.errors import UserError
from hpc.train.preempt import Preemption
from launch import slurm
from launch.before_queue import warn_of_short_signals
from launch.cluster import load_cluster
from launch.slurm import without_allocation
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


def options(script: str) -> dict[str, str]:
    """Returns {option: value} of a batch script; "" for an option without a value."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value.strip("'") for name, _, value in (line.partition("=") for line in lines)}


def test_in_a_container_every_rank_runs_in_the_image(phantoms, tmp_path):
    """The last lines of the batch script run here, with a stand-in for Apptainer and for scontrol."""
    own = {"container": f"{tmp_path}/apptainer exec my.sif", "python": "/usr/bin/python3"}
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(own))
    found = scripts(lesiongen("submit", DEMO, "--cluster", path, "--dry", *tiny(phantoms, tmp_path / "runs")))["tokenizer"]
    assert f"{tmp_path}/apptainer exec my.sif /usr/bin/python3 -u -m submitit.core._submit" in found
    ending = found[found.index("code=$?") :].replace("code=$?\n", "code=75\n", 1).replace("sleep 600", "echo slept")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho scontrol $*\n")
    for code, expected in ((98, "scontrol requeue 7\nslept\n"), (77, "")):
        (tmp_path / "apptainer").write_text(f"#!/bin/sh\necho $* >&2\nexit {code}\n")
        for file in ("apptainer", "scontrol"):
            (tmp_path / file).chmod(0o755)
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
        ran = subprocess.run(["bash", "-c", ending], capture_output=True, text=True, env=env)
        assert (ran.returncode, ran.stdout) == (code, expected)
        assert ran.stderr.startswith("exec my.sif /usr/bin/python3 -m launch.requeue ") and ran.stderr.endswith(" 75\n")


def test_each_stage_has_options_of_its_own(phantoms, tmp_path):
    own = {
        "partition": "cpu",
        "account": "skin",
        "extra": {"mail-type": "END", "nice": 5, "requeue": True, "contiguous": True, "dependency": "afterany:7"},
        "default": {"minutes": 30, "mem_per_cpu_gb": 2},
        "stages": {
            "tokenizer": {"partition": "gpu", "gpu_type": "a100", "gpus_per_node": 2, "tasks_per_node": 2, "exclusive": True},
            "prior": {"partition": "gpu", "qos": "long", "reservation": "r1", "constraint": "ib", "mem_per_cpu_gb": None},
            "prior-bottom": {"mem_per_cpu_gb": None, "mem_per_gpu_gb": 40, "gpus_per_node": 1, "srun": ["--cpu-bind=cores"]},
            "report": {"mem_per_cpu_gb": None, "mem_gb": None, "extra": {"nice": 9, "mail-type": None, "contiguous": False}},
        },
    }
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(own))
    found = scripts(lesiongen("submit", DEMO, "--cluster", path, "--dry", *tiny(phantoms, tmp_path / "runs")))
    asked = {stage: options(script) for stage, script in found.items()}
    shards = {"partition": "cpu", "account": "skin", "mail-type": "END", "nice": "5", "contiguous": "", "requeue": ""}
    shards |= {"mem-per-cpu": "2048MB", "time": "30", "cpus-per-task": "1", "nodes": "1", "ntasks-per-node": "1"}
    always = {"job-name": "tiny:shards", "signal": "USR2@120", "open-mode": "append", "dependency": "afterany:7"}
    given = {name: value for name, value in asked["shards"].items() if name not in ("output", "error")}
    assert given == shards | always, "nothing is sent that nobody asked for"
    tokenizer = asked["tokenizer"]
    assert (tokenizer["partition"], tokenizer["gpus-per-node"], tokenizer["exclusive"]) == ("gpu", "a100:2", "")
    assert tokenizer["dependency"] == "afterok:<shards>,afterany:7"
    top, bottom, report = asked["prior-top"], asked["prior-bottom"], asked["report"]
    assert (top["qos"], top["reservation"], top["constraint"], top["mem"]) == ("long", "r1", "ib", "8192MB")
    assert (bottom["mem-per-gpu"], bottom["partition"], "mem" in bottom) == ("40960MB", "cpu", False)
    assert "--cpu-bind=cores" in found["prior-bottom"] and "--cpu-bind=cores" not in found["prior-top"]
    assert report["nice"] == "9" and not {"mail-type", "contiguous", "mem", "mem-per-cpu"} & report.keys()


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
        ({"stages": {"prior": {"mem_per_cpu_gb": 1, "mem_per_gpu_gb": 1}}}, "not both"),
        ({"stages": {"prior": {"mem_per_cpu_gb": 0}}}, "mem_per_cpu_gb"),
    ],
)
def test_mistakes_in_a_cluster_file_are_found_before_the_queue(own, message, phantoms, tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(own))
    assert message in lesiongen("submit", DEMO, "--cluster", path, "--dry", *tiny(phantoms, tmp_path), code=2)


@pytest.mark.parametrize("verb", ["submit", "run"])
@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"data.images": "/nowhere"}, "data.images: /nowhere does not exist"),
        ({"data.metadata": "/nowhere.csv"}, "data.metadata: /nowhere.csv does not exist"),
        ({"data.splits": "/nowhere.csv"}, "data.splits: /nowhere.csv does not exist"),
        ({"inputs.tokenizer": "/nowhere"}, "inputs.tokenizer: /nowhere is not finished"),
    ],
)
def test_missing_inputs_are_found_before_anything_starts(verb, own, message, phantoms, tmp_path):
    cluster = ("--cluster", CLUSTERS / "local.yaml", "--dry") if verb == "submit" else ()
    assert message in lesiongen(verb, DEMO, *cluster, *tiny(phantoms, tmp_path / "runs", **own), code=2)
    assert not (tmp_path / "runs").exists()


def test_jobs_wait_for_the_unfinished_run_that_they_use(phantoms, tmp_path, command):
    command("sbatch", "echo x >> calls; cat - > script$(wc -l < calls); echo Submitted batch job 4$(wc -l < calls)")
    command("scontrol", "echo JobState=RUNNING")
    cluster = ("--cluster", CLUSTERS / "local.yaml")
    lesiongen("submit", DEMO, *cluster, "--until", "codes", *tiny(phantoms, tmp_path))
    other = {
        "inputs.shards": f"[{tmp_path / 'tiny'}]",
        "inputs.tokenizer": tmp_path / "tiny",
        "inputs.codes": tmp_path / "tiny",
    }
    lesiongen("pack", DEMO, *tiny(phantoms, tmp_path))  # the first job
    shown = lesiongen("submit", DEMO, *cluster, *tiny(phantoms, tmp_path, name="other", **other))
    assert "inputs.codes is not finished: what needs it waits for job 43" in shown
    assert "inputs.tokenizer is not finished: what needs it waits for job 42" in shown
    folder = tmp_path / "other" / "jobs"
    wanted = {"prior-top": "afterok:43", "samples": "afterok:42:44:45", "report": "afterok:43:42:44:45:46"}
    for stage, dependency in wanted.items():
        [script] = folder.glob(f"{stage}/*_submission.sh")
        given = options(script.read_text())["dependency"].split(":")
        assert given[0] == "afterok" and set(given) == set(dependency.split(":")), stage
    command("scontrol", "echo JobState=FAILED")
    refused = lesiongen("submit", DEMO, *cluster, *tiny(phantoms, tmp_path, name="third", **other), code=2)
    assert "inputs.codes" in refused or "inputs.tokenizer" in refused


def test_a_refused_job_takes_those_before_it_out_of_the_queue(phantoms, tmp_path, command):
    refuse_third = "[ $number -lt 3 ] || { echo 'sbatch: error: no such partition' >&2; exit 1; }"
    command("sbatch", f"echo x >> calls; number=$(wc -l < calls); {refuse_third}; echo Submitted batch job 4$number")
    command("scancel", "echo $@ > cancelled")
    command("scontrol", "exit 1")
    output = lesiongen("submit", DEMO, "--cluster", CLUSTERS / "local.yaml", *tiny(phantoms, tmp_path), code=2)
    assert "refuses the job of codes" in output
    assert "no such partition" in output
    assert (tmp_path / "cancelled").read_text() == "41 42\n"


@pytest.mark.parametrize(
    "silence", ["echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1", "exec sleep 5", None]
)
def test_silence_of_slurm_is_not_taken_for_gone(phantoms, tmp_path, command, monkeypatch, silence):
    monkeypatch.setattr(slurm.job_state, "__defaults__", (0.1,))
    command("sbatch", "echo Submitted batch job 41")
    arguments = ("submit", DEMO, "--cluster", CLUSTERS / "local.yaml", *tiny(phantoms, tmp_path))
    lesiongen(*arguments)
    if silence:
        command("scontrol", silence)
    else:  # only sbatch is installed
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert "Slurm does not answer: shards (job 41)" in lesiongen(*arguments, code=2)
    assert "job 41 (Slurm does not answer)" in lesiongen("status", tmp_path / "tiny")
    command("scancel", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert "scancel failed: Unable to contact" in lesiongen("cancel", tmp_path / "tiny", code=2)
    command("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert "no jobs to cancel" in lesiongen("cancel", tmp_path / "tiny")


def test_a_signal_too_late_to_save_is_warned_of(phantoms, tmp_path):
    config = experiment.load(DEMO, tiny(phantoms, tmp_path))
    todo = list(stages(config).values())
    assert [line.split()[1] for line in warn_of_short_signals(config, todo, 119)] == [
        "tokenizer:",
        "prior-top:",
        "prior-bottom:",
    ]
    assert warn_of_short_signals(config, todo, 120) == []
    log = tmp_path / "tiny" / "prior-top" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 1, "samples": 16, "checkpoint_seconds": 90, "images_per_second": 0.5}\n')
    assert [line.partition("Set")[2] for line in warn_of_short_signals(config, todo, 301)] == [
        " at least 302 in the cluster file, or the job may be killed before it has saved."
    ]
    slow = experiment.load(DEMO, [*tiny(phantoms, tmp_path), "hardware.disk_gb_per_s=1e-6"])
    assert len(warn_of_short_signals(slow, todo, 200)) == 3, "the plan is not used for stages that have not run"


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
