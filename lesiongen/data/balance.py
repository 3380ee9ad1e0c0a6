"""Build the sample order of a training stream: every image once per epoch, or classes and sets in given proportions.

The order that `order_for` returns maps a position of the endless training sequence to (shard, ordinal in the shard). To build
it, only the number of images of each label in each shard is needed. So streams of images (lesiongen/data/stream.py) and of
codes (lesiongen/stages/prior.py) use the same function.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hpc.data.order import MixtureOrder, SampleOrder, class_weights
from hpc.errors import UserError


@dataclass(frozen=True)
class StreamConfig:
    """How often a training stream draws each image. With the defaults, every image is drawn once per epoch."""

    # From 0 to 1. A class of n images is drawn in proportion to n^(1 - balance): 0 = classes are as frequent as in the data,
    # 1 = all classes are equally frequent.
    balance: float = 0.0
    weights: tuple[float, ...] = ()  # relative frequency of each set, in the order of inputs.shards; empty = by the sets' sizes
    # Number of streams that the global batch is divided into; must divide the batch. A rank reads only the shards of its own
    # streams. 0 = the greatest common divisor of the batch and 64. With more than 64 ranks, set it to the number of ranks.
    streams: int = 0

    def __post_init__(self):
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance={self.balance} must be from 0 to 1")
        if self.weights and min(self.weights) <= 0:
            raise ValueError("every number in weights must be above 0; to leave a set out, remove it from inputs.shards")
        if self.streams < 0:
            raise ValueError("streams must be a number of streams, or 0 for the default")


@dataclass(frozen=True)
class BalancedOrder:
    """Sample order of a mixture of components. A component is all images of one label, or of all labels, in some shards.

    Within a component, every image comes once before any image comes twice. The class has the attribute and methods of
    SampleOrder that data streams use: size, epoch() and sample().

    Attributes:
        mixture: Decides which component, and which of its images, comes at a position.
        shards: For each component, the shards that hold its images.
        labels: For each component, its label: -1 for unlabelled images, None for images of every label.
        find_member: (shard, label, j) → ordinal in the shard of the j-th image with this label.
    """

    mixture: MixtureOrder
    shards: tuple[tuple[int, ...], ...]
    labels: tuple[int | None, ...]
    find_member: Callable[[int, int, int], int]

    @property
    def size(self) -> int:
        """Samples in an epoch: the number of images."""
        return self.mixture.size

    def epoch(self, position: int) -> int:
        """Returns the epoch of a global position."""
        return self.mixture.epoch(position)

    def sample(self, position: int) -> tuple[int, int]:
        """Returns (shard, ordinal in the shard) at a global position ≥ 0."""
        component, shard_index, member = self.mixture.sample(position)
        shard, label = self.shards[component][shard_index], self.labels[component]
        return shard, member if label is None else self.find_member(shard, label, member)


@dataclass(frozen=True)
class _Component:
    """Images of one label (None: of every label) in some shards. `counts` is their number in each of these shards."""

    weight: float
    label: int | None
    shards: tuple[int, ...]
    counts: tuple[int, ...]


def order_for(
    label_counts: list[dict[int, int]],
    sets: list[int],
    batch: int,
    seed: int,
    stream: StreamConfig,
    find_member: Callable[[int, int, int], int],
) -> SampleOrder | BalancedOrder:
    """Builds the sample order of a training stream.

    Args:
        label_counts: For each shard, the number of images of each label; label -1 stands for unlabelled images.
        sets: For each shard, the index of its set among the packed sets.
        batch: Global batch size.
        seed: Seed of the order.
        stream: Balance of the classes, weights of the sets, number of streams.
        find_member: (shard, label, j) → ordinal in the shard of the j-th image with this label.

    Raises:
        UserError: The batch does not divide among the streams, or the weights do not fit the sets.
    """
    if stream.streams and batch % stream.streams:
        raise UserError(f"stream.streams={stream.streams} does not divide the batch of {batch}.")
    if not stream.balance and not stream.weights:
        return SampleOrder(tuple(sum(counts.values()) for counts in label_counts), batch, seed, stream.streams)
    held = [0] * (max(sets) + 1)
    for index, by_label in zip(sets, label_counts, strict=True):
        held[index] += sum(by_label.values())
    if stream.weights and (len(stream.weights) != len(held) or not all(held)):
        raise UserError(
            f"stream.weights has {len(stream.weights)} numbers for sets of {', '.join(map(str, held))} training images; give "
            "one number for each set in inputs.shards, and only sets that have training images."
        )
    components: list[_Component] = []
    if stream.weights:
        for index, weight in enumerate(stream.weights):
            shards = [shard for shard, set_index in enumerate(sets) if set_index == index]
            components += _components(label_counts, shards, weight / sum(stream.weights), stream.balance)
    else:
        components = _components(label_counts, list(range(len(sets))), 1.0, stream.balance)
    counts, weights = tuple(c.counts for c in components), tuple(c.weight for c in components)
    mixture = MixtureOrder(counts, weights, batch, seed, stream.streams)
    return BalancedOrder(mixture, tuple(c.shards for c in components), tuple(c.label for c in components), find_member)


def _components(label_counts: list[dict[int, int]], shards: list[int], share: float, balance: float) -> list[_Component]:
    """Divides shards into components: one for each label, or a single one if classes are not balanced.

    Args:
        label_counts: For each shard of the stream, the number of images of each label.
        shards: The shards to divide.
        share: Fraction of the stream that is drawn from these shards. The weights of the components sum to this fraction.
        balance: As in StreamConfig. Unlabelled images are drawn as often as they occur in the data.
    """
    if not balance:
        return [_Component(share, None, tuple(shards), tuple(sum(label_counts[shard].values()) for shard in shards))]
    totals = {label: 0 for label in sorted({label for shard in shards for label in label_counts[shard]})}
    for shard in shards:
        for label, count in label_counts[shard].items():
            totals[label] += count
    classes = [label for label in totals if label >= 0]
    unlabelled = totals.get(-1, 0) / sum(totals.values())
    weights = dict(zip(classes, class_weights([totals[label] for label in classes], balance), strict=True))
    components = []
    for label in totals:
        weight = unlabelled if label < 0 else (1 - unlabelled) * weights[label]
        holding = tuple(shard for shard in shards if label_counts[shard].get(label))
        components.append(_Component(share * weight, label, holding, tuple(label_counts[i][label] for i in holding)))
    return components
