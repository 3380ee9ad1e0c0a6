"""What each rank does in test_codebook.py: train a tiny model with a codebook, under the engine or in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn

from hpc import dist
from hpc.train.engine import Engine, EngineConfig, build
from hpc.train.optim import OptimConfig, build_optimizer
from lesiongen.tokenizers import quantize
from lesiongen.tokenizers.quantize import EMAQuantizer
from lesiongen.tokenizers.quantizer import QuantizerConfig
from tests.dist.cases import whole_weights

BATCH, STEPS, ENTRIES, DIM = 16, 6, 32, 8


class ParameterEMAQuantizer(EMAQuantizer):
    """A wrong design, for comparison: a codebook that is updated by averages although it is a parameter."""

    def __init__(self, config: QuantizerConfig, batch: int):
        super().__init__(config, batch)
        book = self.codebook
        del self.codebook
        self.codebook = nn.Parameter(book)

    def quantize(self, z_ND):
        x, codes, loss = super().quantize(z_ND)
        return x, codes, loss + 0 * self.codebook.sum()  # DeepSpeed needs a gradient for every parameter; this gradient is 0


class Model(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.encode, self.decode = nn.Conv2d(3, DIM, 4, 4), nn.ConvTranspose2d(DIM, 3, 4, 4)
        wrong = kind == "ema parameter"
        config = QuantizerConfig(quantizer="ema" if wrong else kind, dim=DIM, entries=ENTRIES, fsq_levels=(8, 4))
        self.quantizer = ParameterEMAQuantizer(config, BATCH) if wrong else quantize.build(config, BATCH)

    def forward(self, batch: dict) -> dict:
        found = self.quantizer(self.encode(batch["image"]), batch["slot"], batch["position"])
        loss = F.mse_loss(self.decode(found.x).float(), batch["image"]) + found.loss
        return {"loss": loss, "metrics": {}, "statistics": found.statistics}


def make_batch(step: int) -> dict:
    """Returns images made of a few distinct patches, so that rounding errors do not change the code of any vector."""
    patch_rng, batch_rng = torch.Generator().manual_seed(0), torch.Generator().manual_seed(step)
    patches = torch.randn(ENTRIES, 3, 4, 4, generator=patch_rng)
    chosen = patches[torch.randint(len(patches), (BATCH, 4, 4), generator=batch_rng)]  # [B, 4, 4, 3, 4, 4]
    image = chosen.permute(0, 3, 1, 4, 2, 5).reshape(BATCH, 3, 16, 16)
    image = image + 0.1 * torch.randn(image.shape, generator=batch_rng)
    slot = torch.arange(BATCH)
    return {"image": image, "slot": slot, "position": slot + step * BATCH}


def plain(topology, kind: str, precision: str) -> dict:
    """Trains the reference: without an engine, in one process, on the whole batch."""
    model = Model(kind)
    adam = build_optimizer(model, OptimConfig(lr=1e-3))
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = model(make_batch(step))
        adam.zero_grad()
        out["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        metrics = model.quantizer.update(out["statistics"])
    return {
        "vectors": quantize_fixed_vectors(model),
        "initial vectors": quantize_fixed_vectors(Model(kind)),
        "metrics": {name: float(value) for name, value in metrics.items()},
    }


def engine(topology, kind: str, zero: int, precision: str) -> dict:
    """Trains the same model under the engine, each rank on its share of the batch."""
    settings = EngineConfig(zero=zero, precision=precision)
    model = build(lambda: Model(kind), settings, BATCH)
    trainer = Engine(model, build_optimizer(model, OptimConfig(lr=1e-3)), settings, BATCH)
    share = slice(topology.rank * trainer.micro_batch, (topology.rank + 1) * trainer.micro_batch)
    for step in range(STEPS):
        step_result = trainer.step([{k: v[share] for k, v in make_batch(step).items()}], 1e-3, {})
        metrics = model.quantizer.update(step_result.statistics)
    trainer.weights.update_model()  # as every step does: the model's weights become those that the optimizer has
    gathered = Model(kind)
    gathered.load_state_dict(whole_weights(trainer))
    return {
        "vectors": quantize_fixed_vectors(gathered),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "vectors of ranks": dist.gather(quantize_fixed_vectors(gathered)),
    }


def quantize_fixed_vectors(model: Model) -> list:
    """Quantizes fixed vectors, those of an untrained encoder, with the model's codebook. Returns [N, D]."""
    with torch.no_grad():
        x_BDHW = model.quantizer(Model("ema").encode(make_batch(0)["image"])).x
    return x_BDHW.movedim(1, -1).reshape(-1, DIM).tolist()
