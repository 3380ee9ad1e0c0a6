"""The sample order: which sample the training sequence shows at each position.

Invariant: the sample at a position depends only on the position, the seed, and the settings of the order (such as shard sizes
and batch), not on the number of ranks. So a run can resume at any position with any number of ranks. The shard sizes come from
the shards' manifest. The result, (shard, ordinal in the shard), tells the readers of shards and of code stores what to read.

- Position: index in the endless training sequence, from 0.
- Slot: index in the global batch of B samples, position % B. A rank processes a contiguous range of slots.
- Stream: one of C groups of neighbouring slots. Slot j belongs to stream ⌊jC/B⌋. C is fixed for a run.
- Epoch: N consecutive positions, where N is the number of samples. Position p lies in epoch ⌊p/N⌋.

Each epoch permutes the shards, cuts the resulting sequence of N samples into C contiguous ranges, one for each stream, and
shuffles the samples within windows of a range. A rank reads only the samples of its own streams, so it reads few shards, each
nearly in sequence. Within an epoch every sample has exactly one position. A batch may hold the end of one epoch and the
beginning of the next.

A mixture divides the slots among weighted components, such as sets or classes. Each component has its own epochs: every
sample of the component comes once before any of its samples comes twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, gcd
from typing import Any

import numpy as np


def batch_share(batch: int, rank: int, world: int) -> range:
    """Returns the slots of the global batch that a rank processes.

    Args:
        batch: Size of the global batch.
        rank: The rank, from 0.
        world: Number of ranks.

    Raises:
        ValueError: The batch is not a multiple of the number of ranks.
    """
    if batch % world:
        raise ValueError(f"the global batch of {batch} does not divide among {world} ranks; make it a multiple of {world}")
    return range(rank * batch // world, (rank + 1) * batch // world)


def contiguous_share(count: int, rank: int, world: int) -> range:
    """Returns the rank's contiguous share of `count` items. The shares of two ranks differ by at most one item."""
    return range(rank * count // world, (rank + 1) * count // world)


def default_streams(batch: int) -> int:
    """Returns the largest power of two up to 64 that divides the batch.

    If the number of ranks divides this number, each stream is read by one rank only.
    """
    return gcd(batch, 64)


@dataclass(frozen=True)
class EvenLayout:
    """Assigns equally many neighbouring slots to each stream. This is the layout of a SampleOrder outside a mixture.

    Attributes:
        batch: Size of the global batch, B.
        streams: Number of streams, C. Must divide the batch.
    """

    batch: int
    streams: int

    def __post_init__(self):
        if self.batch % self.streams:
            raise ValueError(
                f"{self.streams} streams do not divide the global batch of {self.batch}; choose a divisor of the batch"
            )

    def stream(self, position: int | np.ndarray) -> int | np.ndarray:
        """Returns the stream of a position, or of each position of an array."""
        return position % self.batch // (self.batch // self.streams)

    def positions_before(self, position: int, stream: int) -> int:
        """Returns how many positions of `stream` come before `position`."""
        width = self.batch // self.streams
        batches, slot = divmod(position, self.batch)
        return batches * width + min(max(slot - stream * width, 0), width)

    def positions_of_earlier_streams(self, position: int, stream: int) -> int:
        """Returns how many positions of the streams 0 to `stream` - 1 come before `position`."""
        width = stream * (self.batch // self.streams)
        batches, slot = divmod(position, self.batch)
        return batches * width + min(slot, width)


class TableLayout:
    """Assigns positions to streams by a repeated table. This is the layout of one component of a mixture.

    Has the methods of EvenLayout. Here, positions count only the samples of the component.
    """

    def __init__(self, table: np.ndarray, streams: int):
        """Sorts the table by stream.

        Args:
            table: The stream of each position, [P]; position p has the stream table[p % P].
            streams: Number of streams.
        """
        self.table = table.astype(np.int32)
        self.indices_by_stream = np.argsort(table, kind="stable").astype(np.int32)  # indices of stream 0, then of stream 1, …
        self.bounds = np.searchsorted(table[self.indices_by_stream], np.arange(streams + 1))

    def stream(self, position: int) -> int:
        """Returns the stream of a position."""
        return int(self.table[position % len(self.table)])

    def positions_before(self, position: int, stream: int) -> int:
        """Returns how many positions of `stream` come before `position`."""
        repeats, index = divmod(position, len(self.table))
        indices = self.indices_by_stream[self.bounds[stream] : self.bounds[stream + 1]]
        return repeats * len(indices) + int(indices.searchsorted(index))

    def positions_of_earlier_streams(self, position: int, stream: int) -> int:
        """Returns how many positions of the streams 0 to `stream` - 1 come before `position`."""
        repeats, index = divmod(position, len(self.table))
        return repeats * int(self.bounds[stream]) + int(np.count_nonzero(self.table[:index] < stream))


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """Maps each position to a sample; in every epoch each sample comes exactly once.

    Memory: 8 bytes for each shard, 12 more for each shard in each of two epochs, and one shuffle window of 4-byte integers for
    each stream that is read.

    Attributes:
        counts: Number of samples in each shard, all above 0.
        batch: Size of the global batch, B.
        seed: Seed of the permutations.
        streams: Number of streams, C, a divisor of the batch. 0 means default_streams(batch).
        window: Size of the shuffle window in samples.
        shuffle: Whether to shuffle. If not, every epoch has the order of the shards.
        layout: The stream of each position. None means EvenLayout(batch, streams).
        size: Number of samples in an epoch, N.
    """

    counts: Sequence[int]
    batch: int
    seed: int = 0
    streams: int = 0
    window: int = 4096
    shuffle: bool = True
    layout: EvenLayout | TableLayout | None = None
    size: int = field(init=False)
    _cache: dict = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self):
        counts = np.asarray(self.counts, dtype=np.int64)
        if not len(counts) or counts.min() < 1:
            raise ValueError("the sample order needs at least one shard, and no empty shards")
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "size", int(counts.sum()))
        object.__setattr__(self, "streams", self.streams or default_streams(self.batch))
        object.__setattr__(self, "layout", self.layout or EvenLayout(self.batch, self.streams))

    def epoch(self, position: int) -> int:
        """Returns the epoch of a position, from 0."""
        return position // self.size

    def sample(self, position: int) -> tuple[int, int]:
        """Returns (shard, ordinal in the shard) of the sample at a position ≥ 0."""
        # Index of the position within its stream's range of this epoch.
        epoch, stream = position // self.size, self.layout.stream(position)
        start, length, skipped = self._cached("range", stream, epoch, self._stream_range, epoch, stream)
        offset = self.layout.positions_before(position, stream) - skipped
        # Shuffle within the window.
        if self.shuffle:
            window, index = divmod(offset, self.window)
            key = (epoch, window)
            permutation = self._cached("window", stream, key, self._permuted_window, epoch, stream, window, length)
            offset = window * self.window + int(permutation[index])
        # Find the shard that holds this index of the epoch's sequence.
        shards, ends = self._cached("shards", epoch % 2, epoch, self._permuted_shards, epoch)
        index = start + offset
        shard_index = int(ends.searchsorted(index, side="right"))
        shard_start = int(ends[shard_index - 1]) if shard_index else 0
        return int(shards[shard_index]), index - shard_start

    def _stream_range(self, epoch: int, stream: int) -> tuple[int, int, int]:
        """Returns start and length of a stream's range of an epoch, and the stream's number of positions in earlier epochs."""
        layout, first, last = self.layout, epoch * self.size, (epoch + 1) * self.size
        skipped = layout.positions_before(first, stream)
        start = layout.positions_of_earlier_streams(last, stream) - layout.positions_of_earlier_streams(first, stream)
        return start, layout.positions_before(last, stream) - skipped, skipped

    def _permuted_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the shards in the epoch's order, and the running number of samples at the end of each."""
        shards = np.arange(len(self.counts), dtype=np.int32)
        if self.shuffle:
            shards = np.random.default_rng((self.seed, 1, epoch)).permutation(shards)
        return shards, np.cumsum(self.counts[shards])

    def _permuted_window(self, epoch: int, stream: int, window: int, length: int) -> np.ndarray:
        """Returns the permutation of a window. The last window of a range of `length` samples may be shorter."""
        length = min(self.window, length - window * self.window)
        return np.random.default_rng((self.seed, 2, epoch, stream, window)).permutation(np.arange(length, dtype=np.int32))

    def _cached(self, kind: str, index: int, key: Any, make: Callable, *args: Any) -> Any:
        """Returns make(*args). Caches the latest result for each (kind, index).

        Each stream is read in sequence, so one window and one range for each stream are enough.
        """
        cached = self._cache.get((kind, index))
        if cached is None or cached[0] != key:
            cached = self._cache[kind, index] = (key, make(*args))
        return cached[1]


@dataclass(frozen=True, eq=False)
class MixtureOrder:
    """Maps each position to a sample of one of several weighted components, such as sets or classes.

    A table names the component of each slot in a block of batches; the training sequence repeats this table. Component i has
    quotas[i] slots of the table, in proportion to its weight. Every batch holds each component's share of the batch, rounded up
    or down. Each component has its own SampleOrder. Like SampleOrder, the mixture has no state except the position.

    Attributes:
        counts: For each component, the number of samples in each of its shards, all above 0. A component of weight 0 may
            have no shards.
        weights: Weight of each component, ≥ 0, on any scale. A component of weight 0 is never drawn.
        batch: Size of the global batch.
        seed: Seed of the table and of the components' orders.
        streams: Number of streams, a divisor of the batch. 0 means default_streams(batch).
        window: Size of the shuffle window in samples, for the component with the most samples per shard.
        size: Length of a nominal epoch: the number of samples of all components with a weight above 0.
        quotas: Number of slots of the table for each component.
    """

    counts: Sequence[Sequence[int]]
    weights: Sequence[float]
    batch: int
    seed: int = 0
    streams: int = 0
    window: int = 4096
    size: int = field(init=False)
    quotas: np.ndarray = field(init=False)

    def __post_init__(self):
        weights = np.asarray(self.weights, dtype=float)
        if len(weights) != len(self.counts) or not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
            raise ValueError(
                f"a mixture of {len(self.counts)} components needs as many finite weights ≥ 0, at least one of them above 0; "
                f"the weights are {list(self.weights)}"
            )
        weights = weights / weights.sum()
        # With 16 slots for the smallest weight, rounding to whole slots changes that weight by at most 1/16. The table has at
        # most about a million slots, so the rounding of even smaller weights is coarser.
        slots = max(4096, ceil(min(16 / weights[weights > 0].min(), 2**20)))
        object.__setattr__(self, "streams", self.streams or default_streams(self.batch))
        object.__setattr__(self, "quotas", apportion(weights, ceil(slots / self.batch) * self.batch))
        object.__setattr__(self, "size", sum(order.size for order in self._components if order))

    def epoch(self, position: int) -> int:
        """Returns the nominal epoch of a position, from 0."""
        return position // self.size

    def sample(self, position: int) -> tuple[int, int, int]:
        """Returns (component, shard of the component, ordinal in the shard) of the sample at a position ≥ 0."""
        table, occurrences = self._tables
        repeats, slot = divmod(position, len(table))
        component = int(table[slot])
        component_position = repeats * int(self.quotas[component]) + int(occurrences[slot])
        return component, *self._components[component].sample(component_position)

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """The component of each slot, and how many earlier slots of the table have the same component."""
        table = assign_slots(self.quotas, self.batch, np.random.default_rng((self.seed, 3)))
        occurrences = np.empty_like(table)
        occurrences[np.argsort(table, kind="stable")] = np.concatenate([np.arange(quota) for quota in self.quotas])
        return table, occurrences

    @cached_property
    def _components(self) -> list[SampleOrder | None]:
        """The order of each component; None for a component of weight 0."""
        even, (table, _) = EvenLayout(self.batch, self.streams), self._tables
        density = [np.mean(counts) if len(counts) else 0 for counts in self.counts]  # samples per shard
        orders = []
        for i, (counts, quota) in enumerate(zip(self.counts, self.quotas.tolist(), strict=True)):
            layout = TableLayout(even.stream(np.flatnonzero(table == i)), self.streams)
            # A rare class has few samples in each shard. Shrink its window in proportion, so that it spans no more shards.
            window = max(1, round(self.window * density[i] / max(density)))
            seed = sample_seed(self.seed, i)
            orders.append(SampleOrder(counts, quota, seed, self.streams, window, layout=layout) if quota else None)
        return orders


def apportion(weights: np.ndarray, slots: int) -> np.ndarray:
    """Divides slots among components in proportion to the weights, by the method of largest remainders.

    Args:
        weights: Weight of each component; they sum to 1.
        slots: Number of slots to divide.

    Returns:
        Number of slots of each component, int64. They sum to `slots`. A component of weight above 0 has at least one slot.
    """
    exact = weights * slots
    quotas = np.maximum(np.floor(exact), exact > 0).astype(np.int64)
    while quotas.sum() > slots:
        quotas[quotas.argmax()] -= 1
    quotas[np.argsort(quotas - exact, kind="stable")[: slots - quotas.sum()]] += 1
    return quotas


def assign_slots(quotas: np.ndarray, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Assigns a component to each slot of a block of batches.

    Args:
        quotas: Number of slots of each component; their sum is a multiple of the batch.
        batch: Size of the global batch.
        rng: Shuffles the slots within each batch.

    Returns:
        The component of each slot, [sum of quotas]. Every batch holds each component's share, rounded up or down.
    """
    batches = int(quotas.sum()) // batch
    # List the components in order, component i quotas[i] times. Row b takes every `batches`-th entry of this list, from entry
    # b on, and so gets an even share of each component.
    rows = np.repeat(np.arange(len(quotas), dtype=np.int32), quotas).reshape(batch, batches).T
    # If a quota is not a multiple of `batches`, some rows hold one slot more of the component, and these rows are neighbours.
    # Spread them over the block: sort the rows by the multiples of the golden ratio modulo 1, which are evenly spread.
    spread = np.argsort(np.arange(batches) * 0.6180339887498949 % 1)
    return rng.permuted(rows[spread], axis=1).ravel()


def class_weights(counts: Sequence[int], balance: float) -> list[float]:
    """Returns a weight for each class, proportional to count^(1 - balance), and 0 for a class without samples.

    Args:
        counts: Number of samples of each class.
        balance: 0 draws each class as often as it occurs, 1 draws all classes equally often.

    Returns:
        The weights. They sum to 1, or are all 0 if no class has samples.

    Raises:
        ValueError: balance is not between 0 and 1.
    """
    if not 0 <= balance <= 1:
        raise ValueError(f"balance is {balance}; choose a number from 0 (classes as they occur) to 1 (all equally often)")
    powers = [n ** (1 - balance) if n else 0.0 for n in counts]
    total = sum(powers) or 1
    return [power / total for power in powers]


def sample_seed(seed: int, position: int) -> int:
    """Returns a 63-bit seed for all random numbers at one position (the mixing function of splitmix64).

    The seed is the same on every rank and after a resume.

    Args:
        seed: Seed of the run.
        position: Position in the training sequence, or another index for which the caller needs random numbers.
    """
    x = (seed * 0x9E3779B97F4A7C15 + position + 1) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) >> 1
