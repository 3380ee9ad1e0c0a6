"""Endurance: many random kills and faults over the stages of one run, with the results of an undisturbed run.

    pytest tests/slurm/test_soak.py -s            # three seeds, which are printed; SOAK_SEEDS="5 6" runs others

Three parts for each seed. A prior is trained by another number of ranks and another ZeRO stage at each attempt; transitions
that are not supported must be refused. A whole run is killed at any moment, with the same ranks throughout. A prior is trained
on Slurm, where nodes are lost. A fault of FAULTS follows each kill of the first two parts.

With other ranks the sums of floats round differently. The losses of a prior without dropout stay within 1e-3; each rank draws
its own masks of dropout. The losses of a tokenizer do so only until a vector has another nearest code, perhaps for 54 steps.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import pytest

from hpc import errors
from hpc.run import journal, metrics_log
from hpc.run.rundir import read_stage_record
from hpc.train import checkpoint
from tests.conftest import DEMO, tiny
from tests.faults.test_kills import descendants, finish, start, wait_for
from tests.slurm.conftest import lesiongen, wait
from tests.slurm.test_slurm import cluster_file, submit, wait_until_completed

SEEDS = [int(seed) for seed in os.environ.get("SOAK_SEEDS", "1 2 3").split()]
KILLS = {"changing": 8, "whole run": 10, "slurm": 2}
GROUPS = {0: 0, 1: 1, 2: 1, 3: 3}  # ZeRO stages that a training may change between
TRAININGS = ("tokenizer", "prior-top", "prior-bottom")


def settings(phantoms: Path, runs: Path, **more) -> list[str]:
    own = {f"{name}.train.samples": 1600 for name in ("tokenizer", "priors.top")}
    own |= {f"{name}.train.save_every": 80 for name in ("tokenizer", "priors.top")}
    own |= {f"{name}.train.eval_every": 400 for name in ("tokenizer", "priors.top")}
    own |= {"priors.top.model.dropout": 0, "priors.top.model.label_dropout": 0, "data.ledger": True, "data.workers": 1}
    return [DEMO, *tiny(phantoms, runs, **own, **more)]


def sample_keys(stage: Path) -> dict[int, list[str]]:
    """Returns the keys of the samples that all ranks together trained on, for each step."""
    keys = defaultdict(list)
    for path in stage.glob("ledger-*.jsonl"):
        for entry in journal.read(path, "samples", "keys"):
            keys[entry["samples"]] += entry["keys"]
    return {samples: sorted(of_step) for samples, of_step in sorted(keys.items())}


def curve(stage: Path, prefixes: tuple[str, ...] = ("train/", "val/")) -> dict[tuple[int, str], float]:
    rows = metrics_log.read_metrics(stage)
    return {(row["samples"], name): value for row in rows for name, value in row.items() if name.startswith(prefixes)}


# Faults: what a run finds when it starts again. Each gets the directory of a training stage.


def _newest(stage: Path) -> Path | None:
    """Returns the newest checkpoint if there is an older one to fall back to."""
    found = checkpoint.committed(stage / "checkpoints")
    return found[-1] if len(found) > 1 else None


def truncate_a_file(stage: Path, rng: random.Random) -> None:
    if newest := _newest(stage):
        path = rng.choice(sorted(p for p in newest.rglob("*") if p.is_file()))
        os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(stage: Path, rng: random.Random) -> None:
    if newest := _newest(stage):
        path = rng.choice(sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size))
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def remove_a_file(stage: Path, rng: random.Random) -> None:
    if newest := _newest(stage):
        rng.choice(sorted(p for p in newest.rglob("*") if p.is_file())).unlink()


def leave_a_torn_save(stage: Path, rng: random.Random) -> None:
    if newest := _newest(stage):
        shutil.copytree(newest, newest.with_name("step-999999.tmp"), dirs_exist_ok=True)
        shutil.copytree(newest, newest.with_name("step-999999"), dirs_exist_ok=True)
        (newest.with_name("step-999999") / "MANIFEST.json").unlink()


def tear_the_log(stage: Path, rng: random.Random) -> None:
    if (stage / "metrics.jsonl").exists():
        with open(stage / "metrics.jsonl", "ab") as file:
            file.write(rng.choice([b'{"step": 1, "samp', b"\xff\xfe\x00\n", b"\0" * 40, b"12\n"]))


def leave_other_files(stage: Path, rng: random.Random) -> None:
    if stage.exists():
        (stage / ".metrics.jsonl.host.1.tmp").write_text("torn")
        (stage / "stacks-7.txt").write_text("of an earlier hang")


def no_fault(stage: Path, rng: random.Random) -> None:
    """The kill alone."""


FAULTS = (truncate_a_file, flip_a_bit, remove_a_file, leave_a_torn_save, tear_the_log, leave_other_files, no_fault)


def kill(process: subprocess.Popen, rng: random.Random) -> str:
    """Kills one rank, the launcher or all processes, or asks the run to stop. Returns what was killed."""
    children = [p for p in descendants(process.pid) if b"\0launch\0rank\0" in _command(p)]
    victim = rng.choice(["a rank", "the launcher", "all", "TERM"])
    if victim == "a rank" and children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(children), signal.SIGKILL)
    elif victim == "TERM":
        process.send_signal(signal.SIGTERM)
    elif victim == "all":
        for pid in [*children, process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    else:
        process.kill()
    process.communicate(timeout=90)
    return victim


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def wait_until_free(run: Path) -> None:
    """Waits until orphaned ranks have ended, which takes 10 s at most."""
    deadline = time.monotonic() + 10
    mine = [p for p in map(int, filter(str.isdecimal, os.listdir("/proc"))) if str(run).encode() in _command(p)]
    while any(Path(f"/proc/{pid}").exists() for pid in mine):
        assert time.monotonic() < deadline, "a rank outlives its launcher"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def undisturbed(phantoms, packed, tmp_path_factory) -> Path:
    """Returns a run whose coarsest prior one rank has trained."""
    runs = tmp_path_factory.mktemp("undisturbed")
    for verb in (["train", "tokenizer"], ["encode"], ["train", "prior", "--level", "top"]):
        finish(start(*verb, *settings(phantoms, runs, **{"inputs.shards": packed})))
    return runs / "tiny"


def inputs(packed: Path, undisturbed: Path) -> dict[str, Path]:
    """Returns the overrides with which a run trains a prior on the codes of the undisturbed run."""
    return {"inputs.shards": packed, "inputs.tokenizer": undisturbed, "inputs.codes": undisturbed}


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_ranks_and_zero_stages_change_at_each_attempt(phantoms, packed, undisturbed, tmp_path, seed):
    rng, stage, group, kills = random.Random(seed), tmp_path / "tiny" / "prior-top", None, 0
    zero = 0
    while not (record := read_stage_record(stage)) or not record["done"]:
        ranks, zero = rng.choice([1, 2, 3, 4]), rng.choice([0, 1, 2, 3])
        if kills >= KILLS["changing"]:
            ranks, zero = rng.choice([1, 2, 4]), group if group is not None else zero
        more = inputs(packed, undisturbed) | {"local.ranks": ranks, "priors.top.train.engine.zero": zero}
        process = start("train", "prior", "--level", "top", *settings(phantoms, tmp_path, **more))
        if ranks == 3:  # the batch of 16 does not divide
            assert "does not divide" in finish(process, errors.USAGE)
            continue
        saved = any(stage.glob("checkpoints/step-*/MANIFEST.json"))
        if saved and GROUPS[zero] != group:
            assert "cannot be resumed under ZeRO" in finish(process, errors.USAGE)
            continue
        group = GROUPS[zero]
        if kills >= KILLS["changing"]:
            finish(process)
            break
        rows = metrics_log.read_metrics(stage)
        wait_for(stage, (rows[-1]["samples"] if rows else 0) + 16 * rng.randrange(1, 6), process)
        victim = kill(process, rng)
        wait_until_free(tmp_path)
        fault = FAULTS[kills % len(FAULTS)]
        fault(stage, rng)
        kills += 1
        print(f"seed {seed}: kill {kills} of {victim}, {ranks} ranks, ZeRO {zero}, then {fault.__name__}")
    assert sample_keys(stage) == sample_keys(undisturbed / "prior-top")
    losses = ("train/loss", "val/bits_per_token")
    assert curve(stage, losses) == pytest.approx(curve(undisturbed / "prior-top", losses), rel=1e-3)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_whole_run_is_killed_at_any_moment(phantoms, tmp_path, seed):
    rng = random.Random(seed + 1000)
    more = {"local.ranks": 2, "tokenizer.train.engine.zero": rng.choice([0, 1, 2, 3])}
    more |= {f"priors.{level}.train.engine.zero": rng.choice([0, 1, 2, 3]) for level in ("top", "bottom")}
    process = start("run", *settings(phantoms, tmp_path / "undisturbed", **more))
    finish(process)
    run = tmp_path / "killed" / "tiny"
    for number in range(1, KILLS["whole run"] + 1):
        process = start("run", *settings(phantoms, tmp_path / "killed", **more))
        seconds, deadline = rng.uniform(1, 18), time.monotonic()
        while time.monotonic() < deadline + seconds and process.poll() is None:
            time.sleep(0.05)
        victim = kill(process, rng)
        wait_until_free(tmp_path / "killed")
        stage, fault = run / rng.choice(TRAININGS), rng.choice(FAULTS)
        if not (record := read_stage_record(stage)) or not record["done"]:  # what is done is checked where it is read
            fault(stage, rng)
        print(f"seed {seed}: kill {number} of {victim} after {seconds:.1f} s, then {fault.__name__} in {stage.name}")
    finish(start("run", *settings(phantoms, tmp_path / "killed", **more)))
    for name in ("shards", "tokenizer", "codes", "prior-top", "prior-bottom", "samples", "report"):
        digests = [read_stage_record(tmp_path / runs / "tiny" / name)["digest"] for runs in ("undisturbed", "killed")]
        assert digests[0] == digests[1], name
    for name in TRAININGS:
        assert sample_keys(run / name) == sample_keys(tmp_path / "undisturbed" / "tiny" / name), name
        assert curve(run / name) == curve(tmp_path / "undisturbed" / "tiny" / name), name


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_nodes_are_lost(cluster, phantoms, packed, undisturbed, tmp_path, seed):
    rng = random.Random(seed + 2000)
    more = inputs(packed, undisturbed) | {"priors.top.train.engine.zero": rng.choice([0, 1, 2, 3])}
    nodes = cluster_file(tmp_path, stages={"prior-top": {"nodes": 2, "tasks_per_node": rng.choice([1, 2])}})
    jobs = submit("--cluster", nodes, *settings(phantoms, tmp_path, **more)[1:])
    run, job = tmp_path / "tiny", jobs["prior-top"]
    cluster.run("scancel", *(other for name, other in jobs.items() if name != "prior-top"))
    stage = run / "prior-top"
    for number in range(1, KILLS["slurm"] + 1):
        before = len(metrics_log.read_metrics(stage))
        wait(lambda before=before: len(metrics_log.read_metrics(stage)) > before + 3, 120, "some steps")
        names = cluster.job(job)["NodeList"]
        running = [name for name in cluster.nodes if name in _expand(names)]
        lost = rng.choice(running)
        print(f"seed {seed}: node {lost} of {names} is lost ({number})")
        try:
            cluster.kill_node(lost)
            restarts = str(number)
            wait(lambda restarts=restarts: cluster.job(job)["Restarts"] == restarts, 120, "the requeue")
        finally:
            cluster.start_node(lost)
    wait_until_completed(cluster, [job], 150)
    lesiongen("cancel", run)
    assert sample_keys(stage) == sample_keys(undisturbed / "prior-top")
    losses = ("train/loss", "val/bits_per_token")
    assert curve(stage, losses) == pytest.approx(curve(undisturbed / "prior-top", losses), rel=1e-3)


def _expand(names: str) -> list[str]:
    """Returns the nodes of a list such as "n[1-2]" or "n[1,3]"."""
    inside = names.removeprefix("n").strip("[]")
    ends = [part.partition("-") for part in inside.split(",")]
    return [f"n{i}" for first, _, last in ends for i in range(int(first), int(last or first) + 1)]
