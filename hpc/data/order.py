"""Which sample stands where in the endless training sequence. Pure: no I/O, no ranks, no state but one integer.

The global batch of B slots is divided among C canonical streams, fixed per run; slot j belongs to stream ⌊jC/B⌋. A rank
takes a contiguous share of the slots, so it reads only its streams, whatever the number of ranks. Each epoch the shards
are permuted, the resulting sequence of N samples is cut into C contiguous ranges, and samples are shuffled within
windows of a range: a rank reads few shards, in order. Position p lies in epoch ⌊p/N⌋, and within an epoch position →
sample is a bijection: positions run on across epochs and a batch may straddle two.

A mixture deals the same slots out to weighted components, sets or classes, each of which keeps the streams and its own
epochs: every member of a component comes once before any comes twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, gcd

import numpy as np


def batch_share(batch: int, rank: int, world: int) -> range:
    """EvenLayout of the global batch that a rank takes. Raises ValueError where the batch does not divide."""
    if batch % world:
        raise ValueError(f"the global batch of {batch} does not divide among {world} ranks; make it a multiple of {world}")
    return range(rank * batch // world, (rank + 1) * batch // world)


def contiguous_share(count: int, rank: int, world: int) -> range:
    """Contiguous share of `count` items; shares differ by at most one item."""
    return range(rank * count // world, (rank + 1) * count // world)


def default_streams(batch: int) -> int:
    """Largest power of two up to 64 that divides the batch: any such number of ranks then reads whole streams."""
    return gcd(batch, 64)


@dataclass(frozen=True)
class EvenLayout:
    """The plan's rule, slot → stream, in closed form: equal runs of slots, whatever the size of the batch."""

    batch: int
    streams: int

    def __post_init__(self):
        if self.batch % self.streams:
            raise ValueError(f"{self.streams} streams do not divide the global batch of {self.batch}")

    def stream(self, position: int) -> int:
        return position % self.batch // (self.batch // self.streams)

    def of(self, position: int, stream: int) -> int:
        """Positions of a stream before `position`."""
        width = self.batch // self.streams
        rounds, slot = divmod(position, self.batch)
        return rounds * width + min(max(slot - stream * width, 0), width)

    def before(self, position: int, stream: int) -> int:
        """Positions of all earlier streams before `position`."""
        width = stream * (self.batch // self.streams)
        rounds, slot = divmod(position, self.batch)
        return rounds * width + min(slot, width)


class TableLayout:
    """The same for one component of a mixture: its positions follow a table of streams that repeats."""

    def __init__(self, table: np.ndarray, streams: int):
        self.table = table.astype(np.int32)
        self.places = np.argsort(table, kind="stable").astype(np.int32)  # of stream 0, then of stream 1, …
        self.bounds = np.searchsorted(table[self.places], np.arange(streams + 1))

    def stream(self, position: int) -> int:
        return int(self.table[position % len(self.table)])

    def of(self, position: int, stream: int) -> int:
        rounds, place = divmod(position, len(self.table))
        places = self.places[self.bounds[stream] : self.bounds[stream + 1]]
        return rounds * len(places) + int(places.searchsorted(place))

    def before(self, position: int, stream: int) -> int:
        rounds, place = divmod(position, len(self.table))
        return rounds * int(self.bounds[stream]) + int(np.count_nonzero(self.table[:place] < stream))


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """counts: samples in each shard; batch: global batch B; streams: C, dividing B; window: shuffle window in samples.

    Keeps 8 bytes a shard and 12 more for each of two epochs, and a window of 4-byte integers for each stream it reads.
    """

    counts: Sequence[int]
    batch: int
    seed: int = 0
    streams: int = 0
    window: int = 4096
    shuffle: bool = True
    layout: EvenLayout | TableLayout | None = None
    size: int = field(init=False)  # samples in an epoch, N
    _cache: dict = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self):
        counts = np.asarray(self.counts, dtype=np.int64)
        if not len(counts) or counts.min() < 1:
            raise ValueError("a plan needs at least one shard and no empty ones")
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "size", int(counts.sum()))
        object.__setattr__(self, "streams", self.streams or default_streams(self.batch))
        object.__setattr__(self, "layout", self.layout or EvenLayout(self.batch, self.streams))

    def epoch(self, position: int) -> int:
        return position // self.size

    def sample(self, position: int) -> tuple[int, int]:
        """(shard, ordinal in the shard) at a global position ≥ 0."""
        epoch, stream = position // self.size, self.layout.stream(position)
        start, length, skipped = self._kept("range", stream, epoch, self._range, epoch, stream)
        offset = self.layout.of(position, stream) - skipped
        if self.shuffle:
            window, place = divmod(offset, self.window)
            order = self._kept("order", stream, (epoch, window), self._order, epoch, stream, window, length)
            offset = window * self.window + int(order[place])
        shards, ends = self._kept("shards", epoch % 2, epoch, self._shards, epoch)
        index = start + offset
        place = int(ends.searchsorted(index, side="right"))
        before = int(ends[place - 1]) if place else 0
        return int(shards[place]), index - before

    def _range(self, epoch: int, stream: int) -> tuple[int, int, int]:
        """Start and length of a stream's range of an epoch, and how many positions the stream had in earlier epochs."""
        layout, first, last = self.layout, epoch * self.size, (epoch + 1) * self.size
        skipped = layout.of(first, stream)
        return layout.before(last, stream) - layout.before(first, stream), layout.of(last, stream) - skipped, skipped

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Permuted shards of an epoch and the running count of samples at the end of each."""
        order = np.arange(len(self.counts), dtype=np.int32)
        if self.shuffle:
            order = np.random.default_rng((self.seed, 1, epoch)).permutation(order)
        return order, np.cumsum(self.counts[order])

    def _order(self, epoch: int, stream: int, window: int, length: int) -> np.ndarray:
        length = min(self.window, length - window * self.window)
        return np.random.default_rng((self.seed, 2, epoch, stream, window)).permutation(np.arange(length, dtype=np.int32))

    def _kept(self, kind: str, place: int, key, make: Callable, *args):
        """make(*args), the latest kept in each place: a stream is read in order, so one window of each is enough."""
        kept = self._cache.get((kind, place))
        if kept is None or kept[0] != key:
            kept = self._cache[kind, place] = (key, make(*args))
        return kept[1]


@dataclass(frozen=True, eq=False)
class MixtureOrder:
    """Weighted components over one sequence of positions. Closed form, like the plan; its state is the same one integer.

    counts: per component, its samples in each shard, none empty; weights: any scale; a component of weight 0 is never
    drawn and may have no shards. A table of `quotas` slots for each component repeats for ever; every batch in it holds
    its share of each component, rounded up or down. A weight is met to within one slot of the table.
    """

    counts: Sequence[Sequence[int]]
    weights: Sequence[float]
    batch: int
    seed: int = 0
    streams: int = 0
    window: int = 4096
    size: int = field(init=False)  # nominal epoch: the samples of all components
    quotas: np.ndarray = field(init=False)

    def __post_init__(self):
        weights = np.asarray(self.weights, dtype=float)
        if len(weights) != len(self.counts) or not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
            raise ValueError(f"a mixture of {len(self.counts)} components needs as many weights ≥ 0, not all 0")
        weights = weights / weights.sum()
        # 16 slots for the smallest weight, if that takes no more than a million in all: it is then met to 1/16.
        slots = max(4096, ceil(min(16 / weights[weights > 0].min(), 2**20)))
        object.__setattr__(self, "streams", self.streams or default_streams(self.batch))
        object.__setattr__(self, "quotas", apportion(weights, ceil(slots / self.batch) * self.batch))
        object.__setattr__(self, "size", sum(plan.size for plan in self._components if plan))

    def epoch(self, position: int) -> int:
        return position // self.size

    def sample(self, position: int) -> tuple[int, int, int]:
        """(component, shard, ordinal in the shard) at a global position ≥ 0."""
        table, turns = self._tables
        block, slot = divmod(position, len(table))
        component = int(table[slot])
        return component, *self._components[component].sample(block * int(self.quotas[component]) + int(turns[slot]))

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Component of each slot, and how many slots before it are of the same component."""
        table = deal(self.quotas, self.batch, np.random.default_rng((self.seed, 3)))
        turns = np.empty_like(table)
        turns[np.argsort(table, kind="stable")] = np.concatenate([np.arange(quota) for quota in self.quotas])
        return table, turns

    @cached_property
    def _components(self) -> list[SampleOrder | None]:
        slots, (table, _) = EvenLayout(self.batch, self.streams), self._tables
        density = [np.mean(counts) if len(counts) else 0 for counts in self.counts]
        plans = []
        for i, (counts, quota) in enumerate(zip(self.counts, self.quotas.tolist(), strict=True)):
            pattern = TableLayout(slots.stream(np.flatnonzero(table == i)), self.streams)
            # Where a component lies thinly, as a rare class does, a window of as many samples would span more shards.
            window = max(1, round(self.window * density[i] / max(density)))
            seed = sample_seed(self.seed, i)
            plans.append(SampleOrder(counts, quota, seed, self.streams, window, layout=pattern) if quota else None)
        return plans


def apportion(weights: np.ndarray, slots: int) -> np.ndarray:
    """EvenLayout for each component, by largest remainder; a positive weight gets one at least. weights sum to 1."""
    exact = weights * slots
    quota = np.maximum(np.floor(exact), exact > 0).astype(np.int64)
    while quota.sum() > slots:
        quota[quota.argmax()] -= 1
    quota[np.argsort(quota - exact, kind="stable")[: slots - quota.sum()]] += 1
    return quota


def deal(quota: np.ndarray, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Component of each slot: dealt like cards to batches, so each holds its share of each, rounded up or down.

    Hands are sorted by multiples of the golden section: a component of few slots is spread evenly over the batches.
    """
    batches = int(quota.sum()) // batch
    hands = np.repeat(np.arange(len(quota), dtype=np.int32), quota).reshape(batch, batches).T
    spread = np.argsort(np.arange(batches) * 0.6180339887498949 % 1)
    return rng.permuted(hands[spread], axis=1).ravel()


def class_weights(counts: Sequence[int], balance: float) -> list[float]:
    """Weights ∝ count^(1 - balance): 0 keeps the classes as they come, 1 draws all equally often; none for no samples."""
    if not 0 <= balance <= 1:
        raise ValueError(f"balance is {balance}; choose it between 0, classes as they come, and 1, all equally often")
    powers = [n ** (1 - balance) if n else 0.0 for n in counts]
    total = sum(powers) or 1
    return [power / total for power in powers]


def sample_seed(seed: int, position: int) -> int:
    """63-bit seed of everything random about one position: the same after a resume and on any rank (splitmix64)."""
    x = (seed * 0x9E3779B97F4A7C15 + position + 1) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) >> 1
