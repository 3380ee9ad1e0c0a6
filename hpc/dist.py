"""The process group: which rank this process is, joining the other ranks, and small collectives for Python objects.

Every function works with one process too, with or without a process group, so callers need no special case. The topology comes
from the environment that torchrun or Slurm sets. Joining fails after a timeout with the numbers of the missing ranks.
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

from hpc.errors import UserError

T = TypeVar("T")
LONGEST_WAIT = timedelta(hours=12)

_store: dist.Store | None = None  # key-value store of this process's group; leave() counts ranks in it


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

    The variables of torchrun come first, because they are set on purpose. Then follow those of a Slurm step. Without either,
    the process is alone.

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

    Variables of torchrun are ignored: sbatch copies the environment of the shell that submits the job, which may contain some.

    Args:
        env: The environment of a task of the step.
    """
    # The port depends on the job and changes at each requeue, because the old port may still be closing.
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
    prefix, ranges, suffix = re.match(r"([^\[,]+)(?:\[([^\]]*)\])?([^,\[]*)", nodelist).groups()
    return prefix + re.split(r"[,-]", ranges)[0] + suffix if ranges else prefix


def init(topology: Topology, timeout_s: float = 300.0) -> None:
    """Joins the process group and sets the environment variables that libraries read. Later calls do nothing. Collective.

    Args:
        topology: This process among the ranks.
        timeout_s: Seconds to wait for the other ranks.

    Raises:
        TimeoutError: Rank 0 cannot be reached, or ranks are missing; the message names them.
    """
    global _store
    if dist.is_initialized():
        return
    if topology.device.type == "cuda":
        torch.cuda.set_device(topology.device)
    backend = "nccl" if topology.device.type == "cuda" else "gloo"
    _store = dist.HashStore() if topology.world_size == 1 else _join(topology, timedelta(seconds=timeout_s))
    os.environ |= {
        "RANK": str(topology.rank),
        "WORLD_SIZE": str(topology.world_size),
        # DeepSpeed uses LOCAL_RANK as the GPU's index, which differs from the local rank where a task sees only its own GPU.
        "LOCAL_RANK": str(topology.device.index or 0 if topology.device.type == "cuda" else topology.local_rank),
        "MASTER_ADDR": topology.address,
        "MASTER_PORT": str(topology.port or 29500),
    }
    # A long timeout: in run_on_leader() all ranks wait in a collective while rank 0 works alone, for example packs a manifest.
    dist.init_process_group(backend, store=_store, rank=topology.rank, world_size=topology.world_size, timeout=LONGEST_WAIT)


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
    store.set(f"joined/{topology.rank}", socket.gethostname())
    deadline = time.monotonic() + timeout.total_seconds()
    while missing := [r for r in range(topology.world_size) if not store.check([f"joined/{r}"])]:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"after {timeout.total_seconds():.0f} s these ranks of {topology.world_size} have not joined: "
                f"{', '.join(map(str, missing))}. Look at their logs: a node may be down, or a task failed to start."
            )
        time.sleep(0.05)
    return store


def leave(timeout_s: float = 60.0) -> None:
    """Waits until every rank has called leave(). Call it before the process exits. Collective.

    A rank that exits closes its connections. If another rank is still finishing the last collective, gloo then aborts that
    rank. So the ranks wait for one another by counting in the store, which needs no collective.

    Args:
        timeout_s: Seconds after which the process stops waiting.
    """
    if world_size() == 1:
        return
    deadline = time.monotonic() + timeout_s
    # Rank 0 serves the store. An error means that rank 0 has seen every rank in the count and has exited: stop waiting.
    with contextlib.suppress(dist.DistError, RuntimeError):
        _store.add("left", 1)
        while _store.add("left", 0) < world_size() and time.monotonic() < deadline:
            time.sleep(0.01)


def barrier() -> None:
    """Waits until every rank has called barrier(). Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def broadcast(value: T, source: int = 0) -> T:
    """Returns the value of one rank on all ranks. Collective.

    Args:
        value: Any picklable value; ignored on the other ranks.
        source: The rank whose value is returned.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather(value: T) -> list[T]:
    """Returns every rank's picklable value, in rank order, on all ranks. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all ranks in place and returns it. Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def run_on_leader(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function on rank 0 and returns its result on every rank. Collective.

    An error on rank 0 reaches every rank too. Otherwise the other ranks would wait for the result forever.

    Args:
        function: The function. Its result must be picklable.
        *arguments: The function's arguments; used on rank 0 only.

    Raises:
        UserError: The function raised UserError; on the other ranks also for any other error.
        Exception: On rank 0, any other error of the function.
    """
    outcome = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome = (True, function(*arguments))
        except UserError as error:
            outcome = (False, str(error))
        except Exception as error:
            if not dist.is_initialized() or dist.get_world_size() == 1:
                raise
            broadcast((False, f"rank 0 failed: {error!r}"))
            raise
    ok, value = broadcast(outcome)
    if not ok:
        raise UserError(value)
    return value


def rank() -> int:
    """Returns this process's rank; 0 before init()."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of ranks; 1 before init()."""
    return dist.get_world_size() if dist.is_initialized() else 1
