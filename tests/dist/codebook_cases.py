"""What the ranks of test_codebook.py do: a tiny model with a codebook under the engine, and the same in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn

from hpc import dist
from hpc.train.engine import Engine, EngineConfig
from hpc.train.optim import OptimConfig, build_optimizer
from lesiongen.tokenizers import quantize
from lesiongen.tokenizers.quantize import EMAQuantizer
from lesiongen.tokenizers.quantizer import QuantizerConfig

BATCH, STEPS, ENTRIES, DIM = 16, 6, 32, 8


class Held(EMAQuantizer):
    """The mistake: a codebook that is moved by averages and is a parameter all the same."""

    def __init__(self, config: QuantizerConfig, batch: int):
        super().__init__(config, batch)
        book = self.codebook
        del self.codebook
        self.codebook = nn.Parameter(book)

    def quantize(self, z_ND):
        x, codes, loss = super().quantize(z_ND)
        return x, codes, loss + 0 * self.codebook.sum()  # engines want a gradient; this one changes nothing


class Model(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.encode, self.decode = nn.Conv2d(3, DIM, 4, 4), nn.ConvTranspose2d(DIM, 3, 4, 4)
        config = QuantizerConfig(quantizer="ema" if kind == "held" else kind, dim=DIM, entries=ENTRIES, fsq_levels=(8, 4))
        self.quantizer = Held(config, BATCH) if kind == "held" else quantize.build(config, BATCH)

    def forward(self, batch: dict) -> dict:
        found = self.quantizer(self.encode(batch["image"]), batch["slot"], batch["position"])
        loss = F.mse_loss(self.decode(found.x).float(), batch["image"]) + found.loss
        return {"loss": loss, "metrics": {}, "statistics": found.statistics}


def batches(step: int) -> dict:
    """Images of patches of a few kinds: clear cut, so that rounding alone gives no vector another code."""
    fixed, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(step)
    kinds = torch.randn(ENTRIES, 3, 4, 4, generator=fixed)
    chosen = kinds[torch.randint(len(kinds), (BATCH, 4, 4), generator=own)]  # [B, 4, 4, 3, 4, 4]
    image = chosen.permute(0, 3, 1, 4, 2, 5).reshape(BATCH, 3, 16, 16)
    image = image + 0.1 * torch.randn(image.shape, generator=own)
    slot = torch.arange(BATCH)
    return {"image": image, "slot": slot, "position": slot + step * BATCH}


def plain(topology, kind: str, precision: str) -> dict:
    """The reference: no engine, one process, the whole batch."""
    model = Model(kind)
    adam = build_optimizer(model, OptimConfig(lr=1e-3))
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = model(batches(step))
        adam.zero_grad()
        out["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        metrics = model.quantizer.update(out["statistics"])
    return {"seen": seen(model), "at first": seen(Model(kind)), "metrics": metrics}


def engine(topology, kind: str, zero: int, precision: str) -> dict:
    """The same under the engine; each rank has its part of the batch."""
    model = Model(kind)
    settings = EngineConfig(zero=zero, precision=precision)
    run = Engine(model, build_optimizer(model, OptimConfig(lr=1e-3)), settings, BATCH)
    share = slice(topology.rank * run.micro_batch, (topology.rank + 1) * run.micro_batch)
    for step in range(STEPS):
        done = run.step([{k: v[share] for k, v in batches(step).items()}], 1e-3, {})
        metrics = model.quantizer.update(done.statistics)
    whole = Model(kind)
    run.copy_to(whole)
    return {"seen": seen(whole), "metrics": metrics, "ranks": dist.gather(seen(whole))}


def seen(model: Model) -> list:
    """What the quantizer makes of fixed vectors, [N, D]."""
    with torch.no_grad():
        x_BDHW = model.quantizer(Model("ema").encode(batches(0)["image"])).x
    return x_BDHW.movedim(1, -1).reshape(-1, DIM).tolist()
