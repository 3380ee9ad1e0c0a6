"""What each rank does in test_sharding.py."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from hpc import dist
from hpc.config import from_plain
from hpc.train.engine import Engine, EngineConfig, build
from hpc.train.optim import OptimConfig, build_optimizer
from hpc.train.prefetch import on_device
from hpc.train.zero import gathered, shape_of
from lesiongen import experiment, priors
from lesiongen.experiment import PriorConfig
from lesiongen.priors.export import load_prior
from lesiongen.priors.objective import Objective
from lesiongen.stages.base import artefact
from lesiongen.stages.prior import PriorTask
from tests.dist.cases import run_stages, whole_weights

SHAPE = {"grid": (4, 4), "entries": 16, "facts": {"label": 5}, "upper": ((16, (2, 2)),)}
DATA_SEED = 3


def digest(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()}"


def small_prior(kind: str, **more) -> nn.Module:
    more |= {"heads": 2} if kind in ("gpt", "pixelsnail") else {}
    more |= {"modulate": True} if kind == "gpt" else {}
    model = {"kind": kind, "layers": 2, "width": 32, "dropout": 0.0, "label_dropout": 0.0} | more
    return Objective(priors.make(from_plain(PriorConfig, {"model": model}).model, **SHAPE))


class WithBuffer(nn.Module):
    """A model with a buffer in fp64, which must stay fp64."""

    def __init__(self, build_module):
        super().__init__()
        self.register_buffer("buffer64", torch.arange(3, dtype=torch.float64) / 3)
        self.inner = build_module()


def built(topology, kind: str) -> dict:
    """Builds a prior whole and divided. Returns the digests of both, and the elements that the divided one holds."""
    digests, elements = [], 0
    for zero in (0, 3):
        torch.manual_seed(0)
        module = build(lambda: WithBuffer(lambda: small_prior(kind)), EngineConfig(zero=zero), 4)
        if zero == 3:
            elements = sum(p.numel() for p in module.parameters())
        with gathered(module.parameters()):
            digests.append({name: digest(value) for name, value in module.state_dict().items()})
    return {"whole": digests[0], "divided": digests[1], "elements": elements}


def tokenizer_buffers(topology, run: str, quantizer: dict) -> tuple[dict, dict]:
    """Digests of a tokenizer's buffers after k-means, built whole and built divided."""
    from tests.dist.topology_cases import Trainer

    found = []
    for zero in (0, 3):
        trainer = Trainer(topology, run, {"zero": zero}, model=quantizer, prepare=True)
        found.append({name: digest(value) for name, value in whole_weights(trainer.engine).items()})
    return found[0], found[1]


def batches(topology, steps: int, micro: int) -> list[dict]:
    """A fixed sequence of batches on the device; each rank gets its share of each."""
    rng = torch.Generator().manual_seed(DATA_SEED)
    found = []
    for _ in range(steps):
        whole = {
            "codes": torch.randint(16, (4, 4, 4), generator=rng),
            "facts": torch.randint(5, (4, 1), generator=rng),
            "upper": [torch.randint(16, (4, 2, 2), generator=rng)],
        }
        share = slice(topology.rank * micro, (topology.rank + 1) * micro)
        mine = {k: [u[share] for u in v] if isinstance(v, list) else v[share] for k, v in whole.items()}
        found += on_device([mine], topology.device)
    return found


def trained(topology, kind: str, settings: dict, model: dict | None = None) -> dict:
    """Trains a prior for six steps. Returns the losses, and the held-out bits of the engine's module and of its export."""
    config = EngineConfig(**settings)
    torch.manual_seed(0)
    module = build(lambda: small_prior(kind, **(model or {})), config, 4)
    engine = Engine(module, build_optimizer(module, OptimConfig(lr=1e-2)), config, 4)
    losses = [engine.step([batch], 1e-2, {}, 0.5).metrics["loss"] for batch in batches(topology, 6, engine.micro_batch)]
    (held_out,) = batches(topology, 1, engine.micro_batch)
    with engine.evaluating(), torch.no_grad():
        bits = dist.gather(engine.module(held_out)["bits_B"].tolist())
        with engine.whole_module() as whole:
            assert all(p.shape == shape_of(p) for p in whole.parameters())
            from_whole = dist.gather(whole(held_out)["bits_B"].tolist())
    plain = small_prior(kind).to(topology.device).eval()
    plain.load_state_dict(whole_weights(engine))
    with torch.no_grad():
        exported = dist.gather(plain(held_out)["bits_B"].tolist())
    after = engine.step(batches(topology, 1, engine.micro_batch), 1e-2, {}, 0.5).metrics["loss"]
    return {"losses": [*losses, after], "bits": bits, "from_whole": from_whole, "exported": exported}


def stage_and_export(topology, overrides: list[str], config_path: str) -> dict:
    """Trains the top prior as a stage. Returns its held-out metric, the metric of the loaded export, and its pictures."""
    run_stages(topology, overrides, config_path, ["prior-top"])
    config = experiment.load(config_path, overrides)
    folder = artefact(config, "prior-top")
    net, about = load_prior(folder, topology.device)
    task = PriorTask(config, config.prior("top"), "top", folder, topology)
    with torch.no_grad():
        bits = task.bits(Objective(net).eval(), "val", task.data["val"].all(), 64)
    pictures = sorted(path.name for path in Path(folder, "images").glob("code-map-*"))
    return {"held_out": about["held_out"]["bits_per_token"], "exported": bits, "pictures": pictures}
