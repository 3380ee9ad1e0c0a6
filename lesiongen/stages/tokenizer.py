"""tokenizer: shards → a trained tokenizer, exported with the weights that were best on held-out images."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save
from torch import nn

from hpc import dist
from hpc.config import build, digest, plain, read_yaml
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run.metrics_log import metric_name
from hpc.run.rundir import atomic_write
from hpc.train.loop import train
from lesiongen import figures, report
from lesiongen.card import card
from lesiongen.data import images
from lesiongen.data.packed import Packed
from lesiongen.data.similarity import psnr, ssim
from lesiongen.data.stream import ImageShards
from lesiongen.experiment import Experiment, TokenizerConfig
from lesiongen.metrics.codes import usage_and_perplexity
from lesiongen.models.losses import LossConfig, Reconstruction
from lesiongen.models.tokenizer import Tokenizer, make
from lesiongen.stages.base import Stage, packed

KMEANS_IMAGES = 256
PERTURBED_IMAGES = 256  # of each rank, for the figure of wrong codes
COLLAPSED = 0.02  # a level whose perplexity is below this share of its codes


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
    """Reconstruction loss, and what the quantizers ask for (arXiv:1711.00937, equation 3)."""

    def __init__(self, net: Tokenizer, loss: LossConfig, variance: float):
        super().__init__()
        self.net, self.reconstruction = net, Reconstruction(loss, variance)

    def forward(self, batch: dict) -> dict:
        x = to_float(batch["image"])
        y, levels = self.net(x, batch["slot"], batch["position"])
        loss, terms = self.reconstruction(y, x)
        quantization = sum(q.loss for q in levels.values())
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # variances vanish in bf16
            metrics = {"reconstruction": loss.detach(), **terms, "quantization": quantization.detach()}
            metrics |= {f"quantization/{name}": q.loss.detach() for name, q in levels.items()}
            metrics |= {"psnr": psnr(to_unit(y), to_unit(x)).mean(), "ssim": ssim(to_unit(y[:4]), to_unit(x[:4])).mean()}
        ordered = [levels[name].statistics for name in self.net.names]
        return {"loss": loss + quantization, "metrics": metrics, "statistics": torch.cat(ordered)}


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
        net = make(own.model, self.data.channels, own.train.batch)
        return Objective(net, own.loss, self.data.packed.moments["data_variance"])

    def prepare(self, module: nn.Module) -> None:
        """Before the first step: codebooks on k-means centres of training images, the same on every rank."""
        if self.config.tokenizer.model.kmeans:
            own = self.config.tokenizer
            number = min(KMEANS_IMAGES, self.size)
            # Every rank reads the same first images of the sequence: nothing needs to be sent.
            images_ = next(self.data.first(number, own.train.batch, own.augment, self.config.seed))["image"]
            module.net.initialise(to_float(images_))

    def stream(self, position: int, micro_batch: int) -> Iterator[dict]:
        own = self.config.tokenizer
        seed, workers = self.config.seed, self.config.data.workers
        batches = self.data.train(position, own.train.batch, micro_batch, own.augment, seed, workers, own.stream)
        return ({k: batch[k] for k in ("image", "slot", "position", "key", "bad")} for batch in batches)

    def after_step(self, module: nn.Module, statistics: torch.Tensor) -> dict[str, float]:
        return module.net.update(statistics)

    def evaluate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, bytes]]:
        check_codebooks(module.net)
        metrics, pictures = held_out_figures(module.net, self.held_out, self.config.evaluate.batch)
        for name in module.net.names:
            if metrics[f"collapsed/{name}"] and dist.rank() == 0:
                print(
                    f"warning: level '{name}' is collapsing: {metrics[f'usage/{name}']:.1%} of {module.net.entries} codes are "
                    f"used on held-out images, perplexity {metrics[f'perplexity/{name}']:.1f}. Samples from it will be alike. "
                    "Try quantizer ema with a higher revive_below, kmeans: true, or fewer entries."
                )
        return metrics, pictures

    def curves(self, rows: list[dict]) -> dict[str, bytes]:
        picture = report.curves({"tokenizer": rows})
        return {"curves": picture} if picture else {}

    def export(self, module: nn.Module, metrics: dict[str, float]) -> None:
        facts = {"model": plain(self.config.tokenizer.model), "channels": self.data.channels, "size": self.data.size}
        facts |= {"preprocess": self.data.packed.preprocess, "data": self.data.packed.about, "held_out": metrics}
        about = {"levels": " + ".join(f"{g}² {n}" for n, g in self.grids.items()), "image size": f"{self.data.size} px"}
        write_export(self.folder / "export", module.net, facts, card("tokenizer", self.name, about, facts["data"], metrics))


def check_codebooks(net: Tokenizer) -> None:
    """Every rank must hold the same codebooks. Collective."""
    own = [float(b.detach().double().sum()) for q in net.quantizers for b in [*q.buffers(), *q.parameters()]]
    if any(theirs != own for theirs in dist.gather(own)):
        raise RuntimeError("codebooks differ between ranks")


@torch.no_grad()
def held_out_figures(net: Tokenizer, data: ImageShards, micro: int) -> tuple[dict[str, float], dict[str, bytes]]:
    """mse (on [-1, 1]), nmse, psnr, ssim; usage and perplexity of each level, in all and for each class, over a whole
    split; the PSNR that is lost when codes are wrong; pictures. Collective: each rank takes its share."""
    device, entries, classes = next(net.parameters()).device, net.entries, data.classes
    sums = torch.zeros(6, dtype=torch.float64)
    counts = torch.zeros(len(net.names), len(classes) + 1, entries, dtype=torch.float64)  # the unlabelled are last
    shown: list[torch.Tensor] = []
    for batch in data.held_out(micro):
        x = to_float(batch["image"].to(device))
        y, levels = net(x)
        each = [psnr(to_unit(y), to_unit(x)), ssim(to_unit(y), to_unit(x)), (y - x).square().flatten(1).mean(1)]
        sums[:4] += torch.tensor([float(v.double().sum()) for v in each] + [len(x)])
        for i, name in enumerate(net.names):
            codes = levels[name].codes.flatten(1).cpu()
            where = (batch["label"] % (len(classes) + 1))[:, None] * entries + codes
            counts[i] += torch.bincount(where.flatten(), minlength=counts[i].numel()).view_as(counts[i])
        if sums[5] < PERTURBED_IMAGES:
            broken = net.decode_codes({name: perturbed(q.codes, entries, batch["ordinal"]) for name, q in levels.items()})
            sums[4:] += torch.tensor([float((each[0] - psnr(to_unit(broken), to_unit(x))).double().sum()), len(x)])
        if not shown:
            codes = {name: q.codes[:8].cpu() for name, q in levels.items()}
            shown = [batch["image"][:8], to_uint8(y[:8]).cpu(), codes]
    packed = dist.sum_(torch.cat([sums, counts.flatten()]).to(device)).cpu()
    total_psnr, total_ssim, total_mse, number, lost, broken = packed[:6].tolist()
    metrics = {"psnr": total_psnr / number, "ssim": total_ssim / number, "mse": total_mse / number}
    metrics["nmse"] = metrics["mse"] / 4 / data.packed.moments["data_variance"]
    metrics["psnr_lost_to_wrong_codes"] = lost / max(1, broken)
    counts = packed[6:].view_as(counts)
    for name, by_class in zip(net.names, counts, strict=True):
        metrics[f"usage/{name}"], metrics[f"perplexity/{name}"] = usage_and_perplexity(by_class.sum(0))
        metrics[f"collapsed/{name}"] = float(metrics[f"perplexity/{name}"] < max(COLLAPSED * entries, min(2, entries / 4)))
        for label, count in zip(classes, by_class, strict=False):
            if count.sum():
                found = usage_and_perplexity(count)
                own = f"{name}/{metric_name(label)}"
                metrics[f"usage/{own}"], metrics[f"perplexity/{own}"] = found
    if not shown:
        return metrics, {}
    books = {name: (net.codebook(name).cpu(), c.sum(0)) for name, c in reversed(list(zip(net.names, counts, strict=True)))}
    return metrics, {
        "reconstructions": images.png(figures.pairs(shown[0], shown[1], len(shown[0]))),
        "codes": images.png(figures.with_maps(*shown, entries)),
        "codebook": figures.codebooks(books),
    }


def perturbed(codes_BHW: torch.Tensor, entries: int, seed_B: torch.Tensor, share: float = 0.05) -> torch.Tensor:
    """Codes of which a share is replaced by any others, the same ones at each call."""
    rng = torch.Generator().manual_seed(int(seed_B[0]))
    other = torch.randint(entries, codes_BHW.shape, generator=rng)
    wrong = torch.rand(codes_BHW.shape, generator=rng) < share
    return torch.where(wrong.to(codes_BHW.device), other.to(codes_BHW.device), codes_BHW)


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


def load_tokenizer(path: Path, device: torch.device) -> tuple[Tokenizer, dict]:
    """The exported net, in evaluation mode, and its facts."""
    facts = read_yaml(path / "export" / "config.yaml")
    net = make(build(TokenizerConfig, {"model": facts["model"]}).model, facts["channels"], batch=1)
    weights = load_file(path / "export" / "model.safetensors")
    net.load_state_dict(weights)
    return net.to(device).eval(), facts
