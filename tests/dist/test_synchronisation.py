"""The host waits for the device once in an optimizer step: counted on the CPU, where the same operations run."""

import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpc.config import from_plain
from hpc.train.engine import Engine, EngineConfig
from hpc.train.loop import State
from hpc.train.optim import OptimConfig, build_optimizer
from lesiongen import priors
from lesiongen.experiment import PriorConfig
from lesiongen.priors.objective import Objective
from lesiongen.tokenizers.quantize import QUANTIZERS
from tests.dist import topology_cases as cases

ROOT = Path(__file__).parents[2]
# Operations whose result, or the shape of it, the host needs: on a GPU each waits until the device has come so far.
WAITING = {"_local_scalar_dense", "bincount", "nonzero", "unique", "_unique2", "masked_select", "equal", "is_nonzero"}


class CountWaits(TorchDispatchMode):
    """Counts operations that make the host wait, by who calls them: this project, or DeepSpeed."""

    def __init__(self):
        super().__init__()
        self.ours, self.deepspeed = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])
        )
        if name in WAITING or masks:
            self.note("a boolean index" if masks else name)
        return function(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        for frame in reversed(traceback.extract_stack()[:-2]):
            if "/deepspeed/" in frame.filename:
                self.deepspeed[what] += 1
                return
            if frame.filename.startswith((str(ROOT / "hpc"), str(ROOT / "lesiongen"))):
                self.ours[f"{what} at {Path(frame.filename).name}:{frame.lineno}"] += 1
                return


def one_step(engine: Engine, step) -> dict[str, int]:
    """What waits in one step after a first one, with the accounting of the loop. step() → (Step, metrics after it)."""
    state = State()
    state.account(*step())
    counter, plain = CountWaits(), torch.Tensor.tolist

    def tolist(tensor):
        counter.note("tolist")
        return plain(tensor)

    torch.Tensor.tolist = tolist
    try:
        with counter:
            state.account(*step())
    finally:
        torch.Tensor.tolist = plain
    assert isinstance(state.sums["loss"], float)
    return dict(counter.ours), dict(counter.deepspeed)


def tokenizer_step(topology, run: str, settings: dict, quantizer: dict) -> tuple[dict, dict]:
    trainer = cases.Trainer(topology, run, settings, model=quantizer)

    # Both steps' batches are read first: data workers decode and augment them, in processes of their own.
    loaded = [[next(trainer.batches) for _ in range(trainer.engine.config.accumulation)] for _ in range(2)]
    for batch in (batch for batches in loaded for batch in batches):
        batch.pop("key"), batch.pop("bad")

    def step():
        done = trainer.engine.step(loaded.pop(), 1e-3, {"stop": 0, "bad": 0}, 0.5)
        return done, trainer.task.after_step(trainer.module, done.statistics)

    return one_step(trainer.engine, step)


def prior_step(topology, kind: str, settings: dict) -> tuple[dict, dict]:
    small = {"kind": kind, "layers": 2, "width": 32} | ({"heads": 2} if kind in ("gpt", "pixelsnail") else {})
    config = from_plain(PriorConfig, {"model": small}).model
    net = priors.make(config, grid=(4, 4), entries=16, facts={"label": 5}, upper=((16, (2, 2)),))
    module = Objective(net)
    engine = Engine(module, build_optimizer(module, OptimConfig()), EngineConfig(**settings), 4)
    batch = {"codes": torch.zeros(4, 4, 4, dtype=torch.long), "facts": torch.zeros(4, 1, dtype=torch.long)}
    batch["upper"] = [torch.zeros(4, 2, 2, dtype=torch.long)]
    return one_step(engine, lambda: (engine.step([batch], 1e-3, {"stop": 0, "bad": 0}), {}))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_tokenizers_wait_once_a_step(pools, packed, zero):
    ours, deepspeed = pools(1).run(tokenizer_step, str(packed), {"zero": zero, "average": 1.0}, {})[0]
    assert sum(ours.values()) == 1, ours
    print(f"ZeRO {zero}: DeepSpeed's own {deepspeed}")


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("estimator", ["straight-through", "rotation"])
def test_every_quantizer_waits_once_a_step(pools, packed, quantizer, estimator):
    if quantizer == "fsq" and estimator == "rotation":
        pytest.skip("fsq has no estimator")
    model = {"quantizer": quantizer, "estimator": estimator}
    model |= {"entries": 27, "fsq_levels": (3, 3, 3)} if quantizer == "fsq" else {}
    ours, _ = pools(1).run(tokenizer_step, str(packed), {"zero": 0}, model)[0]
    assert sum(ours.values()) == 1, ours


@pytest.mark.parametrize("kind", priors.PRIORS)
def test_every_prior_waits_once_a_step(pools, kind):
    ours, _ = pools(1).run(prior_step, kind, {"zero": 0})[0]
    assert sum(ours.values()) == 1, ours


def waiting(topology) -> dict[str, int]:
    from lesiongen.tokenizers.kmeans import kmeans

    with CountWaits() as counter:
        kmeans(torch.rand(64, 2), 4)
    return dict(counter.ours)


def test_what_waits_is_found(pools):
    """k-means reads counts at each of its iterations, before training."""
    assert sum(pools(1).run(waiting)[0].values()) > 10
