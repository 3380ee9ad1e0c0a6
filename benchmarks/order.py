"""The sample order of 10,000 ranks and up to a billion samples, simulated on one core: time, memory, and shards that are read.

    python -m benchmarks.order

Prints a Markdown table within two minutes. Shards hold 9,000 to 11,000 samples. The global batch is 80,000 with 10,000 streams,
one for each rank; with the default of 64 streams, about 156 ranks would read the same 1/64 of the shards. The shards of a rank
and of a node of 8 ranks are counted over a whole epoch. The last column says for which ranks the benchmark has checked that
every sample comes exactly once.

"mixed" is a mixture of seven classes about as frequent as those of HAM10000, with balance 0.5. Its nominal epoch repeats rare
classes, and every pass over a class reads the shards of the class again.
"""

import random
import time
import tracemalloc
from collections.abc import Callable
from itertools import islice

import numpy as np

from hpc.data.order import MixtureOrder, SampleOrder, class_weights
from hpc.data.shards import training_batches

RANKS, RANKS_PER_NODE, BATCH, STREAMS, SHARD = 10_000, 8, 80_000, 10_000, 10_000
MICRO = BATCH // RANKS
STEPS = 200  # of a rank that are timed
CLASSES = [0.67, 0.11, 0.11, 0.05, 0.03, 0.02, 0.01]

Order = SampleOrder | MixtureOrder


def shard_counts(size: int, mean: int = SHARD) -> np.ndarray:
    """Returns the number of samples in each shard.

    Args:
        size: Number of samples of the data set; it has size / SHARD shards.
        mean: Mean number of samples in a shard: fewer than SHARD for one class of the data set.
    """
    return np.random.default_rng(0).integers(mean * 9 // 10, mean * 11 // 10, size // SHARD)


def plain(size: int) -> SampleOrder:
    """Returns the order of a data set of about `size` samples."""
    return SampleOrder(shard_counts(size), BATCH, streams=STREAMS)


def mixed(size: int) -> MixtureOrder:
    """Returns the order of a balanced mixture of seven classes with about `size` samples."""
    counts = [shard_counts(size, int(SHARD * share)) for share in CLASSES]
    return MixtureOrder(counts, class_weights([n.sum() for n in counts], 0.5), BATCH, streams=STREAMS)


def rank_positions(order: Order, epoch: int, rank: int) -> list[int]:
    """Returns the positions of an epoch that a rank processes."""
    first, last = epoch * order.size, (epoch + 1) * order.size
    steps = range(first // BATCH, -(-last // BATCH))
    batches = islice(training_batches(steps.start * BATCH, BATCH, MICRO, rank, RANKS), len(steps))
    return [position for batch in batches for position, _ in batch if first <= position < last]


def measure(make: Callable[[int], Order], size: int, rng: random.Random) -> dict[str, str]:
    """Measures time and memory of five random ranks, each from a random position in epochs 5 to 49.

    Args:
        make: Makes the order: plain or mixed.
        size: Number of samples.
        rng: Draws ranks and positions.

    Returns:
        Cells of the table, by column. Memory is measured in a further run with the last of the ranks.
    """
    starts = [(rng.randrange(RANKS), rng.randrange(5, 50) * size // BATCH * BATCH) for _ in range(5)]
    build_seconds, first_seconds, sample_seconds = [], [], []
    for rank, start in starts:
        began = time.perf_counter()
        order = make(size)
        build_seconds.append(time.perf_counter() - began)
        batches = [[p for p, _ in b] for b in islice(training_batches(start, BATCH, MICRO, rank, RANKS), STEPS)]
        began = time.perf_counter()
        order.sample(batches[0][0])  # permutes the shards of this epoch
        first_seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        for batch in batches:
            for position in batch:
                order.sample(position)
        sample_seconds.append((time.perf_counter() - began) / (STEPS * MICRO))
    tracemalloc.start()
    order = make(size)
    for batch in batches:
        for position in batch:
            order.sample(position)
    memory, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "build, ms": f"{max(build_seconds) * 1e3:.1f}",
        "first sample, ms": f"{max(first_seconds) * 1e3:.1f}",
        "µs per sample": f"{np.mean(sample_seconds) * 1e6:.1f}",
        "memory, MB": f"{memory / 1e6:.2f}",
        "peak, MB": f"{peak / 1e6:.2f}",
    }


def node_samples(order: Order, epoch: int, node: int) -> list[list[tuple[int, int]]]:
    """Returns (shard, ordinal) of the samples that each rank of a node reads in an epoch."""
    ranks = range(node * RANKS_PER_NODE, (node + 1) * RANKS_PER_NODE)
    return [[order.sample(position)[-2:] for position in rank_positions(order, epoch, rank)] for rank in ranks]


def check_all(order: SampleOrder, epoch: int) -> None:
    """Asserts that all ranks together read every sample of an epoch exactly once."""
    times_read = np.zeros((len(order.counts), order.counts.max()), dtype=np.uint8)
    for rank in range(RANKS):
        for position in rank_positions(order, epoch, rank):
            times_read[order.sample(position)] += 1
    assert (times_read.sum(1) == order.counts).all() and times_read.max() == 1


def check_node(order: SampleOrder, samples: list[list[tuple[int, int]]]) -> None:
    """Asserts that a node reads one contiguous run of samples, each once.

    The eight streams of a node are neighbours. The run consists of whole shards, and of a part of a shard at either end.
    """
    keys = [shard * 2 * SHARD + ordinal for of_rank in samples for shard, ordinal in of_rank]
    unique_keys, times_read = np.unique(keys, return_counts=True)
    parts = np.split(unique_keys, np.flatnonzero(np.diff(unique_keys // (2 * SHARD))) + 1)  # by shard
    cut = [part for part in parts if len(part) < order.counts[part[0] // (2 * SHARD)]]
    assert (times_read == 1).all() and len(cut) <= 2 and all(part[-1] - part[0] == len(part) - 1 for part in cut)


def main() -> None:
    """Runs all measurements and prints the table."""
    rng, rows = random.Random(0), []
    for make, exponents in ((plain, (6, 7, 8, 9)), (mixed, (8, 9))):
        for exponent in exponents:
            size, epoch, checked = 10**exponent, rng.randrange(3, 20), ""
            row = {"": make.__name__, "samples": f"10^{exponent}", "shards": f"{size // SHARD:,}"} | measure(make, size, rng)
            # Count the shards of some nodes and their ranks.
            order, shards_of_rank, shards_of_node = make(size), [], []
            for node in rng.sample(range(RANKS // RANKS_PER_NODE), 5 if make is plain else 1):
                samples = node_samples(order, epoch, node)
                shards_of_rank += [len({shard for shard, _ in of_rank}) for of_rank in samples]
                shards_of_node += [len({shard for of_rank in samples for shard, _ in of_rank})]
                if make is plain:
                    check_node(order, samples)
                    checked = "5 nodes"
            # Check every rank where there are few samples.
            if make is plain and size <= 10**7:
                check_all(order, epoch)
                checked = "all ranks"
            row |= {"shards per rank": max(shards_of_rank), "per node": max(shards_of_node), "exactly once": checked}
            rows.append(row)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
