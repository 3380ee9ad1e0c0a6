"""The check of a cluster's nodes: `submit --check` runs it as a small job before the stages, on the same resources.

Each rank imports the libraries, joins the other ranks, and uses its device. The ranks together compare their versions and
clocks, and try whether they see one another's files and locks in the run directory. If something is wrong, the job fails, so
that no stage starts; what may become a problem is a warning.
"""

import contextlib
import importlib
import os
import platform
import shutil
import socket
import time
from importlib import metadata
from pathlib import Path

import torch

from hpc import dist, errors
from hpc.dist import Topology
from hpc.run import rundir
from launch.endings import exit_code_of, print_error
from lesiongen.experiment import Experiment

LIBRARIES = ("torch", "torchvision", "deepspeed", "webdataset", "mlflow", "numpy", "PIL")
CLOCK_S = 5.0  # clocks that differ by more confuse those who read logs and metrics
VISIBLE_S = 30.0  # a file that another node has written must be visible by then
FREE_GB = 10.0
REDUCED = 2**24  # numbers in the all-reduce that is timed: 64 MiB
GPU_VARIABLES = ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")  # Slurm sets one for a job that requests GPUs


def check_main(config: Experiment, topology: Topology, folder: Path) -> int:
    """Checks this rank's node and the ranks together. Prints the findings. Collective.

    Args:
        config: The run's config.
        topology: This process among the ranks.
        folder: The job's directory.

    Returns:
        The exit code: 0, or that of wrong usage if something would keep the stages from running.
    """
    try:
        dist.init(topology, config.local.join_seconds)
        alone = check_rank(config)
        found = dist.gather(alone)
        problems = [f"rank {rank} on {host}: {text}" for rank, (host, texts) in enumerate(found) for text in texts]
        together, warnings, facts = check_together(config, folder, topology.device)
        problems += together
        if topology.leader:
            hosts = list(dict.fromkeys(host for host, _ in found))
            print(f"check of {topology.world_size} ranks on {len(hosts)} nodes: {', '.join(hosts)}", flush=True)
            for mark, texts in (("ok", facts), ("WARNING", warnings), ("WRONG", problems)):
                for text in texts:
                    print(f"  {mark:<8} {text}", flush=True)
        dist.leave()
        return errors.USAGE if problems else errors.DONE
    except Exception as error:
        print_error(error)
        return exit_code_of(error)


def check_rank(config: Experiment) -> tuple[str, list[str]]:
    """Returns this rank's host, and what is wrong with its libraries, its device and its access to the data."""
    problems = []
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except Exception as error:
            problems.append(f"cannot import {name}: {error}")
    if any(os.environ.get(name) for name in GPU_VARIABLES) and not torch.cuda.is_available():
        problems.append("the job has GPUs, but torch finds none: the driver is missing, or this torch is built for CPUs")
    for path in (config.data.images, config.data.metadata):
        if path and not config.inputs.shards and not Path(path).exists():
            problems.append(f"{path} does not exist here")
    return socket.gethostname(), problems


def check_together(config: Experiment, folder: Path, device: torch.device) -> tuple[list[str], list[str], list[str]]:
    """Compares the ranks, and tries what they share. Collective.

    Returns:
        What is wrong, what may become a problem, and what is in order.
    """
    problems, warnings = [], []
    # Versions.
    versions = {"Python": platform.python_version()} | {name: _version(name) for name in ("torch", "deepspeed", "numpy")}
    everywhere = dist.gather(versions)
    for name in versions:
        if len(different := sorted({found[name] for found in everywhere})) > 1:
            problems.append(f"the nodes have different versions of {name}: {', '.join(different)}")
    # Clocks. The barrier lets all ranks read them at nearly the same time.
    dist.barrier()
    clocks = dist.gather(time.time())
    if (spread := max(clocks) - min(clocks)) > CLOCK_S:
        warnings.append(f"the nodes' clocks differ by {spread:.1f} s")
    # Files and locks in the run directory.
    attempt = os.environ.get("SLURM_JOB_ID", "local")
    mine = folder / f"seen-{attempt}-{dist.rank()}"
    rundir.atomic_write(mine, b"")
    dist.barrier()
    others = [folder / f"seen-{attempt}-{rank}" for rank in range(dist.world_size())]
    unseen = [path for path in others if not _appears(path)]
    for rank, missing in enumerate(dist.gather(len(unseen))):
        if missing:
            problems.append(f"rank {rank} does not see files that other ranks have written to {folder}")
    with rundir.lock(folder, rundir.QUIET_WAIT_S) if dist.rank() == 0 else contextlib.nullcontext():
        dist.barrier()
        locked = dist.gather(rundir.is_locked(folder))
    if not all(locked):
        warnings.append(
            f"a lock of one node on {folder} does not hold on others: never run two commands on one run at the same time"
        )
    mine.unlink(missing_ok=True)
    if (free := shutil.disk_usage(folder).free / 1e9) < FREE_GB:
        warnings.append(f"only {free:.1f} GB are free in {config.directory}")
    # The network.
    numbers = torch.ones(REDUCED, device=device)
    dist.all_reduce_sum(numbers)
    began = time.perf_counter()
    total = float(dist.all_reduce_sum(torch.ones(REDUCED, device=device))[0])
    seconds = time.perf_counter() - began
    if total != dist.world_size():
        problems.append(f"an all-reduce of {dist.world_size()} ones gives {total:.0f}")
    facts = [
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"all-reduce of 64 MiB on {device.type} in {seconds * 1000:.0f} ms, clocks within {spread:.2f} s, {free:.0f} GB free",
    ]
    return problems, warnings, facts


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _appears(path: Path) -> bool:
    """Returns whether a file appears within VISIBLE_S: network file systems show new files of other nodes late."""
    deadline = time.monotonic() + VISIBLE_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
