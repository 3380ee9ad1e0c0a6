"""prior: code store → a trained prior for each level.

The prior of a level is p(codes of the level | facts, codes of the coarser levels). The stage exports the weights that had the
fewest bits per token on the validation split. The sample stage reads the export.

A row of the code store, the codes and facts of one image, is addressed by (draw, shard, ordinal); [N, 3] for several rows.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hpc import dist, watchdog
from hpc.config import read_yaml, to_plain
from hpc.data.codestore import CodeStore
from hpc.data.order import contiguous_share
from hpc.data.rows import CodeRows
from hpc.data.shards import training_batches
from hpc.dist import Topology
from hpc.train.engine import Engine
from hpc.train.loop import train
from hpc.train.warm_start import warm_start
from hpc.train.zero import Weights
from lesiongen.data import facts
from lesiongen.data.balance import order_for
from lesiongen.evaluation import plots
from lesiongen.evaluation.card import card
from lesiongen.evaluation.codes import bigram_bits
from lesiongen.experiment import Experiment, PriorConfig
from lesiongen.ingest.licences import merge_counts
from lesiongen.priors import make
from lesiongen.priors.objective import Objective, model_shape, training_flops_per_sample
from lesiongen.stages.base import Stage, beginning, check_codes, initial_export, require, size_of, training
from lesiongen.stages.prior_picture import PriorPicture
from lesiongen.tokenizers.export import export_digest, write_export


def stage(config: Experiment, level: str) -> Stage:
    """Returns the stage that trains the prior of a level."""
    prior_config = config.prior(level)
    identity = {"prior": to_plain(prior_config, volatile=False), "level": level, "seed": config.seed} | beginning(config)

    def run_level(config: Experiment, topology: Topology, folder: Path) -> str:
        return run(config, topology, folder, level)

    def check(config: Experiment) -> None:
        initial_export(config, f"prior-{level}")

    how = training("prior.train", prior_config.train) | {"check": check, "describe": partial(_describe, level=level)}
    return Stage(f"prior-{level}", ("codes",), identity, run_level, **how)


def _describe(config: Experiment, level: str) -> str:
    """Returns kind, layers, width and size of a level's prior, such as "gpt 4×192 · 2.0 M"."""
    prior = config.prior(level)
    shape = model_shape(CodeStore(require(config, "codes")), level, prior.facts)
    return f"{prior.model.kind} {prior.model.layers}×{prior.model.width} · {size_of(lambda: make(prior.model, **shape))}"


def run(config: Experiment, topology: Topology, folder: Path, level: str) -> str:
    """Trains the prior of a level and returns the digest of the export. Collective."""
    prior_config = config.prior(level)
    task = PriorTask(config, prior_config, level, folder, topology)
    train(task, prior_config.train, folder, topology, config.seed, f"prior-{level}", ledger=config.data.ledger)
    return export_digest(folder / "export")


class PriorTask:
    """Model, data, evaluation and export of one level's prior, for the training loop; see hpc.train.task.Task.

    Attributes:
        shape: Arguments of the prior that follow from the code store, as model_shape() returns them.
        upper: Names of the coarser levels, coarse to fine.
        worst: A value of the metric that even an untrained prior does not exceed.
        tokens_per_sample: Codes per image on this level, for the loop's speed metrics.
    """

    metric = "bits_per_token"

    def __init__(self, config: Experiment, prior_config: PriorConfig, level: str, folder: Path, topology: Topology):
        """Opens the code store and loads codes onto the device, if they fit. Collective.

        Args:
            config: The run's config.
            prior_config: The config of this level's prior.
            level: Name of the level.
            folder: The stage's directory; the export is written below it.
            topology: This process among the ranks.

        Raises:
            UserError: The codes were made by another tokenizer or from other shards than the run's, or the store lacks the
                level or a fact.
        """
        self.config, self.prior_config, self.level, self.folder = config, prior_config, level, folder
        self.device = topology.device
        self.store = CodeStore(require(config, "codes"))
        dist.run_on_leader(check_codes, config, self.store)
        self.shape = model_shape(self.store, level, prior_config.facts)
        self.shards = self.store.shards("train")
        self.upper = [entry["name"] for entry in self.store.levels][: len(self.shape["upper"])]
        columns = [*prior_config.facts, *(f"codes.{name}" for name in (level, *self.upper))]
        resident = None if prior_config.resident == "auto" else False
        self.data = {split: CodeRows(self.store, split, columns, self.device, resident) for split in ("train", "val")}
        self.size = self.data["train"].size
        self.worst = 2 * math.log2(self.shape["entries"])  # twice the bits of a uniform guess
        self.tokens_per_sample = math.prod(self.shape["grid"])
        self.bigram: float | None = None
        self.members: dict[tuple[int, int], np.ndarray] = {}
        self.picture = PriorPicture(config, self.store, level, self.device)

    @cached_property
    def flops_per_sample(self) -> int:
        """Floating-point operations of training on one sample, for the loop's speed metrics."""
        return training_flops_per_sample(self.prior_config.model, self.shape)

    def build(self) -> nn.Module:
        """Builds the prior and its loss, with random weights."""
        return Objective(make(self.prior_config.model, **self.shape))

    def prepare(self, module: nn.Module) -> None:
        """Copies the weights of inputs.init_from. Those of a fact's values are found by the names of the values."""
        export = initial_export(self.config, f"prior-{self.level}")
        if export is None:
            if self.config.inputs.init_from:
                dist.run_on_leader(print, f"prior-{self.level} begins with random weights: inputs.init_from has no such prior")
            return
        about, rows = read_yaml(export / "config.yaml"), {}
        for name, values in facts.vocabularies(self.store, self.prior_config.facts).items():
            theirs = about["facts"].get(name, [])
            known = [theirs.index(value) if value in theirs else -1 for value in values]
            rows[f"facts.{name}.weight"] = [*known, len(theirs)]  # the last row is for an unknown fact
        fit = warm_start(module.net, export, rows)
        note = "" if about["tokenizer"] == self.store.manifest["tokenizer"] else "; it read codes of another tokenizer"
        dist.run_on_leader(print, f"prior-{self.level} begins with {export.parent}: {fit}{note}")

    def stream(self, position: int, micro_batch: int) -> Iterator[dict]:
        """Yields this rank's micro-batches of codes, without end. Each epoch reads the next augmentation draw.

        Args:
            position: Global position of the first sample.
            micro_batch: Samples in each micro-batch.

        Yields:
            Dicts as batch() returns them, with "key", the address of each row as text.
        """
        train_config = self.prior_config.train
        sets = [entry["set"] for entry in self.shards]
        order = order_for(
            self.label_counts(), sets, train_config.batch, self.config.seed, self.prior_config.stream, self.member
        )
        draws = self.store.draws("train")
        for positions in training_batches(position, train_config.batch, micro_batch, dist.rank(), dist.world_size()):
            rows = []
            for sample_position, _ in positions:
                shard, ordinal = order.sample(sample_position)
                rows.append((order.epoch(sample_position) % draws, self.shards[shard]["shard"], ordinal))
            yield self.batch("train", rows) | {"key": ["-".join(map(str, row)) for row in rows]}

    def finish(self, batch: dict) -> dict:
        """Returns the batch unchanged: codes need no work on the device."""
        return batch

    @cached_property
    def labels(self) -> list[np.ndarray]:
        """Labels of the images of each training shard. They are the same in every draw."""
        return [self.store.arrays("train", 0, entry["shard"])["label"] for entry in self.shards]

    def label_counts(self) -> list[dict[int, int]]:
        """Counts the images of each label (-1: unlabelled) in each training shard."""
        tallies = [np.unique(labels, return_counts=True) for labels in self.labels]
        return [dict(zip(labels.tolist(), counts.tolist(), strict=True)) for labels, counts in tallies]

    def member(self, shard: int, label: int, number: int) -> int:
        """Returns the ordinal of image number `number`, from 0, among the images with this label in a training shard."""
        if (shard, label) not in self.members:
            self.members[shard, label] = np.flatnonzero(self.labels[shard] == label).astype(np.int32)
        return int(self.members[shard, label][number])

    def batch(self, split: str, rows: Sequence[Sequence[int]] | np.ndarray) -> dict:
        """Gathers a batch from the code store.

        Args:
            split: Name of the split.
            rows: The rows (draw, shard, ordinal), [B, 3].

        Returns:
            Dict with codes [B, h, w], facts [B, F], and upper, the codes [B, h, w] of each coarser level.
        """
        columns = self.data[split].gather_rows(rows)
        codes = columns[f"codes.{self.level}"]
        fact_columns = [columns[name] for name in self.prior_config.facts]
        return {
            "codes": codes,
            "facts": torch.stack(fact_columns, 1) if fact_columns else codes.new_empty(len(codes), 0),
            "upper": [columns[f"codes.{name}"] for name in self.upper],
        }

    def after_step(self, module: nn.Module, statistics: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Does nothing and returns no metrics: only the optimizer changes a prior."""
        return {}

    @torch.no_grad()
    def evaluate(self, engine: Engine) -> tuple[dict[str, float], dict[str, bytes]]:
        """Measures bits per token on the validation split and on as many training images, and those of a bigram. Collective.

        Returns:
            The metrics, and a picture (name → PNG), see prior_picture.py. Under ZeRO 3 a prior above `gather_gib` draws none.
        """
        held_out = self.data["val"].all()
        net, batch = engine.module, engine.micro_batch  # a training batch fits the memory, so an evaluation batch does too
        metrics = {"bits_per_token": self.bits(net, "val", held_out, batch)}
        metrics["train_bits_per_token"] = self.bits(net, "train", self.data["train"].all()[: len(held_out)], batch)
        if self.bigram is None:
            self.bigram = dist.run_on_leader(self._bigram)
        metrics["bigram_bits"] = self.bigram
        if not engine.fits_whole():
            return metrics, {}
        with engine.whole_module() as module:
            return metrics, self.picture.draw(module.net)

    def curves(self, rows: list[dict]) -> dict[str, bytes]:
        """Draws the learning curves from the metrics log. Returns name → PNG."""
        picture = plots.curves({f"prior-{self.level}": rows})
        return {"bits": picture} if picture else {}

    def bits(self, module: nn.Module, split: str, rows_N3: np.ndarray, batch_size: int) -> float:
        """Measures the mean bits per token. The rows are divided among the ranks. Collective.

        Every rank runs the model equally often on batches of equal size: a rank with fewer rows repeats the first row, which
        then counts with weight 0.

        Args:
            module: The Objective, in evaluation mode. Under ZeRO 3 its forward gathers weights.
            split: Name of the split.
            rows_N3: The rows (draw, shard, ordinal).
            batch_size: Rows that are measured at once.

        Returns:
            The mean over all tokens of all rows.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        longest = max(len(contiguous_share(len(rows_N3), r, dist.world_size())) for r in range(dist.world_size()))
        size = min(batch_size, longest)
        mine = contiguous_share(len(rows_N3), dist.rank(), dist.world_size())
        for first in range(0, longest, size):
            members = mine[first : first + size]
            padded = np.concatenate([rows_N3[members], np.repeat(rows_N3[:1], size - len(members), axis=0)])
            out = module(self.batch(split, padded))
            watchdog.beat()
            total += out["bits_B"][: len(members)].double().sum()
        return float(dist.all_reduce_sum(total)) / len(rows_N3)

    def _bigram(self) -> float:
        """Measures the bits per token on the validation split of a bigram that is fitted on all draws of the training split."""
        column = f"codes.{self.level}"

        def files(split: str) -> Iterator[np.ndarray]:
            for draw in range(self.store.draws(split)):
                for entry in self.store.shards(split):
                    yield self.store.arrays(split, draw, entry["shard"])[column]

        return bigram_bits(files("train"), files("val"), self.shape["entries"])

    def _data(self) -> dict[str, dict[str, int]]:
        """Returns licences, attributions and sources of the images behind the prior, also behind the weights it began with."""
        data = {key: self.store.manifest[key] for key in ("licences", "attributions", "sources")}
        export = initial_export(self.config, f"prior-{self.level}")
        return merge_counts(data, read_yaml(export / "config.yaml")["data"]) if export else data

    def export(self, weights: Weights, metrics: dict[str, float]) -> None:
        """Writes the weights, the description that the sample stage reads, and a model card. Collective.

        Args:
            weights: The weights.
            metrics: The held-out metrics of these weights.
        """
        values = facts.vocabularies(self.store, self.prior_config.facts)
        about = {
            "model": to_plain(self.prior_config.model),
            "shape": to_plain(self.shape),
            "level": self.level,
            "facts": values,
            "training_facts": facts.count_combinations(self.store, self.prior_config.facts),
            "tokenizer": self.store.manifest["tokenizer"],
            "data": self._data(),
            "held_out": metrics,
        }
        grid = "×".join(map(str, self.shape["grid"]))
        card_facts = {"level": self.level, "model": self.prior_config.model.kind, "grid": grid}
        card_facts |= {f"{name}s" if name == "label" else name: ", ".join(v) or "none" for name, v in values.items()}
        card_facts |= {"codes of tokenizer": about["tokenizer"]}
        name = f"{self.config.name}: prior of level {self.level}"
        write_export(self.folder / "export", weights, about, card("prior", name, card_facts, about["data"], metrics))
