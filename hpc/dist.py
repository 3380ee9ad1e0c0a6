"""One Topology from Slurm, torchrun's variables or a single process; joining with a time-out that names who is missing."""

import contextlib
import os
import re
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from hpc.errors import UserError

_store: dist.Store | None = None  # where the ranks of this process's group meet


@dataclass(frozen=True)
class Topology:
    """Who this process is among `world` ranks on `nodes` machines, and where rank 0 listens."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def leader(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        # Some clusters show each task its own GPU only.
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", self.local_rank % count) if count else torch.device("cpu")


def detect(env: dict | None = None) -> Topology:
    """Reads the environment: torchrun's variables first (they are explicit), then a Slurm step, else one process."""
    env = dict(os.environ) if env is None else env
    if "RANK" in env and "WORLD_SIZE" in env:
        return Topology(
            rank=int(env["RANK"]),
            world=int(env["WORLD_SIZE"]),
            local_rank=int(env.get("LOCAL_RANK", 0)),
            nodes=max(1, int(env["WORLD_SIZE"]) // int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]))),
            address=env.get("MASTER_ADDR", "127.0.0.1"),
            port=int(env.get("MASTER_PORT", 29500)),
        )
    if "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        return from_slurm(env)
    return Topology()


def from_slurm(env: dict) -> Topology:
    """A rank of a Slurm step, whatever torchrun's variables say: sbatch hands on those of the shell it is called from."""
    # A port of the job's own, another one after each requeue: the old one may still be closing.
    port = 20000 + (int(env["SLURM_JOB_ID"]) * 7 + int(env.get("SLURM_RESTART_COUNT", 0))) % 12000
    return Topology(
        rank=int(env["SLURM_PROCID"]),
        world=int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"]),
        local_rank=int(env.get("SLURM_LOCALID", 0)),
        nodes=int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES", 1)),
        address=first_host(env["SLURM_STEP_NODELIST"]),
        port=port,
    )


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list such as "a[01-03,7],b2": "a01"."""
    match = re.match(r"([^\[,]+)(?:\[([^\]]*)\])?([^,\[]*)", nodelist)
    head, inner, tail = match.groups()
    return head + re.split(r"[,-]", inner)[0] + tail if inner else head


def init(topology: Topology, timeout_s: float = 300.0) -> None:
    """Joins the process group. Raises TimeoutError that names the ranks that did not come. Called once a process."""
    if dist.is_initialized():
        return
    if topology.device.type == "cuda":
        torch.cuda.set_device(topology.device)
    backend = "nccl" if topology.device.type == "cuda" else "gloo"
    global _store
    store = _store = dist.HashStore() if topology.world == 1 else _join(topology, timedelta(seconds=timeout_s))
    # Variables that libraries read for themselves.
    os.environ |= {
        "RANK": str(topology.rank),
        "WORLD_SIZE": str(topology.world),
        # DeepSpeed takes it for the GPU's number; where each task sees only its own GPU that is 0.
        "LOCAL_RANK": str(topology.device.index or 0 if topology.device.type == "cuda" else topology.local_rank),
        "MASTER_ADDR": topology.address,
        "MASTER_PORT": str(topology.port or 29500),
    }
    dist.init_process_group(backend, store=store, rank=topology.rank, world_size=topology.world, timeout=timedelta(hours=12))


def _join(topology: Topology, timeout: timedelta):
    try:
        store = dist.TCPStore(topology.address, topology.port, topology.world, topology.leader, timeout, wait_for_workers=False)
    except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
        raise TimeoutError(
            f"rank {topology.rank} on {socket.gethostname()} cannot reach rank 0 at {topology.address}:{topology.port} "
            f"within {timeout.total_seconds():.0f} s ({str(error).splitlines()[0]})"
        ) from None
    store.set(f"joined/{topology.rank}", socket.gethostname())
    deadline = time.monotonic() + timeout.total_seconds()
    while missing := [r for r in range(topology.world) if not store.check([f"joined/{r}"])]:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"after {timeout.total_seconds():.0f} s these ranks of {topology.world} have not joined: "
                f"{', '.join(map(str, missing))}. Look at their logs; a node may be down or a task failed to start."
            )
        time.sleep(0.05)
    return store


def leave(timeout_s: float = 60.0) -> None:
    """Waits until every rank has come here. A rank that goes while another still ends the last collective closes the
    connection under it, and gloo aborts that process: so they meet in the store, whose server, rank 0, may go first."""
    if world() == 1:
        return
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(dist.DistError, RuntimeError):  # the server is gone: all were here
        _store.add("left", 1)
        while _store.add("left", 0) < world() and time.monotonic() < deadline:
            time.sleep(0.01)


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def broadcast(value, source: int = 0):
    """Any picklable value of rank `source`, on all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather(value) -> list:
    """Every rank's value, in rank order, on all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """All-reduced in place (sum) and returned."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def run_on_leader(function, *arguments):
    """Runs on rank 0; its result, or its UserError, reaches every rank, so that all go on or all stop."""
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
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
