"""Counts the samples that are copies of training views, and names the training images that they are nearest to.

A sample's closeness, by one kind of distance (see nearest.py), is its distance to the nearest training view divided by its
distance to the nearest of some held-out images. A sample is a copy if its closeness is below that of 99 % of other held-out
images. All are decoded by the tokenizer. So about 1 % of the held-out images count as copies by definition, and a copy rate of
1 % is no evidence of copying.

The distance alone would not do: a typical, blurred sample is near to every image, and would count as a copy of each.

The evaluate stage calls measure(); the gate of the sample stage uses the same thresholds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hpc.dist import Topology
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.data.tables import write_csv
from lesiongen.evaluation.intervals import share
from lesiongen.evaluation.privacy.nearest import Nearest, nearest_views
from lesiongen.evaluation.privacy.views import TrainingViews, joined

PERCENTILE = 0.01  # quantile of the held-out distances that is the threshold
INVISIBLE = 1 / 255  # one grey level: pixels nearer than this are a copy, whatever the held-out distances are


@dataclass(frozen=True)
class Copies:
    """What measure() finds.

    Attributes:
        samples: For each kind of distance, the nearest training view of each sample.
        held_out: The same for the held-out images.
        thresholds: For each kind, the closeness below which an image is a copy.
        views: Number of training views that were compared.
        draws: Number of views of each training image.
    """

    samples: dict[str, Nearest]
    held_out: dict[str, Nearest]
    thresholds: dict[str, float]
    views: int
    draws: int

    def metrics(self) -> dict:
        """Returns the part "privacy.copies" of metrics.json: for each kind and for "any" the rates with their intervals."""
        samples, held_out = (below(found, self.thresholds) for found in (self.samples, self.held_out))
        kinds = {}
        for kind, threshold in self.thresholds.items():
            distance, other = self.samples[kind].closeness, self.held_out[kind].closeness
            kinds[kind] = {
                "threshold": threshold,
                "rate": rate(samples[kind]),
                "copies": int(samples[kind].sum()),
                "number": len(distance),
                "held_out_rate": rate(held_out[kind]),
                "median": float(np.median(distance)),
                "least": float(distance.min()),
                "held_out_median": float(np.median(other)),
                "held_out_least": float(other.min()),
            }
        of_samples, of_held_out = (np.any(list(found.values()), 0) for found in (samples, held_out))
        total = {"copies": int(of_samples.sum()), "number": len(of_samples)}
        total |= {"rate": rate(of_samples), "held_out_rate": rate(of_held_out)}
        return {"views": self.views, "draws": self.draws, "held_out": len(of_held_out), "kinds": kinds, "any": total}


def measure(
    views: TrainingViews,
    sample_images: Iterable[torch.Tensor],
    sample_codes: dict[str, np.ndarray],
    seed: int,
    topology: Topology | None = None,
) -> Copies:
    """Compares samples with all training views, and held-out images for the thresholds.

    Args:
        views: The training views, from training_views().
        sample_images: The samples, batch by batch, uint8 [B, C, H, W].
        sample_codes: For each level, the samples' codes [N, h, w], as Candidates reads them.
        seed: Seed that draws the held-out images.
        topology: None: this process does all the work. Otherwise the ranks share it, and the function is collective.
    """
    held_out, unseen = views.held_out(seed)[0], views.unseen(seed)
    described = views.describe(sample_images, sample_codes)
    sides = slice(len(described)), slice(len(described), None)
    found = nearest_views(views, joined([described, held_out]), topology, unseen)
    samples, others = ({kind: nearest.select(side) for kind, nearest in found.items()} for side in sides)
    return Copies(samples, others, thresholds(others), len(views), views.draws)


def thresholds(held_out: dict[str, Nearest]) -> dict[str, float]:
    """Returns for each kind the closeness below which an image is a copy: the 1st percentile of the held-out images'."""
    return {kind: float(np.quantile(found.closeness, PERCENTILE)) for kind, found in held_out.items()}


def below(found: dict[str, Nearest], limits: dict[str, float]) -> dict[str, np.ndarray]:
    """Returns for each kind which images are copies, bool [N]."""
    return {kind: is_copy(kind, found[kind].closeness, found[kind].distance, limit) for kind, limit in limits.items()}


def is_copy(kind: str, closeness_N: np.ndarray, distance_N: np.ndarray, limit: float) -> np.ndarray:
    """Returns which images are copies by one kind of distance, bool [N].

    Args:
        kind: The kind.
        closeness_N: Closeness of each image.
        distance_N: Distance of each image to its nearest training view.
        limit: The threshold of the kind.
    """
    return (closeness_N < limit) | (distance_N < INVISIBLE) if kind == "pixels" else closeness_N < limit


def rate(copies_N: np.ndarray) -> dict[str, float | None]:
    """Returns the share of copies with its 95 % interval."""
    return share(int(np.sum(copies_N)), len(copies_N))


def image_ids(packed: Packed, rows_N3: np.ndarray) -> list[str]:
    """Returns the image ids of training views, from the catalogs. They are private: they name training images.

    Args:
        packed: The shards that the codes were made from.
        rows_N3: (draw, shard, ordinal) of each view in the code store's training split.
    """
    split = ImageShards(packed, "train")
    wanted = {(int(shard), int(ordinal)) for _, shard, ordinal in rows_N3}
    places = {(split.sets[shard], split.entries[shard]["name"], ordinal): (shard, ordinal) for shard, ordinal in wanted}
    ids = {}
    for number, row in packed.numbered_catalog():
        if row["split"] == "train" and (place := places.get((number, row["shard"], int(row["ordinal"])))):
            ids[place] = row["image_id"]
    return [ids[int(shard), int(ordinal)] for _, shard, ordinal in rows_N3]


def neighbour_columns(found: dict[str, Nearest], packed: Packed) -> dict[str, list]:
    """Returns private columns of a table of samples: of each kind distance and closeness, and the view's image id and draw.

    Args:
        found: For each kind, the nearest view of each sample.
        packed: The shards that the codes were made from.
    """
    number = len(next(iter(found.values())).distance)
    ids = image_ids(packed, np.concatenate([nearest.row for nearest in found.values()]))
    columns = {}
    for i, (kind, nearest) in enumerate(found.items()):
        columns[f"distance-{kind}"] = nearest.distance.tolist()
        columns[f"closeness-{kind}"] = nearest.closeness.tolist()
        columns[f"image-{kind}"] = ids[i * number : (i + 1) * number]
        columns[f"draw-{kind}"] = nearest.row[:, 0].tolist()
    return columns


def write_neighbours(path: Path, names: Sequence[str], found: Copies, packed: Packed) -> None:
    """Writes the private table of the samples' nearest training images, such as report/private/neighbours.csv.

    Args:
        path: The file.
        names: Name of each sample, such as its file.
        found: What measure() has found.
        packed: The shards that the codes were made from.
    """
    copied = below(found.samples, found.thresholds)
    columns = {"sample": list(names)} | neighbour_columns(found.samples, packed)
    columns["copy"] = ["; ".join(kind for kind in copied if copied[kind][i]) for i in range(len(names))]
    write_csv(path, columns, zip(*columns.values(), strict=True))
