"""How often healthy ranks are called slow, and how soon a slow rank is named (hpc/train/stragglers.py).

    python -m benchmarks.stragglers [--ranks 4] [--intervals 200]

Ranks are processes on this machine, which is busy: with 2 cores, four ranks disturb one another. They train a small prior with
the project's own Trainer. "one interval" is the rule without the need for several slow intervals in a row. In the second part
the forward pass of the last rank takes three times as long.
"""

import argparse
import multiprocessing
import os
import socket
import tempfile
import time
from pathlib import Path

from benchmarks.scale import trainer_of, write_random_codes
from hpc import dist
from hpc.run import metrics_log
from hpc.train import stragglers

STEPS = 3  # in a log interval
MILLIONS, SIDE = 0.5, 8  # parameters and grid of the prior
SLOW_INTERVALS = 20


def train(rank: int, ranks: int, port: int, folder: Path, intervals: int, slow: bool) -> None:
    """Trains on one rank and logs after each interval. If `slow`, the last rank's forward pass takes three times as long."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    topology = dist.detect()
    dist.init(topology)
    stragglers.IN_A_ROW = 1  # main() counts the slow intervals in a row
    trainer = trainer_of(folder, MILLIONS, 0, topology, None)
    if slow and rank == ranks - 1:
        forward = trainer.module.forward

        def slow_forward(batch: dict) -> dict:
            began = time.perf_counter()
            out = forward(batch)
            time.sleep(2 * (time.perf_counter() - began))
            return out

        trainer.module.forward = slow_forward
    with trainer:
        for _ in range(intervals):
            for _ in range(STEPS):
                with trainer.speed.waiting():
                    batch = next(trainer.batches)
                trainer.step([batch], stop=False)
            trainer.log()
    dist.leave()
    os._exit(0)


def named(ranks: int, intervals: int, slow: bool) -> list[int | None]:
    """Trains on all ranks. Returns the rank that is slow in each log interval, or None."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        write_random_codes(folder / "scale" / "codes", SIDE)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ["OMP_NUM_THREADS"] = "1"  # before the ranks load torch
        context = multiprocessing.get_context("spawn")
        arguments = (ranks, port, folder, intervals, slow)
        processes = [context.Process(target=train, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        rows = metrics_log.read_metrics(folder / "zero-0")
        return [row.get("straggler/rank") for row in rows if "lr" in row]


def in_a_row(slow: list[int | None]) -> list[int | None]:
    """Returns the rank that each log interval names, if a rank must be slow in several intervals in a row."""
    number = stragglers.IN_A_ROW
    last = [slow[max(0, i + 1 - number) : i + 1] for i in range(len(slow))]
    return [ranks[-1] if len(ranks) == number and len(set(ranks)) == 1 else None for ranks in last]


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4, help="ranks (default: %(default)s)")
    parser.add_argument("--intervals", type=int, default=200, help="log intervals of healthy ranks (default: %(default)s)")
    args = parser.parse_args()
    found = named(args.ranks, args.intervals, slow=False)
    for text, alarms in (("one interval", found), (f"{stragglers.IN_A_ROW} intervals in a row", in_a_row(found))):
        number = sum(rank is not None for rank in alarms)
        print(f"healthy ranks, {text}: {number} false alarms in {len(found)} intervals", flush=True)
    found = in_a_row(named(args.ranks, SLOW_INTERVALS, slow=True))
    first = next((number for number, rank in enumerate(found, 1) if rank is not None), None)
    right = sum(rank == args.ranks - 1 for rank in found)
    print(f"rank {args.ranks - 1} three times slower: first named after {first} intervals, and in {right} of {len(found)}")


if __name__ == "__main__":
    main()
