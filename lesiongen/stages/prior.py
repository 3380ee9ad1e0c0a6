"""prior: code store → trained GPT per level, p(level | label, coarser levels), exported at its best held-out bits."""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from hpc import dist
from hpc.codestore import CodeStore
from hpc.config import build, plain, read_yaml
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.loop import train
from hpc.plan import split
from hpc.shards import training_batches
from lesiongen.card import card
from lesiongen.data import images
from lesiongen.data.balance import plan_for
from lesiongen.experiment import Experiment, PriorConfig
from lesiongen.metrics.codes import bigram_bits
from lesiongen.models.gpt import GPT, GPTConfig
from lesiongen.sampling import Choice, uniforms
from lesiongen.stages.base import Stage, digest_of, require
from lesiongen.stages.tokenizer import digest_of_export, load_tokenizer, to_uint8, write_export

GRID_SAMPLES = 32  # of the picture drawn at each evaluation


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
    return digest_of_export(folder / "export")


class Objective(nn.Module):
    """Mean cross-entropy of a level's codes."""

    def __init__(self, net: GPT):
        super().__init__()
        self.net = net

    def forward(self, batch: dict) -> dict:
        loss = self.net.loss(batch["codes"], batch["label"], batch["upper"])
        bits = loss.detach() / math.log(2)
        return {"loss": loss, "metrics": {"bits_per_token": bits}, "statistics": None}


def model_shape(store: CodeStore, level: str) -> dict:
    """Arguments of a prior for one level of a store. Raises UserError for a level it lacks."""
    names = [entry["name"] for entry in store.levels]  # coarse to fine
    if level not in names:
        raise UserError(f"The code store {store.folder} has the levels {', '.join(names)}, not '{level}'.")
    place = names.index(level)
    own, upper = store.levels[place], store.levels[:place]
    return {
        "grid": tuple(own["grid"]),
        "entries": own["K"],
        "classes": len(store.manifest["vocabularies"]["label"]),
        "upper": tuple((u["K"], tuple(u["grid"])) for u in upper),
    }


class PriorTask:
    """What the training loop needs to know of a prior."""

    metric = "bits_per_token"

    def __init__(self, config: Experiment, own: PriorConfig, level: str, folder: Path, topology: Topology):
        self.config, self.own, self.level, self.folder, self.device = config, own, level, folder, topology.device
        self.store = CodeStore(require(config, "codes"))
        dist.leader_does(check_codes, config, self.store)
        self.shape = model_shape(self.store, level)
        self.upper = [entry["name"] for entry in self.store.levels][: len(self.shape["upper"])]
        self.shards = self.store.shards("train")
        self.size = sum(s["count"] for s in self.shards)
        self.classes = self.store.manifest["vocabularies"]["label"]
        self.bigram: float | None = None

    def build(self) -> nn.Module:
        return Objective(GPT(self.own.model, **self.shape))

    def prepare(self, module: nn.Module) -> None:
        """Nothing is set before training."""

    def stream(self, position: int, micro_batch: int) -> Iterator[dict]:
        """Batches of codes from the plan; the epoch's number picks the augmentation draw."""
        sets = [s["set"] for s in self.shards]
        plan = plan_for(self.tallies(), sets, self.own.train.batch, self.config.seed, self.own.stream, self.member)
        draws = self.store.draws("train")
        for batch in training_batches(position, self.own.train.batch, micro_batch, dist.rank(), dist.world()):
            where = []
            for place, _ in batch:
                shard, ordinal = plan.sample(place)
                where.append((plan.epoch(place) % draws, self.shards[shard]["shard"], ordinal))
            yield self.batch("train", where) | {"key": ["-".join(map(str, w)) for w in where]}

    def tallies(self) -> list[dict[int, int]]:
        """Codes of each label, -1 for none, in each shard."""
        found = [np.unique(self.labels(i), return_counts=True) for i in range(len(self.shards))]
        return [dict(zip(labels.tolist(), counts.tolist(), strict=True)) for labels, counts in found]

    def labels(self, shard: int) -> np.ndarray:
        return self.store.arrays("train", 0, self.shards[shard]["shard"])["label"]

    def member(self, shard: int, label: int, number: int) -> int:
        """Row of a label's member `number` in a shard."""
        return int(np.flatnonzero(self.labels(shard) == label)[number])

    def batch(self, name: str, where: list[tuple[int, int, int]]) -> dict:
        """codes [B, h, w], label [B], upper: list of coarser codes; rows (draw, shard, ordinal) of a split."""
        columns = ["label", f"codes.{self.level}", *(f"codes.{u}" for u in self.upper)]
        found = self.store.take(name, where, columns)
        tensors = {k: torch.from_numpy(v.astype("int64")).to(self.device) for k, v in found.items()}
        return {
            "codes": tensors[f"codes.{self.level}"],
            "label": tensors["label"],
            "upper": [tensors[f"codes.{u}"] for u in self.upper],
        }

    def after_step(self, module: nn.Module, statistics) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, bytes]]:
        """Bits per token held-out and on as many training codes, beside the bigram's; a grid of samples. Collective."""
        held_out = self.rows("val")
        metrics = {"bits_per_token": self.bits(module.net, "val", held_out)}
        metrics["train_bits_per_token"] = self.bits(module.net, "train", self.rows("train")[: len(held_out)])
        if self.bigram is None:
            self.bigram = dist.leader_does(self._bigram)
        metrics["bigram_bits"] = self.bigram
        return metrics, self._picture(module.net)

    def rows(self, name: str) -> list[tuple[int, int, int]]:
        return [(0, s["shard"], i) for s in self.store.shards(name) for i in range(s["count"])]

    def bits(self, net: GPT, name: str, rows: list[tuple[int, int, int]]) -> float:
        """Mean over tokens; each rank takes its share."""
        sums = torch.zeros(2, dtype=torch.float64)
        mine = iter([rows[i] for i in split(len(rows), dist.rank(), dist.world())])
        while where := list(islice(mine, 64)):
            batch = self.batch(name, where)
            found = net.log_likelihood(batch["codes"], batch["label"], batch["upper"])
            sums += torch.tensor([-float(found.double().sum()) / math.log(2), found.numel()], dtype=torch.float64)
        total, tokens = dist.sum_(sums.to(self.device)).tolist()
        return total / tokens

    def _bigram(self) -> float:
        column = f"codes.{self.level}"

        def files(name: str) -> Iterator[np.ndarray]:
            for draw in range(self.store.draws(name)):
                for entry in self.store.shards(name):
                    yield self.store.arrays(name, draw, entry["shard"])[column]

        return bigram_bits(files("train"), files("val"), self.shape["entries"])

    def _picture(self, net: GPT) -> dict[str, bytes]:
        """Samples of this level, one class after the other; the other levels are real held-out codes. Every rank draws
        its share, so that large grids stay short."""
        number = GRID_SAMPLES
        rows = [self.rows("val")[i % len(self.rows("val"))] for i in range(number)]
        mine = split(number, dist.rank(), dist.world())
        codes = None
        if len(mine):  # there may be more ranks than samples
            batch = self.batch("val", [rows[i] for i in mine])
            classes = len(self.classes)
            label = torch.tensor([i * classes // number if classes else -1 for i in mine], device=self.device)
            numbers = uniforms(self.config.seed, mine, self.shape["grid"])
            codes = net.sample(label, batch["upper"], numbers.to(self.device), Choice())
        parts = [p for p in dist.gather(None if codes is None else codes.cpu()) if p is not None]
        return dist.leader_does(self._paint, torch.cat(parts), rows) or {}

    def _paint(self, codes: torch.Tensor, rows: list[tuple[int, int, int]]) -> dict[str, bytes]:
        net, _ = load_tokenizer(require(self.config, "tokenizer"), self.device)
        names = [entry["name"] for entry in self.store.levels]
        found = self.store.take("val", rows, [f"codes.{n}" for n in names])
        levels = {n: torch.from_numpy(found[f"codes.{n}"].astype("int64")).to(self.device) for n in names}
        levels[self.level] = codes.to(self.device)
        return {"samples": images.png(images.grid(to_uint8(net.decode_codes(levels)).cpu(), 8))}

    def export(self, module: nn.Module, metrics: dict[str, float]) -> None:
        facts = {
            "model": plain(self.own.model),
            "shape": plain(self.shape),
            "level": self.level,
            "classes": self.classes,
            "tokenizer": self.store.manifest["tokenizer"],
            "data": {key: self.store.manifest[key] for key in ("licences", "attributions", "sources")},
            "held_out": metrics,
        }
        about = {
            "level": self.level,
            "grid": "×".join(map(str, self.shape["grid"])),
            "labels": ", ".join(self.classes) or "none",
        }
        about |= {"codes of tokenizer": facts["tokenizer"]}
        name = f"{self.config.name}: prior of level {self.level}"
        write_export(self.folder / "export", module.net, facts, card("prior", name, about, facts["data"], metrics))


def check_codes(config: Experiment, store: CodeStore) -> None:
    """Codes mean something only to the tokenizer that wrote them, and only their own shards know which are held out."""
    for name, made in (("tokenizer", store.manifest["tokenizer"]), ("shards", store.manifest["image_shards"])):
        present = digest_of(config, name)
        if present not in (made, None):
            raise UserError(
                f"The codes in {store.folder} were made from {name} {made}, this run's {name} are {present}. Encode again "
                f"(--fresh codes), or set inputs.{name} to what they were made from."
            )


def load_prior(path: Path, device: torch.device) -> tuple[GPT, dict]:
    """The exported prior, in evaluation mode, and its facts."""
    facts = read_yaml(path / "export" / "config.yaml")
    shape = facts["shape"]
    upper = tuple((k, tuple(grid)) for k, grid in shape["upper"])
    net = GPT(build(GPTConfig, facts["model"]), tuple(shape["grid"]), shape["entries"], shape["classes"], upper)
    net.load_state_dict(load_file(path / "export" / "model.safetensors"))
    return net.to(device).eval(), facts
