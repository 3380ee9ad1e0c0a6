"""The plan: an epoch is the data set, each sample once, whatever the topology, the streams and the place of a kill."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.plan import Plan, sample_seed, share, split
from hpc.shards import evaluation_batches, training_batches

counts = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(counts, st.sampled_from([1, 2, 4]), st.integers(1, 8), st.integers(1, 50), st.integers(0, 9), st.integers(0, 5))
def test_every_epoch_is_the_data_set(counts, streams, width, window, seed, epoch):
    plan = Plan(tuple(counts), batch=streams * width, seed=seed, streams=streams, window=window)
    seen = [plan.sample(p) for p in range(epoch * plan.size, (epoch + 1) * plan.size)]
    assert sorted(seen) == [(s, i) for s, n in enumerate(counts) for i in range(n)]


@settings(max_examples=40, deadline=None)
@given(counts, st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=5), st.integers(0, 9))
def test_kills_and_changes_of_world_lose_nothing(counts, worlds, seed):
    """Each world trains some steps, is killed, and the next goes on: together they see the undisturbed sequence."""
    plan, batch, position, seen = Plan(tuple(counts), 8, seed), 8, 0, []
    for number, world in enumerate(worlds):
        streams = [training_batches(position, batch, 8 // world, rank, world) for rank in range(world)]
        for _ in range(number % 3 + 1):
            slots = sorted(s for stream in streams for s in next(stream))
            assert [slot for _, slot in slots] == list(range(batch))
            seen += [plan.sample(p) for p, _ in slots]
            position += batch
    fresh = Plan(tuple(counts), 8, seed)
    assert seen == [fresh.sample(p) for p in range(position)]


def test_epochs_differ_and_seeds_differ():
    def order(seed, epoch):
        plan = Plan((50, 50, 50), 10, seed)
        return [plan.sample(p) for p in range(epoch * 150, (epoch + 1) * 150)]

    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_a_rank_reads_few_shards():
    plan = Plan((100,) * 64, batch=64, window=100)
    for rank in range(8):
        shards = {plan.sample(p + slot)[0] for p in range(0, plan.size, 64) for slot in share(64, rank, 8)}
        assert len(shards) <= 64 / 8 + 8 + 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 30))
def test_evaluation_covers_a_split_once(size, world, micro):
    seen = [i for rank in range(world) for batch in evaluation_batches(size, micro, rank, world) for i, _ in batch]
    assert seen == list(range(size))
    assert max(len(split(size, r, world)) for r in range(world)) - min(len(split(size, r, world)) for r in range(world)) <= 1


def test_far_positions_cost_what_near_ones_do():
    plan = Plan((5000,) * 1000, 4096)
    shard, ordinal = plan.sample(10**15)
    assert 0 <= shard < 1000
    assert 0 <= ordinal < 5000
    assert len(plan._cache) <= 2 * plan.streams + 2


def test_seeds_do_not_collide():
    seeds = {sample_seed(s, p) for s in range(4) for p in range(25_000)}
    assert len(seeds) == 100_000
    assert abs(np.mean([s / 2**63 for s in seeds]) - 0.5) < 0.01


def test_refusals():
    with pytest.raises(ValueError, match="does not divide"):
        share(10, 0, 3)
    with pytest.raises(ValueError, match="empty"):
        Plan((3, 0), 1)
