"""The sample order: every epoch has each sample once, for any number of ranks, any streams, and after kills at any position."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.data.order import SampleOrder, batch_share, contiguous_share, sample_seed
from hpc.data.shards import evaluation_batches, training_batches

counts = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(counts, st.sampled_from([1, 2, 4]), st.integers(1, 8), st.integers(1, 50), st.integers(0, 9), st.integers(0, 5))
def test_every_epoch_is_the_data_set(counts, streams, width, window, seed, epoch):
    order = SampleOrder(tuple(counts), batch=streams * width, seed=seed, streams=streams, window=window)
    seen = [order.sample(p) for p in range(epoch * order.size, (epoch + 1) * order.size)]
    assert sorted(seen) == [(s, i) for s, n in enumerate(counts) for i in range(n)]


@settings(max_examples=40, deadline=None)
@given(counts, st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=5), st.integers(0, 9))
def test_kills_and_changes_of_world_lose_nothing(counts, worlds, seed):
    """Training resumes with other numbers of ranks. The samples of all parts must be those of an undisturbed training."""
    order, batch, position, seen = SampleOrder(tuple(counts), 8, seed), 8, 0, []
    for number, world in enumerate(worlds):
        streams = [training_batches(position, batch, 8 // world, rank, world) for rank in range(world)]
        for _ in range(number % 3 + 1):
            slots = sorted(s for stream in streams for s in next(stream))
            assert [slot for _, slot in slots] == list(range(batch))
            seen += [order.sample(p) for p, _ in slots]
            position += batch
    fresh = SampleOrder(tuple(counts), 8, seed)
    assert seen == [fresh.sample(p) for p in range(position)]


@settings(max_examples=40, deadline=None)
@given(
    counts,
    st.lists(st.tuples(st.sampled_from([1, 2, 3, 6, 12]), st.integers(1, 5)), min_size=1, max_size=6),
    st.integers(0, 9),
)
def test_a_killed_epoch_is_the_data_set(counts, lives, seed):
    """Training is killed and resumed with other numbers of ranks. Each epoch must have each sample once."""
    batch, position, seen = 12, 0, []
    while position < 2 * sum(counts):
        for world, steps in lives:
            order = SampleOrder(tuple(counts), batch, seed)  # a new process, which knows only the position
            ranks = [training_batches(position, batch, batch // world, rank, world) for rank in range(world)]
            for _ in range(steps):
                seen += [order.sample(p) for rank in ranks for p, _ in next(rank)]
            position += batch * steps
    everything = [(shard, i) for shard, n in enumerate(counts) for i in range(n)]
    for epoch in range(2):
        assert sorted(seen[epoch * len(everything) : (epoch + 1) * len(everything)]) == everything


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 2, 3, 7])
def test_order_knows_no_workers(world, workers):
    """Workers read whole micro-batches in turn and the loader collects them in turn, so a rank's order stays the same."""
    for rank in range(world):
        alone = list(islice(training_batches(16, 16, 2, rank, world), 42))
        parts = [islice(training_batches(16, 16, 2, rank, world), w, None, workers) for w in range(workers)]
        assert workers == 0 or [next(parts[i % workers]) for i in range(42)] == alone


def test_epochs_differ_and_seeds_differ():
    def epoch_samples(seed, epoch):
        order = SampleOrder((50, 50, 50), 10, seed)
        return [order.sample(p) for p in range(epoch * 150, (epoch + 1) * 150)]

    assert epoch_samples(0, 0) != epoch_samples(0, 1)
    assert epoch_samples(0, 0) != epoch_samples(1, 0)


def test_a_rank_reads_few_shards():
    order = SampleOrder((100,) * 64, batch=64, window=100)
    for rank in range(8):
        shards = {order.sample(p + slot)[0] for p in range(0, order.size, 64) for slot in batch_share(64, rank, 8)}
        assert len(shards) <= 64 / 8 + 8 + 1


def test_shards_of_a_rank_and_of_a_node():
    """64 ranks, 1000 shards: each rank, and each node of 8 ranks, reads its share of the shards and at most two cut ones."""
    order, batch = SampleOrder((20,) * 1000, batch=512, streams=64), 512
    for epoch in range(2):
        shards = [set() for _ in range(64)]
        for position in range(epoch * order.size, (epoch + 1) * order.size):
            shards[position % batch // 8].add(order.sample(position)[0])
        # The batch does not divide the epoch, so a rank may have 8 samples more than its share, from one more shard.
        assert max(map(len, shards)) <= 1000 / 64 + 2 + 1
        assert max(len(set().union(*shards[first : first + 8])) for first in range(0, 64, 8)) <= 1000 / 8 + 2 + 4


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 30))
def test_evaluation_covers_a_split_once(size, world, micro):
    seen = [i for rank in range(world) for batch in evaluation_batches(size, micro, rank, world) for i, _ in batch]
    assert seen == list(range(size))
    assert (
        max(len(contiguous_share(size, r, world)) for r in range(world))
        - min(len(contiguous_share(size, r, world)) for r in range(world))
        <= 1
    )


def test_far_positions_cost_what_near_ones_do():
    order = SampleOrder((5000,) * 1000, 4096)
    shard, ordinal = order.sample(10**15)
    assert 0 <= shard < 1000
    assert 0 <= ordinal < 5000
    for position in range(10**15, 10**15 + 40_000):
        order.sample(position)
    assert len(order._cache) <= 2 * order.streams + 2  # a range and a window of each stream, the shards of two epochs


def test_a_million_shards():
    order = SampleOrder(np.full(1_000_000, 1000), 65536)
    shard, ordinal = order.sample(12 * 10**9 + 345)
    assert order.size == 10**9 and 0 <= shard < 1_000_000 and 0 <= ordinal < 1000
    assert sum(array.nbytes for array in order._cache["shards", 0][1]) == 12 * 1_000_000


def test_seeds_do_not_collide():
    seeds = {sample_seed(s, p) for s in range(4) for p in range(25_000)}
    assert len(seeds) == 100_000
    assert abs(np.mean([s / 2**63 for s in seeds]) - 0.5) < 0.01


def test_refusals():
    with pytest.raises(ValueError, match="does not divide"):
        batch_share(10, 0, 3)
    with pytest.raises(ValueError, match="empty"):
        SampleOrder((3, 0), 1)
    with pytest.raises(ValueError, match="streams do not divide"):
        SampleOrder((3,), 10, streams=4)
