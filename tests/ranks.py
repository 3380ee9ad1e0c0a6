"""Rank processes that run for the whole test session, because importing DeepSpeed takes seconds.

If a call takes longer than TIMEOUT_S, every rank prints its stack and is killed.
"""

import faulthandler
import multiprocessing
import os
import signal
import socket
import time
import traceback

TIMEOUT_S = 120


def _rank(rank: int, world: int, port: int, pipe) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    torch.set_num_threads(1)
    from hpc import dist

    topology = dist.detect()
    dist.init(topology, timeout_s=60)
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            pipe.send((True, function(topology, *arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


class Ranks:
    """`world` processes on this machine that form one process group."""

    def __init__(self, world: int):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world):
            our_end, rank_end = context.Pipe()
            process = context.Process(target=_rank, args=(rank, world, port, rank_end))
            process.start()
            self.pipes.append(our_end)
            self.processes.append(process)

    def run(self, function, *arguments) -> list:
        """Calls function(topology, *arguments) on every rank. Returns the results in rank order. Fails if any rank fails."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results, deadline = [], time.monotonic() + TIMEOUT_S
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0.1, deadline - time.monotonic())):
                for process in self.processes:
                    os.kill(process.pid, signal.SIGUSR1)
                time.sleep(1)
                self.close()
                raise TimeoutError(f"rank {rank} did not end within {TIMEOUT_S} s")
            ok, value = pipe.recv()
            if not ok:
                self.close()
                raise AssertionError(f"rank {rank}:\n{value}")
            results.append(value)
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
