"""tokenizer: shards → trained VQ-VAE-2, exported with the weights that were best on held-out images."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save
from torch import nn

from hpc import dist
from hpc.config import build, digest, plain, read_yaml
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.loop import train
from hpc.rundir import atomic_write
from lesiongen.card import card
from lesiongen.data import images
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.experiment import Experiment
from lesiongen.metrics.codes import usage_and_perplexity
from lesiongen.metrics.image import psnr, ssim
from lesiongen.models.vqvae2 import VQVAE2, VQVAE2Config
from lesiongen.stages.base import Stage, packed


def stage(config: Experiment) -> Stage:
    own = config.tokenizer
    identity = {"tokenizer": plain(own, volatile=False), "seed": config.seed}
    return Stage("tokenizer", ("shards",), identity, run, target=own.train.samples, trains=True)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    own = config.tokenizer
    task = TokenizerTask(config, packed(config), folder)
    train(task, own.train, folder, topology, config.seed, "tokenizer", ledger=config.data.ledger)
    return digest_of_export(folder / "export")


def to_float(image_BCHW: torch.Tensor) -> torch.Tensor:
    """uint8 → [-1, 1]."""
    return image_BCHW.float() / 127.5 - 1


def to_uint8(x_BCHW: torch.Tensor) -> torch.Tensor:
    return ((x_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Objective(nn.Module):
    """Reconstruction and commitment loss (arXiv:1711.00937, equation 3, with the codebook learned by averages)."""

    def __init__(self, config: VQVAE2Config, channels: int, batch: int):
        super().__init__()
        self.commitment = config.commitment
        self.net = VQVAE2(config, channels, batch)

    def forward(self, batch: dict) -> dict:
        x = to_float(batch["image"])
        y, levels = self.net(x, batch["slot"], batch["position"])
        mse = F.mse_loss(y.float(), x)
        commitment = sum(q.loss for q in levels.values())
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # variances vanish in bf16
            metrics = {"reconstruction": mse, "commitment": commitment.detach()}
            metrics |= {f"commitment/{name}": q.loss.detach() for name, q in levels.items()}
            metrics |= {"psnr": psnr(to_unit(y), to_unit(x)).mean(), "ssim": ssim(to_unit(y[:4]), to_unit(x[:4])).mean()}
        ordered = [levels[name].statistics for name in self.net.names]
        return {"loss": mse + self.commitment * commitment, "metrics": metrics, "statistics": torch.cat(ordered)}


def to_unit(x_BCHW: torch.Tensor) -> torch.Tensor:
    return (x_BCHW.float().clamp(-1, 1) + 1) / 2


class TokenizerTask:
    """What the training loop needs to know of a tokenizer."""

    metric = "mse"

    def __init__(self, config: Experiment, shards: Packed, folder: Path):
        self.config, self.folder, self.name = config, folder, f"{config.name}: tokenizer"
        self.data = ImageShards(shards, "train")
        self.held_out = ImageShards(shards, "val")
        self.size = len(self.data)
        try:
            self.grids = config.tokenizer.model.grids(self.data.size)
        except ValueError as error:
            raise UserError(f"tokenizer.model: {error}") from None

    def build(self) -> nn.Module:
        own = self.config.tokenizer
        return Objective(own.model, self.data.channels, own.train.batch)

    def stream(self, position: int, micro_batch: int) -> Iterator[dict]:
        own = self.config.tokenizer
        seed, workers = self.config.seed, self.config.data.workers
        batches = self.data.train(position, own.train.batch, micro_batch, own.augment, seed, workers, own.stream)
        return ({k: batch[k] for k in ("image", "slot", "position", "key", "bad")} for batch in batches)

    def after_step(self, module: nn.Module, statistics: torch.Tensor) -> dict[str, float]:
        return module.net.update(statistics)

    def evaluate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, bytes]]:
        check_codebooks(module.net)
        return held_out_figures(module.net, self.held_out, self.config.evaluate.batch)

    def export(self, module: nn.Module, metrics: dict[str, float]) -> None:
        facts = {"model": plain(self.config.tokenizer.model), "channels": self.data.channels, "size": self.data.size}
        facts |= {"data": self.data.packed.about, "held_out": metrics}
        about = {"levels": " + ".join(f"{g}² {n}" for n, g in self.grids.items()), "image size": f"{self.data.size} px"}
        write_export(self.folder / "export", module.net, facts, card("tokenizer", self.name, about, facts["data"], metrics))


def check_codebooks(net: VQVAE2) -> None:
    """Every rank must hold the same codebooks. Collective."""
    own = [float(q.codebook.double().sum()) for q in net.quantizers]
    if any(theirs != own for theirs in dist.gather(own)):
        raise RuntimeError("codebooks differ between ranks")


@torch.no_grad()
def held_out_figures(net: VQVAE2, data: ImageShards, micro: int) -> tuple[dict[str, float], dict[str, bytes]]:
    """mse (on [-1, 1]), nmse, psnr, ssim, and usage and perplexity of each level over a whole split; a picture of
    originals above reconstructions. Collective: each rank takes its share."""
    device = next(net.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64)
    counts = {name: torch.zeros(net.config.entries, dtype=torch.float64) for name in net.names}
    shown: list[torch.Tensor] = []
    for batch in data.held_out(micro):
        x = to_float(batch["image"].to(device))
        y, levels = net(x)
        each = [psnr(to_unit(y), to_unit(x)), ssim(to_unit(y), to_unit(x)), (y - x).square().flatten(1).mean(1)]
        sums += torch.tensor([float(v.double().sum()) for v in each] + [len(x)])
        for name, q in levels.items():
            counts[name] += torch.bincount(q.codes.flatten(), minlength=net.config.entries).double().cpu()
        if not shown:
            shown = [batch["image"][:8], to_uint8(y[:8]).cpu()]
    packed = dist.sum_(torch.cat([sums, *counts.values()]).to(device)).cpu()
    total_psnr, total_ssim, total_mse, number = packed[:4].tolist()
    metrics = {"psnr": total_psnr / number, "ssim": total_ssim / number, "mse": total_mse / number}
    metrics["nmse"] = metrics["mse"] / 4 / data.packed.moments["data_variance"]
    for name, count in zip(counts, packed[4:].split(net.config.entries), strict=True):
        metrics[f"usage/{name}"], metrics[f"perplexity/{name}"] = usage_and_perplexity(count)
    picture = images.png(images.grid(torch.cat(shown), len(shown[0]))) if shown else None
    return metrics, {"reconstructions": picture} if picture else {}


def write_export(folder: Path, net: nn.Module, facts: dict, readme: str) -> None:
    """Release weights: safetensors, what is needed to build the model again, and a card for people."""
    weights = {k: v.detach().float().cpu().contiguous() for k, v in net.state_dict().items()}
    content = save(weights)
    atomic_write(folder / "model.safetensors", content)
    atomic_write(folder / "README.md", readme.encode())
    atomic_write(folder / "config.yaml", yaml.safe_dump(facts, sort_keys=False, allow_unicode=True).encode())


def digest_of_export(folder: Path) -> str:
    facts = read_yaml(folder / "config.yaml")
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return digest({"weights": weights, "model": facts["model"]})


def load_tokenizer(path: Path, device: torch.device) -> tuple[VQVAE2, dict]:
    """The exported net, in evaluation mode, and its facts."""
    facts = read_yaml(path / "export" / "config.yaml")
    net = VQVAE2(build(VQVAE2Config, facts["model"]), facts["channels"], batch=1)
    weights = load_file(path / "export" / "model.safetensors")
    net.load_state_dict(weights)
    return net.to(device).eval(), facts
