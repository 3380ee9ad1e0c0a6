"""The plan at 10,000 ranks and up to a billion samples, simulated on one core: time, memory, shards, and exactly-once.

    python -m benchmarks.order

Prints a table within two minutes. Shards hold 9,000 to 11,000 samples; the global batch is 80,000 with 10,000 streams,
one to a rank: under the default of 64, some 156 ranks would read the same 1/64 of the shards. Shards of a rank and of a
node of 8 ranks are counted over a whole epoch. "Mixed" is a mixture of seven classes about as frequent as HAM10000's,
drawn with balance 0.5: its nominal epoch repeats rare classes, and reads their shards anew on every pass.
"""

import random
import time
import tracemalloc
from itertools import islice

import numpy as np

from hpc.data.order import MixtureOrder, SampleOrder, class_weights
from hpc.data.shards import training_batches

RANKS, NODE, BATCH, STREAMS, SHARD = 10_000, 8, 80_000, 10_000, 10_000
CLASSES = [0.67, 0.11, 0.11, 0.05, 0.03, 0.02, 0.01]


def shards(size: int, each: int = SHARD) -> np.ndarray:
    return np.random.default_rng(0).integers(each * 9 // 10, each * 11 // 10, size // SHARD)


def plain(size: int) -> SampleOrder:
    return SampleOrder(shards(size), BATCH, streams=STREAMS)


def mixed(size: int) -> MixtureOrder:
    counts = [shards(size, int(SHARD * part)) for part in CLASSES]
    return MixtureOrder(counts, class_weights([n.sum() for n in counts], 0.5), BATCH, streams=STREAMS)


def positions(plan, epoch: int, rank: int) -> list[int]:
    """Positions of one epoch that a rank takes."""
    first, last = epoch * plan.size, (epoch + 1) * plan.size
    steps = range(first // BATCH, -(-last // BATCH))
    batches = islice(training_batches(steps.start * BATCH, BATCH, BATCH // RANKS, rank, RANKS), len(steps))
    return [position for batch in batches for position, _ in batch if first <= position < last]


def cost(make, size: int, rng: random.Random) -> dict:
    """Fresh processes of random ranks deep in later epochs: 200 rank-batches each, timed; then again, traced for memory."""
    starts = [(rng.randrange(RANKS), rng.randrange(5, 50) * size // BATCH * BATCH) for _ in range(5)]
    built, first, rest = [], [], []
    for rank, start in starts:
        began = time.perf_counter()
        plan = make(size)
        built.append(time.perf_counter() - began)
        batches = [[p for p, _ in b] for b in islice(training_batches(start, BATCH, BATCH // RANKS, rank, RANKS), 200)]
        began = time.perf_counter()
        plan.sample(batches[0][0])  # permutes the shards of this epoch
        first.append(time.perf_counter() - began)
        began = time.perf_counter()
        for batch in batches:
            for position in batch:
                plan.sample(position)
        rest.append((time.perf_counter() - began) / 1600)
    tracemalloc.start()
    plan = make(size)
    for batch in batches:
        for position in batch:
            plan.sample(position)
    memory, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "build, ms": f"{max(built) * 1e3:.1f}",
        "first sample, ms": f"{max(first) * 1e3:.1f}",
        "µs per sample": f"{np.mean(rest) * 1e6:.1f}",
        "memory, MB": f"{memory / 1e6:.2f}",
        "peak, MB": f"{peak / 1e6:.2f}",
    }


def read(plan, epoch: int, node: int) -> list[list[tuple]]:
    """What each rank of a node reads in an epoch."""
    ranks = range(node * NODE, (node + 1) * NODE)
    return [[plan.sample(position)[-2:] for position in positions(plan, epoch, rank)] for rank in ranks]


def check_all(plan: SampleOrder, epoch: int) -> None:
    """Every sample once among all ranks, in a bitmap."""
    seen = np.zeros((len(plan.counts), plan.counts.max()), dtype=np.uint8)
    for rank in range(RANKS):
        for position in positions(plan, epoch, rank):
            seen[plan.sample(position)] += 1
    assert (seen.sum(1) == plan.counts).all() and seen.max() == 1


def check_node(plan: SampleOrder, seen: list[list[tuple]]) -> None:
    """A node's eight whole streams are one run of samples, each once: whole shards, but for a piece at either end."""
    members, times = np.unique([s * 2 * SHARD + i for rank in seen for s, i in rank], return_counts=True)
    pieces = np.split(members, np.flatnonzero(np.diff(members // (2 * SHARD))) + 1)
    cut = [piece for piece in pieces if len(piece) < plan.counts[piece[0] // (2 * SHARD)]]
    assert (times == 1).all() and len(cut) <= 2 and all(piece[-1] - piece[0] == len(piece) - 1 for piece in cut)


def main() -> None:
    rng, rows = random.Random(0), []
    for make, exponents in ((plain, (6, 7, 8, 9)), (mixed, (8, 9))):
        for exponent in exponents:
            size, epoch, once = 10**exponent, rng.randrange(3, 20), ""
            row = {"": make.__name__, "samples": f"10^{exponent}", "shards": f"{size // SHARD:,}"} | cost(make, size, rng)
            plan, of_rank, of_node = make(size), [], []
            for node in rng.sample(range(RANKS // NODE), 5 if make is plain else 1):
                seen = read(plan, epoch, node)
                of_rank += [len({shard for shard, _ in members}) for members in seen]
                of_node += [len({shard for members in seen for shard, _ in members})]
                if make is plain:
                    check_node(plan, seen)
                    once = "5 nodes"
            if make is plain and size <= 10**7:
                check_all(plan, epoch)
                once = "all ranks"
            rows.append(row | {"shards per rank": max(of_rank), "per node": max(of_node), "exactly once": once})
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
