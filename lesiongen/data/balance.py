"""Which images a training stream shows how often: each once an epoch, or classes and sets in chosen proportions."""

from collections.abc import Callable
from dataclasses import dataclass

from hpc.data.order import MixtureOrder, SampleOrder, class_weights
from hpc.errors import UserError


@dataclass(frozen=True)
class StreamConfig:
    balance: float = 0.0  # of classes: 0 as they occur, 1 equally often, between: by count^(1 - balance)
    weights: tuple[float, ...] = ()  # of the sets in inputs.shards, in their order; empty = by their sizes
    streams: int = 0  # what a batch is divided into, so that a rank reads few shards; 0 = gcd(batch, 64); else as many as ranks

    def __post_init__(self):
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance lies in 0 to 1, not {self.balance}")
        if self.weights and min(self.weights) <= 0:
            raise ValueError("weights are above 0; leave a set that is not wanted out of inputs.shards")
        if self.streams < 0:
            raise ValueError("streams is a number of streams, or 0 for the default")


@dataclass(frozen=True)
class BalancedOrder:
    """A mixture whose components are the members of one label in one set (label None: of every label).

    find(shard, label, j) → ordinal of the j-th member of a label in a shard"""

    mixture: MixtureOrder
    shards: tuple[tuple[int, ...], ...]
    labels: tuple[int | None, ...]
    find: Callable[[int, int, int], int]

    @property
    def size(self) -> int:
        return self.mixture.size

    def epoch(self, position: int) -> int:
        return self.mixture.epoch(position)

    def sample(self, position: int) -> tuple[int, int]:
        component, place, member = self.mixture.sample(position)
        shard, label = self.shards[component][place], self.labels[component]
        return shard, member if label is None else self.find(shard, label, member)


def order_for(
    label_counts: list[dict[int, int]], sets: list[int], batch: int, seed: int, stream: StreamConfig, find: Callable
) -> SampleOrder | BalancedOrder:
    """The plan of a training stream. label_counts: label → count of each shard, -1 for unlabelled; sets: the set of each shard.

    Unlabelled images keep their natural share. Raises UserError where weights do not fit the sets."""
    if stream.streams and batch % stream.streams:
        raise UserError(f"stream.streams={stream.streams} does not divide the batch of {batch}.")
    if not stream.balance and not stream.weights:
        return SampleOrder(tuple(sum(tally.values()) for tally in label_counts), batch, seed, stream.streams)
    number = max(sets) + 1
    if stream.weights and len(stream.weights) != number:
        raise UserError(f"stream.weights has {len(stream.weights)} numbers for {number} sets; give one for each.")
    parts: list[tuple[float, int | None, list[int]]] = []  # weight, label, shards
    for one in range(number) if stream.weights else [None]:
        own = [i for i in range(len(sets)) if one is None or sets[i] == one]
        share = 1.0 if one is None else stream.weights[one] / sum(stream.weights)
        if not stream.balance:
            parts.append((share, None, own))
            continue
        labels = sorted({label for i in own for label in label_counts[i]})
        count = {label: sum(label_counts[i].get(label, 0) for i in own) for label in labels}
        known = [label for label in labels if label >= 0]
        unlabelled = count.get(-1, 0) / sum(count.values())
        weights = dict(zip(known, class_weights([count[label] for label in known], stream.balance), strict=True))
        for label in labels:
            weight = unlabelled if label < 0 else (1 - unlabelled) * weights[label]
            parts.append((share * weight, label, [i for i in own if label_counts[i].get(label)]))
    counts = [
        tuple(sum(label_counts[i].values()) if label is None else label_counts[i][label] for i in shards)
        for _, label, shards in parts
    ]
    mixture = MixtureOrder(tuple(counts), tuple(weight for weight, _, _ in parts), batch, seed, stream.streams)
    return BalancedOrder(mixture, tuple(tuple(shards) for _, _, shards in parts), tuple(label for _, label, _ in parts), find)
