"""Which sample stands where in the endless training sequence. Pure: no I/O, no ranks, no state but one integer.

The global batch of B slots is divided among C canonical streams, fixed per run; slot j belongs to stream ⌊jC/B⌋. A rank
takes a contiguous share of the slots, so it reads only its streams, whatever the number of ranks. Each epoch the shards
are permuted, the resulting sequence of N samples is cut into C contiguous ranges, and samples are shuffled within
windows of a range: a rank reads few shards, in order. Position p lies in epoch ⌊p/N⌋, and within an epoch position →
sample is a bijection: positions run on across epochs and a batch may straddle two.
"""

from dataclasses import dataclass, field

import numpy as np


def share(batch: int, rank: int, world: int) -> range:
    """Slots of the global batch that a rank takes. Raises ValueError where the batch does not divide."""
    if batch % world:
        raise ValueError(f"the global batch of {batch} does not divide among {world} ranks; make it a multiple of {world}")
    return range(rank * batch // world, (rank + 1) * batch // world)


def split(count: int, rank: int, world: int) -> range:
    """Contiguous share of `count` items; shares differ by at most one item."""
    return range(rank * count // world, (rank + 1) * count // world)


def default_streams(batch: int) -> int:
    """Largest power of two up to 64 that divides the batch: any such number of ranks then reads whole streams."""
    return int(np.gcd(batch, 64))


@dataclass(frozen=True)
class Plan:
    """counts: samples in each shard; batch: global batch B; streams: C, dividing B; window: shuffle window in samples."""

    counts: tuple[int, ...]
    batch: int
    seed: int = 0
    streams: int = 0
    window: int = 4096
    shuffle: bool = True
    size: int = field(init=False)  # samples in an epoch, N
    _cache: dict = field(default_factory=dict, repr=False, compare=False, hash=False)

    def __post_init__(self):
        if not self.counts or min(self.counts) < 1:
            raise ValueError("a plan needs at least one shard and no empty ones")
        object.__setattr__(self, "size", sum(self.counts))
        object.__setattr__(self, "streams", self.streams or default_streams(self.batch))
        if self.batch % self.streams:
            raise ValueError(f"{self.streams} streams do not divide the global batch of {self.batch}")

    def epoch(self, position: int) -> int:
        return position // self.size

    def sample(self, position: int) -> tuple[int, int]:
        """(shard, ordinal in the shard) at a global position ≥ 0."""
        size, batch = self.size, self.batch
        epoch = position // size
        first = epoch * size
        width = batch // self.streams
        stream = (position % batch) // width
        # Positions of this stream, and of all streams before it, are counted in closed form: O(1) at any position.
        start = self._before(first + size, stream) - self._before(first, stream)
        length = self._of(first + size, stream) - self._of(first, stream)
        offset = self._of(position, stream) - self._of(first, stream)
        if self.shuffle:
            window = offset // self.window
            order = self._order(epoch, stream, window, min(self.window, length - window * self.window))
            offset = window * self.window + int(order[offset - window * self.window])
        shards, ends = self._shards(epoch)
        index = start + offset
        place = int(np.searchsorted(ends, index, side="right"))
        before = int(ends[place - 1]) if place else 0
        return int(shards[place]), index - before

    def _of(self, position: int, stream: int) -> int:
        width = self.batch // self.streams
        rounds, slot = divmod(position, self.batch)
        return rounds * width + min(max(slot - stream * width, 0), width)

    def _before(self, position: int, stream: int) -> int:
        width = stream * (self.batch // self.streams)
        rounds, slot = divmod(position, self.batch)
        return rounds * width + min(slot, width)

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Permuted shards of an epoch and the running count of samples at the end of each. The last two are kept."""
        if (key := ("shards", epoch)) not in self._cache:
            counts = np.asarray(self.counts, dtype=np.int64)
            order = np.arange(len(counts))
            if self.shuffle:
                order = np.random.default_rng((self.seed, 1, epoch)).permutation(len(counts))
            self._keep(key, (order, np.cumsum(counts[order])), 2)
        return self._cache[key]

    def _order(self, epoch: int, stream: int, window: int, length: int) -> np.ndarray:
        if (key := ("order", epoch, stream, window)) not in self._cache:
            order = np.random.default_rng((self.seed, 2, epoch, stream, window)).permutation(length)
            self._keep(key, order.astype(np.int32), 2 * self.streams)
        return self._cache[key]

    def _keep(self, key: tuple, value, limit: int) -> None:
        same = [k for k in self._cache if k[0] == key[0]]
        for old in same[: max(0, len(same) - limit + 1)]:
            del self._cache[old]
        self._cache[key] = value


def sample_seed(seed: int, position: int) -> int:
    """63-bit seed of everything random about one position: the same after a resume and on any rank (splitmix64)."""
    x = (seed * 0x9E3779B97F4A7C15 + position + 1) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) >> 1
