"""Mixtures: a component's samples all come once before any comes twice, batches follow the weights, streams read few shards."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.data.order import EvenLayout, MixtureOrder, SampleOrder, TableLayout, class_weights
from hpc.data.shards import training_batches

shards = st.lists(st.integers(1, 30), min_size=1, max_size=6)
components = st.lists(st.tuples(shards, st.floats(0.01, 1)), min_size=1, max_size=5)
batches = st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 12))


def mixture(parts, layout, seed=0, window=7):
    streams, width = layout
    counts, weights = zip(*parts, strict=True)
    return MixtureOrder(counts, weights, streams * width, seed, streams, window)


@settings(max_examples=40, deadline=None)
@given(components, batches, st.integers(0, 9))
def test_every_member_once_before_any_twice(parts, layout, seed):
    mix = mixture(parts, layout, seed)
    seen = [[] for _ in parts]
    for position in range(1500):
        component, *member = mix.sample(position)
        seen[component].append(tuple(member))
    for (counts, _), members in zip(parts, seen, strict=True):
        everything = [(shard, i) for shard, n in enumerate(counts) for i in range(n)]
        rounds = [members[i : i + len(everything)] for i in range(0, len(members), len(everything))]
        assert all(sorted(whole) == everything for whole in rounds[:-1])
        assert all(len(set(part)) == len(part) for part in rounds[-1:])


@settings(max_examples=40, deadline=None)
@given(components, batches, st.integers(0, 9))
def test_weights_are_met_in_blocks_and_in_every_batch(parts, layout, seed):
    mix = mixture(parts, layout, seed)
    table, slots = mix._tables[0], int(mix.quotas.sum())
    exact = np.array([w for _, w in parts]) / sum(w for _, w in parts) * slots
    assert slots % mix.batch == 0 and slots >= 4096
    assert np.abs(mix.quotas - exact).max() < 1 and mix.quotas.min() >= 15
    assert [mix.sample(5 * slots + i)[0] for i in range(300)] == table[:300].tolist()  # each block repeats the table
    batch_counts = np.stack([np.bincount(batch, minlength=len(parts)) for batch in table.reshape(-1, mix.batch)])
    share = mix.quotas / slots * mix.batch
    assert (batch_counts.sum(0) == mix.quotas).all()
    assert np.abs(batch_counts - share).max() < 1
    drift = np.cumsum(batch_counts, axis=0) - np.arange(1, len(batch_counts) + 1)[:, None] * share
    assert np.abs(drift).max() <= 4  # a rare component is spread over the block


@settings(max_examples=30, deadline=None)
@given(components, st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=5), st.integers(0, 10**12))
def test_resumed_anywhere_by_any_world(parts, worlds, step):
    """Training resumes with other numbers of ranks, each time in a new process. The samples must be those of one run."""
    undisturbed, position, batch = mixture(parts, (8, 1)), step * 8, 8
    for world in worlds:
        fresh = pickle.loads(pickle.dumps(mixture(parts, (8, 1))))
        for rank in reversed(range(world)):
            for p, slot in next(training_batches(position, batch, batch // world, rank, world)):
                assert p == position + slot and fresh.sample(p) == undisturbed.sample(p)
        position += batch


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 200))
def test_patterns_count_streams(streams, table, position):
    table = np.array(table) % streams
    pattern, sequence = TableLayout(table, streams), [int(table[i % len(table)]) for i in range(position)]
    for stream in range(streams):
        assert pattern.positions_before(position, stream) == sequence.count(stream)
        assert pattern.positions_of_earlier_streams(position, stream) == sum(s < stream for s in sequence)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), shards, st.integers(0, 3))
def test_slots_are_a_pattern(streams, width, counts, seed):
    """The formulas of EvenLayout and the tables of TableLayout give the same sample order."""
    slots = EvenLayout(streams * width, streams)
    pattern = TableLayout(np.array([slots.stream(j) for j in range(slots.batch)]), streams)
    plain, tabled = (SampleOrder(counts, slots.batch, seed, streams, 5, layout=layout) for layout in (None, pattern))
    assert [plain.sample(p) for p in range(200)] == [tabled.sample(p) for p in range(200)]


def test_streams_keep_to_their_range():
    """With 64 ranks, each rank and each node of 8 ranks reads about its share of each component's shards."""
    mix = MixtureOrder([(20,) * 700, (20,) * 300], [0.7, 0.3], batch=512, streams=64)
    slots, shards_of_rank = mix.quotas.sum(), [set() for _ in range(64)]
    for position in range(mix.size):
        component, shard, _ = mix.sample(position)
        shards_of_rank[position % 512 // 8].add((component, shard))
    stream = np.arange(slots) % 512 // 8
    for rank, rank_shards in enumerate(shards_of_rank):
        epoch_share = np.bincount(mix._tables[0][stream == rank], minlength=2) / mix.quotas  # share of each component's epoch
        assert len(rank_shards) <= epoch_share @ [700, 300] + 2 * 3 + 2  # more shards: cut ones, and those of the next epoch
    assert max(len(set().union(*shards_of_rank[first : first + 8])) for first in range(0, 64, 8)) <= 1000 / 8 * 1.15 + 10


def test_rare_classes_come_as_often_as_frequent_ones():
    counts = [6700, 1100, 115, 0]  # images of each class, in two shards; the last class has none
    mix = MixtureOrder([(n // 2, n - n // 2) if n else () for n in counts], class_weights(counts, 1), batch=30)
    seen = Counter(mix.sample(position) for position in range(3 * 1150))
    assert [sum(n for (c, *_), n in seen.items() if c == i) for i in range(4)] == pytest.approx([1150] * 3 + [0], abs=5)
    assert {n for (c, *_), n in seen.items() if c == 2} <= {9, 10, 11}
    assert {n for (c, *_), n in seen.items() if c == 1} <= {1, 2}
    assert mix.size == sum(counts)


def test_seeds_give_other_mixtures():
    first, second = (MixtureOrder([(50,), (50,)], [1, 1], 8, seed) for seed in (0, 1))
    assert [first.sample(p) for p in range(50)] != [second.sample(p) for p in range(50)]
    members = [[m for c, *m in map(first.sample, range(100)) if c == i] for i in range(2)]
    assert members[0] != members[1]  # the components' orders differ


def test_tiny_weights_get_a_slot_and_far_positions_cost_no_more():
    mix = MixtureOrder([(5000,) * 100, (3,)], [1, 1e-9], 64)
    assert mix.quotas.tolist() == [2**20 - 1, 1]
    component, shard, ordinal = mix.sample(10**15)
    assert component in (0, 1) and shard < 100 and ordinal < 5000


def test_class_weights():
    assert class_weights([6000, 3000, 1000], 0) == pytest.approx([0.6, 0.3, 0.1])
    assert class_weights([6000, 3000, 1000], 1) == pytest.approx([1 / 3] * 3)
    assert class_weights([400, 100], 0.5) == pytest.approx([2 / 3, 1 / 3])
    assert class_weights([5, 0], 1) == [1, 0]
    for balance in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="balance"):
            class_weights([1, 2], balance)


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, float("nan")]])
def test_refusals(weights):
    with pytest.raises(ValueError, match="weights"):
        MixtureOrder([(3,), (4,)], weights, 4)
