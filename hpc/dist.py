"""The process group: which rank this process is, joining the other ranks, and small collectives for Python objects.

The topology comes from the environment variables that torchrun or Slurm set. If ranks do not join in time, an error names the
missing ranks. The collectives also work with one process, with or without a process group, so callers need no special case.

"Collective" in a docstring of this project means: every rank must call the function, otherwise the other ranks wait for it.
"""

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hpc import watchdog
from hpc.errors import LeaderFailed, UserError

T = TypeVar("T")
LONGEST_WAIT = timedelta(hours=12)

_control: dist.ProcessGroup | None = None  # gloo group for Python objects and barriers; None = the default group is gloo
_store: dist.Store | None = None  # key-value store of the process group; leave() counts ranks in it
_meetings = 0  # how often this rank has called meet()


@dataclass(frozen=True)
class Topology:
    """Position of this process among the ranks of a stage.

    Attributes:
        rank: Number of this process, from 0. Rank 0 is the leader.
        world_size: Number of ranks.
        local_rank: Number of this process on its machine, from 0.
        nodes: Number of machines.
        address: Host of rank 0.
        port: TCP port on which rank 0 listens while the ranks join.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def leader(self) -> bool:
        """Whether this process is rank 0."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The GPU of this rank, or the CPU on a machine without GPUs."""
        # Some clusters let each task see only one GPU, which then has index 0 for every local rank.
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", self.local_rank % count) if count else torch.device("cpu")


def detect(env: Mapping[str, str] | None = None) -> Topology:
    """Reads the topology from environment variables.

    Uses the variables of torchrun if they are set, otherwise those of a Slurm step. With neither, this process is the only
    rank. If torchrun runs inside a Slurm step, both are set, and those of Slurm describe the launcher, not the rank.

    Args:
        env: The environment; os.environ by default.
    """
    env = os.environ if env is None else env
    if "RANK" in env and "WORLD_SIZE" in env:
        return Topology(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env.get("LOCAL_RANK", 0)),
            nodes=max(1, int(env["WORLD_SIZE"]) // int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]))),
            address=env.get("MASTER_ADDR", "127.0.0.1"),
            port=int(env.get("MASTER_PORT", 29500)),
        )
    if "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        return from_slurm(env)
    return Topology()


def from_slurm(env: Mapping[str, str]) -> Topology:
    """Reads the topology of a Slurm step from its environment variables.

    Variables of torchrun are ignored: sbatch copies the environment of the submitting shell, which may contain such variables.

    Args:
        env: The environment of a task of the step.
    """
    # The port depends on the job. It changes at each requeue, because the old port may not be free yet.
    port = 20000 + (int(env["SLURM_JOB_ID"]) * 7 + int(env.get("SLURM_RESTART_COUNT", 0))) % 12000
    return Topology(
        rank=int(env["SLURM_PROCID"]),
        world_size=int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"]),
        local_rank=int(env.get("SLURM_LOCALID", 0)),
        nodes=int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES", 1)),
        address=first_host(env["SLURM_STEP_NODELIST"]),
        port=port,
    )


def first_host(nodelist: str) -> str:
    """Returns the first host of a Slurm node list: "a01" for "a[01-03,7],b2"."""
    # The first element ends at the first comma outside brackets; it may have several pairs of brackets, as in "r[1-2]n[01-16]".
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist).group()
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def init(topology: Topology, timeout_s: float = 300.0) -> None:
    """Joins the process group and sets the environment variables that libraries read. Later calls do nothing. Collective.

    Args:
        topology: This process among the ranks.
        timeout_s: Seconds to wait for the other ranks.

    Raises:
        TimeoutError: Rank 0 cannot be reached, or ranks are missing; the message names them.
    """
    global _store, _control
    if dist.is_initialized():
        return
    refuse_shared_gpus(topology)
    if topology.device.type == "cuda":
        torch.cuda.set_device(topology.device)
    backend = "nccl" if topology.device.type == "cuda" else "gloo"
    _store = dist.HashStore() if topology.world_size == 1 else _join(topology, timedelta(seconds=timeout_s))
    os.environ |= {
        "RANK": str(topology.rank),
        "WORLD_SIZE": str(topology.world_size),
        # DeepSpeed uses LOCAL_RANK as the index of the GPU. That is not the local rank if each task sees only its own GPU.
        "LOCAL_RANK": str(topology.device.index or 0 if topology.device.type == "cuda" else topology.local_rank),
        "MASTER_ADDR": topology.address,
        "MASTER_PORT": str(topology.port or 29500),
    }
    # A long timeout: in run_on_leader() the other ranks wait while rank 0 works alone, for example verifies a checkpoint.
    dist.init_process_group(backend, store=_store, rank=topology.rank, world_size=topology.world_size, timeout=LONGEST_WAIT)
    # Python objects and barriers go over gloo: over NCCL they would take GPU memory and wait for the kernels before them.
    _control = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if backend == "nccl" else None


def hide_gpus() -> None:
    """Makes this process, and those that it starts, use the CPU. Call it before anything has used a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def refuse_shared_gpus(topology: Topology) -> None:
    """Raises UserError if two ranks of this machine would share a GPU: NCCL cannot join them.

    Only what this process sees can be checked. If each task sees its own GPU only, every task sees one GPU.
    """
    count = torch.cuda.device_count() if topology.device.type == "cuda" else 0
    ranks_here = topology.world_size // topology.nodes
    if 1 < count < ranks_here or (count == 1 and ranks_here > 1 and os.environ.get("LOCAL_WORLD_SIZE")):
        raise UserError(
            f"{ranks_here} ranks on {socket.gethostname()} would share {count} GPU{'s' * (count > 1)}. Start at most one rank "
            "per GPU (local.ranks, or tasks_per_node in the cluster file), or train on the CPU (local.device=cpu)."
        )


def set_group_timeouts() -> None:
    """Gives every process group the longest timeout, also groups that libraries have made.

    DeepSpeed makes groups with torch's default of 10 to 30 minutes. An evaluation on one rank may take longer; the watchdog
    (hpc/train/health.py), whose limit is below this timeout, decides what is a hang.
    """
    if world_size() > 1:
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(LONGEST_WAIT, group)


def _join(topology: Topology, timeout: timedelta) -> dist.Store:
    """Connects to the store of rank 0 and waits until every rank has connected."""
    try:
        address = topology.address, topology.port
        store = dist.TCPStore(*address, topology.world_size, topology.leader, timeout, wait_for_workers=False)
    except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
        raise TimeoutError(
            f"rank {topology.rank} on {socket.gethostname()} cannot reach rank 0 at {topology.address}:{topology.port} "
            f"within {timeout.total_seconds():.0f} s ({str(error).splitlines()[0]}). Look at the log of rank 0, and check that "
            "its node accepts connections on this port."
        ) from None
    if missing := _meet(store, "join", topology.rank, topology.world_size, timeout):
        raise TimeoutError(
            f"after {timeout.total_seconds():.0f} s these ranks of {topology.world_size} have not joined: "
            f"{missing}. Look at their logs: a node may be down, or a task failed to start."
        )
    return store


def _meet(store: dist.Store, name: str, rank: int, world_size: int, timeout: timedelta) -> str:
    """Waits until every rank has called this with the same name. Returns the ranks that have not, as text."""
    store.set(f"{name}/{rank}", socket.gethostname())
    # The last rank to come sets "all": each rank waits for one key, so that a meeting costs rank 0 the same for many ranks.
    if store.add(name, 1) == world_size:
        store.set(f"{name}/all", "")
    try:
        store.wait([f"{name}/all"], timeout)
        return ""
    except dist.DistStoreError:
        return ", ".join(str(r) for r in range(world_size) if not store.check([f"{name}/{r}"]))


def meet(what: str, timeout_s: float) -> None:
    """Waits until every rank has called meet(), for a limited time. Collective.

    barrier() waits for a missing rank for hours, and cannot tell which one is missing.

    Args:
        what: What the ranks are about to do together.
        timeout_s: Seconds to wait.

    Raises:
        TimeoutError: Ranks are missing; the message names them.
    """
    global _meetings
    if world_size() == 1:
        return
    _meetings += 1
    if missing := _meet(_store, f"meeting/{_meetings}", rank(), world_size(), timedelta(seconds=timeout_s)):
        raise TimeoutError(
            f"rank {rank()} on {socket.gethostname()} waited {timeout_s:.0f} s for the others, for {what}. These ranks of "
            f"{world_size()} did not come: {missing}. Their logs tell what they did instead."
        )


def leave(timeout_s: float = 60.0) -> None:
    """Waits until every rank has called leave(). Call it before the process exits. Collective.

    A rank that exits closes its connections. If another rank is still inside the last collective then, gloo aborts the other
    rank. So each rank counts itself in the store, which needs no collective, and waits until all ranks are counted.

    Args:
        timeout_s: Seconds after which the process stops waiting.
    """
    if world_size() == 1:
        return
    deadline = time.monotonic() + timeout_s
    # Rank 0 serves the store. An error means that rank 0 has exited, so it has counted all ranks: stop waiting.
    with contextlib.suppress(dist.DistError, RuntimeError):
        _store.add("left", 1)
        while _store.add("left", 0) < world_size() and time.monotonic() < deadline:
            time.sleep(0.01)


def barrier() -> None:
    """Waits until every rank has called barrier(). Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier(_control)


def broadcast(value: T, source: int = 0) -> T:
    """Returns the value of one rank on all ranks. Collective.

    Args:
        value: Any picklable value; ignored on all ranks except `source`.
        source: The rank whose value is returned.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=_control)
    return box[0]


def gather(value: T) -> list[T]:
    """Returns every rank's picklable value, in rank order, on all ranks. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_control)
    return values


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all ranks in place and returns it. Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def run_on_leader(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function on rank 0 and returns its result on every rank. Collective.

    An error on rank 0 is raised on every rank. Otherwise the other ranks would wait for the result forever.

    Args:
        function: The function. Its result must be picklable.
        *arguments: The function's arguments; used on rank 0 only.

    Raises:
        UserError: The function raised UserError, or a subclass of it, which is kept.
        LeaderFailed: On ranks other than 0: the function raised any other error. That is no mistake of the user, so the ranks
            fail with exit code 1 and the stage is tried again.
        Exception: On rank 0: the function raised this error.
    """
    if world_size() == 1:
        return function(*arguments)
    error, value = None, None
    if rank() == 0:
        try:
            value = function(*arguments)
        except Exception as raised:
            error = raised
            message = str(raised) if isinstance(raised, UserError) else f"rank 0 failed: {raised!r}"
            value = type(raised)(message) if isinstance(raised, UserError) else LeaderFailed(message)
    with watchdog.paused():
        failed, value = broadcast((error is not None, value))
    if failed:
        raise error or value
    return value


def rank() -> int:
    """Returns this process's rank; 0 before init()."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of ranks; 1 before init()."""
    return dist.get_world_size() if dist.is_initialized() else 1
