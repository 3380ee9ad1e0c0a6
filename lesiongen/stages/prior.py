"""prior: code store → a trained prior per level, p(level | facts, coarser levels), exported at its best held-out bits."""

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hpc import dist
from hpc.config import plain
from hpc.data.codestore import CodeStore
from hpc.data.order import contiguous_share
from hpc.data.rows import CodeRows
from hpc.data.shards import training_batches
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.train.loop import train
from lesiongen.data import facts, images
from lesiongen.data.balance import order_for
from lesiongen.data.images import to_uint8
from lesiongen.evaluation import report
from lesiongen.evaluation.card import card
from lesiongen.evaluation.codes import bigram_bits
from lesiongen.experiment import Experiment, PriorConfig
from lesiongen.priors import make
from lesiongen.priors.objective import Objective, model_shape, training_flops_per_sample
from lesiongen.priors.prior import Prior
from lesiongen.priors.sampling import Choice, uniforms
from lesiongen.stages.base import Stage, digest_of, require
from lesiongen.tokenizers.export import export_digest, load_tokenizer, write_export

GRID_SAMPLES = 32  # of the picture drawn at each evaluation
BITS_BATCH = 64


def stage(config: Experiment, level: str) -> Stage:
    own = config.prior(level)
    identity = {"prior": plain(own, volatile=False), "level": level, "seed": config.seed}

    def run_level(config: Experiment, topology: Topology, folder: Path) -> str:
        return run(config, topology, folder, level)

    return Stage(f"prior-{level}", ("codes",), identity, run_level, target=own.train.samples, trains=True)


def run(config: Experiment, topology: Topology, folder: Path, level: str) -> str:
    own = config.prior(level)
    task = PriorTask(config, own, level, folder, topology)
    train(task, own.train, folder, topology, config.seed, f"prior-{level}", ledger=config.data.ledger)
    return export_digest(folder / "export")


class PriorTask:
    """What the training loop needs to know of a prior."""

    metric = "bits_per_token"

    def __init__(self, config: Experiment, own: PriorConfig, level: str, folder: Path, topology: Topology):
        self.config, self.own, self.level, self.folder, self.device = config, own, level, folder, topology.device
        self.store = CodeStore(require(config, "codes"))
        dist.run_on_leader(check_codes, config, self.store)
        self.shape = model_shape(self.store, level, own.facts)
        self.shards = self.store.shards("train")
        self.upper = [entry["name"] for entry in self.store.levels][: len(self.shape["upper"])]
        columns = [*own.facts, *(f"codes.{name}" for name in (level, *self.upper))]
        fits = None if own.resident == "auto" else False
        self.data = {name: CodeRows(self.store, name, columns, self.device, fits) for name in ("train", "val")}
        self.size = self.data["train"].size
        self.tokens_per_sample = math.prod(self.shape["grid"])
        self.bigram: float | None = None
        self.members: dict[tuple[int, int], np.ndarray] = {}

    @cached_property
    def flops_per_sample(self) -> int:
        return training_flops_per_sample(self.own.model, self.shape)

    def build(self) -> nn.Module:
        return Objective(make(self.own.model, **self.shape))

    def prepare(self, module: nn.Module) -> None:
        """Nothing is set before training."""

    def stream(self, position: int, micro_batch: int) -> Iterator[dict]:
        """Batches of codes from the plan; the epoch's number picks the augmentation draw."""
        sets = [s["set"] for s in self.shards]
        plan = order_for(self.label_counts(), sets, self.own.train.batch, self.config.seed, self.own.stream, self.member)
        draws = self.store.draws("train")
        for batch in training_batches(position, self.own.train.batch, micro_batch, dist.rank(), dist.world()):
            where = []
            for place, _ in batch:
                shard, ordinal = plan.sample(place)
                where.append((plan.epoch(place) % draws, self.shards[shard]["shard"], ordinal))
            yield self.batch("train", where) | {"key": ["-".join(map(str, w)) for w in where]}

    @cached_property
    def labels(self) -> list[np.ndarray]:
        """Of each training shard's images; no draw changes them."""
        return [self.store.arrays("train", 0, entry["shard"])["label"] for entry in self.shards]

    def label_counts(self) -> list[dict[int, int]]:
        """Codes of each label, -1 for none, in each shard."""
        found = [np.unique(labels, return_counts=True) for labels in self.labels]
        return [dict(zip(labels.tolist(), counts.tolist(), strict=True)) for labels, counts in found]

    def member(self, shard: int, label: int, number: int) -> int:
        """Row of a label's member `number` in a shard."""
        if (shard, label) not in self.members:
            self.members[shard, label] = np.flatnonzero(self.labels[shard] == label).astype(np.int32)
        return int(self.members[shard, label][number])

    def batch(self, name: str, where) -> dict:
        """codes [B, h, w], facts [B, F], upper: list of coarser codes; rows (draw, shard, ordinal) of a split."""
        found = self.data[name].gather_rows(where)
        codes = found[f"codes.{self.level}"]
        known = [found[fact] for fact in self.own.facts]
        return {
            "codes": codes,
            "facts": torch.stack(known, 1) if known else codes.new_empty(len(codes), 0),
            "upper": [found[f"codes.{u}"] for u in self.upper],
        }

    def after_step(self, module: nn.Module, statistics) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, bytes]]:
        """Bits per token held-out and on as many training codes, beside the bigram's; a grid of samples. Collective."""
        held_out = self.data["val"].all()
        metrics = {"bits_per_token": self.bits(module.net, "val", held_out)}
        metrics["train_bits_per_token"] = self.bits(module.net, "train", self.data["train"].all()[: len(held_out)])
        if self.bigram is None:
            self.bigram = dist.run_on_leader(self._bigram)
        metrics["bigram_bits"] = self.bigram
        return metrics, self._picture(module.net)

    def curves(self, rows: list[dict]) -> dict[str, bytes]:
        """Training beside held-out bits, from the lines logged so far."""
        picture = report.curves({f"prior-{self.level}": rows})
        return {"bits": picture} if picture else {}

    def bits(self, net: Prior, name: str, where_N3: np.ndarray) -> float:
        """Mean over tokens; each rank takes its share."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        mine = contiguous_share(len(where_N3), dist.rank(), dist.world())
        for first in range(mine.start, mine.stop, BITS_BATCH):
            batch = self.batch(name, where_N3[first : min(first + BITS_BATCH, mine.stop)])
            total -= net.log_likelihood(batch["codes"], batch["facts"], batch["upper"]).double().sum()
        return float(dist.all_reduce_sum(total)) / math.log(2) / (len(where_N3) * self.tokens_per_sample)

    def _bigram(self) -> float:
        column = f"codes.{self.level}"

        def files(name: str) -> Iterator[np.ndarray]:
            for draw in range(self.store.draws(name)):
                for entry in self.store.shards(name):
                    yield self.store.arrays(name, draw, entry["shard"])[column]

        return bigram_bits(files("train"), files("val"), self.shape["entries"])

    def _picture(self, net: Prior) -> dict[str, bytes]:
        """Samples of this level, one class after the other; the other levels and facts are real held-out ones. Every rank
        draws its share, so that large grids stay short."""
        number, held_out = GRID_SAMPLES, self.data["val"].all()
        rows = held_out[np.arange(number) % len(held_out)]
        mine = contiguous_share(number, dist.rank(), dist.world())
        codes = None
        if len(mine):  # there may be more ranks than samples
            batch = self.batch("val", rows[mine.start : mine.stop])
            if classes := self.shape["facts"].get("label"):
                label = torch.tensor([i * classes // number for i in mine], device=self.device)
                batch["facts"][:, self.own.facts.index("label")] = label
            numbers = uniforms(self.config.seed, mine, self.shape["grid"])
            codes = net.sample(batch["facts"], batch["upper"], numbers.to(self.device), Choice())
        parts = [p for p in dist.gather(None if codes is None else codes.cpu()) if p is not None]
        return dist.run_on_leader(self._paint, torch.cat(parts), rows) or {}

    def _paint(self, codes: torch.Tensor, rows: np.ndarray) -> dict[str, bytes]:
        net, _ = load_tokenizer(require(self.config, "tokenizer"), self.device)
        names = [entry["name"] for entry in self.store.levels]
        found = self.store.gather_rows("val", rows, [f"codes.{n}" for n in names])
        levels = {n: torch.from_numpy(found[f"codes.{n}"].astype("int64")).to(self.device) for n in names}
        levels[self.level] = codes.to(self.device)
        return {"samples": images.png(images.grid(to_uint8(net.decode_codes(levels)).cpu(), 8))}

    def export(self, module: nn.Module, metrics: dict[str, float]) -> None:
        values = facts.vocabularies(self.store, self.own.facts)
        about = {
            "model": plain(self.own.model),
            "shape": plain(self.shape),
            "level": self.level,
            "facts": values,
            "training_facts": facts.count_combinations(self.store, self.own.facts),
            "tokenizer": self.store.manifest["tokenizer"],
            "data": {key: self.store.manifest[key] for key in ("licences", "attributions", "sources")},
            "held_out": metrics,
        }
        said = {"level": self.level, "model": self.own.model.kind, "grid": "×".join(map(str, self.shape["grid"]))}
        said |= {f"{name}s" if name == "label" else name: ", ".join(v) or "none" for name, v in values.items()}
        said |= {"codes of tokenizer": about["tokenizer"]}
        name = f"{self.config.name}: prior of level {self.level}"
        write_export(self.folder / "export", module.net, about, card("prior", name, said, about["data"], metrics))


def check_codes(config: Experiment, store: CodeStore) -> None:
    """Codes mean something only to the tokenizer that wrote them, and only their own shards know which are held out."""
    for name, made in (("tokenizer", store.manifest["tokenizer"]), ("shards", store.manifest["image_shards"])):
        present = digest_of(config, name)
        if present not in (made, None):
            raise UserError(
                f"The codes in {store.folder} were made from {name} {made}, this run's {name} are {present}. Encode again "
                f"(--fresh codes), or set inputs.{name} to what they were made from."
            )
