"""Ranks as processes of this machine: started together, ended together."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from hpc import config as hpc_config
from hpc import errors
from hpc.run import rundir
from lesiongen.experiment import Experiment
from lesiongen.stages.base import Stage


def run(config: Experiment, stage: Stage) -> int:
    """config.local.ranks processes on this machine. The first that fails ends the others. Returns the exit code."""
    ranks = config.local.ranks
    folder = config.directory / "jobs" / stage.name
    rundir.atomic_write(folder / "config.yaml", hpc_config.to_yaml(config).encode())
    common = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _free_port(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // ranks)),
    }
    processes = []
    for rank in range(ranks):
        env = os.environ | {k: str(v) for k, v in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        command = [sys.executable, "-m", "launch", "rank", str(folder / "config.yaml"), stage.name]
        # Rank 0 speaks to the terminal, the others into files. Their own session: Ctrl-C reaches us, and we pass it on.
        out = None if rank == 0 else open(folder / f"rank-{rank}.log", "ab")  # noqa: SIM115
        processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True))
        if out:
            out.close()
    return _watch(processes, folder)


def _watch(processes: list[subprocess.Popen], folder: Path) -> int:
    forwarded = set()

    def forward(number, _frame):
        number = signal.SIGTERM if number == signal.SIGINT else number
        forwarded.add(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    try:
        while True:
            codes = [p.poll() for p in processes]
            failed = [(rank, c) for rank, c in enumerate(codes) if c]
            if failed:
                time.sleep(0.5)  # one that fails takes others with it: see which knows why
                failed = [(rank, c) for rank, p in enumerate(processes) if (c := p.poll())]
                failed.sort(key=lambda one: one[1] in (errors.FAILED, -signal.SIGABRT))
                break
            if all(c == 0 for c in codes):
                return errors.DONE
            time.sleep(0.05)
        deadline = time.monotonic() + 15  # ranks that stop together for the same reason need no killing
        while time.monotonic() < deadline and any(p.poll() is None for p in processes) and failed[0][1] > 0:
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
    rank, code = failed[0]
    if -code in forwarded:  # before the rank could listen
        print("lesiongen: interrupted; run the same command again to go on", file=sys.stderr)
        return errors.RESUMABLE
    if code < 0:
        print(
            f"lesiongen: rank {rank} was killed by {signal.Signals(-code).name}; its log is "
            f"{folder / f'rank-{rank}.log' if rank else 'above'}. Run the same command again to go on.",
            file=sys.stderr,
        )
        return errors.FAILED
    if rank:
        log = folder / f"rank-{rank}.log"
        words = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        print(f"lesiongen: rank {rank} ended with {code}; the last it said in {log}: {words}", file=sys.stderr)
    return code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
