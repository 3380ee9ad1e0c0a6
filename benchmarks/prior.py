"""Training speed of our GPT prior compared with nanoGPT: tokens a second through forward, backward and AdamW.

    git clone https://github.com/karpathy/nanoGPT NANOGPT
    OMP_NUM_THREADS=1 python -m benchmarks.prior [--nanogpt NANOGPT] [--compile] [--stages 1 2 3]

Both nets have the same length, vocabulary, layers, width and heads, no biases and no dropout. Their numbers of non-embedding
parameters agree within 1 %. Ours has SwiGLU and 2-D rotary positions, theirs GELU and learned positions. Each uses its own
project's optimizer. "engine" is ours as shipped: through DeepSpeed, with clipping and a check of every gradient.

Each contender has a process of its own. Ours use our trainers' settings of the allocator; nanoGPT is timed without and with
them. Every round times all contenders; the table has medians of the times and of the ratios within rounds. Precision is fp32
on the CPU. On a GPU it is bf16 autocast for all contenders, there is also a prior of 350 M parameters, and the table has MFU
where the device's peak is known.
"""

import argparse
import contextlib
import importlib.util
import io
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from benchmarks.timing import DEVICE, Apart, warm_up
from hpc import dist
from hpc.dist import Topology
from hpc.train.engine import Engine, EngineConfig, build
from hpc.train.flops import peak_flops, training_flops
from hpc.train.optim import OptimConfig, build_optimizer
from lesiongen.priors import make
from lesiongen.priors.gpt import GPTConfig
from lesiongen.priors.objective import Objective

PRECISION = "bf16" if DEVICE.type == "cuda" else "fp32"
OPTIM = OptimConfig(lr=3e-4, weight_decay=0.1)


@dataclass(frozen=True)
class Case:
    """Sizes of both nets, and the batch."""

    grid: tuple[int, int]
    batch: int
    layers: int = 6
    width: int = 384
    heads: int = 6
    entries: int = 512

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return self.grid[0] * self.grid[1]


CASES = {
    "small": Case((16, 16), 8, layers=4, width=192, heads=3),
    "medium": Case((32, 32), 2),
    "350m": Case((32, 32), 16, layers=24, width=1024, heads=16),
    "1b": Case((32, 32), 8, layers=20, width=2048, heads=16),
}


def our_net(case: Case) -> Objective:
    """Builds our GPT with its training loss."""
    config = GPTConfig(layers=case.layers, width=case.width, heads=case.heads, dropout=0.0)
    return Objective(make(config, grid=case.grid, entries=case.entries, facts={"label": 7}))


def their_net(case: Case, module: ModuleType) -> nn.Module:
    """Builds nanoGPT's GPT. module: nanoGPT's model.py, from load_nanogpt()."""
    shape = {"n_layer": case.layers, "n_head": case.heads, "n_embd": case.width, "dropout": 0.0, "bias": False}
    with contextlib.redirect_stdout(io.StringIO()):  # its constructor prints its size
        return module.GPT(module.GPTConfig(block_size=case.length, vocab_size=case.entries, **shape))


def load_nanogpt(folder: Path) -> ModuleType:
    """Imports nanoGPT's model.py from a folder."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def non_embedding(net: nn.Module, entries: int) -> int:
    """Counts the parameters without embeddings and head. nanoGPT ties token embedding and head, ours does not."""
    matrices = {id(m.weight): m.weight.numel() for m in net.modules() if isinstance(m, nn.Embedding)}
    matrices |= {id(m.weight): m.weight.numel() for m in net.modules() if isinstance(m, nn.Linear) and len(m.weight) == entries}
    return sum(p.numel() for p in net.parameters()) - sum(matrices.values())


def blank(case: Case) -> dict:
    """Returns a batch with random codes, on the default device."""
    codes = torch.randint(case.entries, (case.batch, *case.grid))
    return {"codes": codes, "facts": torch.zeros(case.batch, 1, dtype=torch.long), "upper": []}


def plain_step(net: nn.Module, loss_of: Callable, optimizer: torch.optim.Optimizer) -> Callable[[dict], None]:
    """Returns a training step in plain PyTorch.

    Args:
        net: The model.
        loss_of: Maps (net, batch) to the loss.
        optimizer: Optimizer of the model's parameters.
    """

    def step(batch: dict) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=PRECISION == "bf16"):
            loss = loss_of(net, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(case: Case, compiled: bool = False) -> Callable[[dict], None]:
    """Returns a training step of our net in plain PyTorch."""
    torch.manual_seed(0)
    net = our_net(case).to(DEVICE)
    forward = torch.compile(net) if compiled else net
    return plain_step(forward, lambda net, batch: net(batch)["loss"], build_optimizer(net, OPTIM))


def engine(case: Case, compiled: bool = False, zero: int = 0) -> Callable[[dict], object]:
    """Returns a training step of our net under our engine."""
    torch.manual_seed(0)
    dist.init(Topology())
    config = EngineConfig(compile=compiled, precision=PRECISION, zero=zero)
    net = build(lambda: our_net(case), config, case.batch)
    made = Engine(net, build_optimizer(net, OPTIM), config, case.batch)
    return lambda batch: made.step([batch], OPTIM.lr, {"stop": 0})


def theirs(case: Case, compiled: bool = False, *, folder: Path) -> Callable[[dict], None]:
    """Returns a training step of nanoGPT. folder: that of its model.py."""
    torch.manual_seed(0)
    net = their_net(case, load_nanogpt(folder)).to(DEVICE)
    with contextlib.redirect_stdout(io.StringIO()):
        adamw = net.configure_optimizers(OPTIM.weight_decay, OPTIM.lr, OPTIM.betas, DEVICE.type)

    def loss_of(net: nn.Module, batch: dict) -> torch.Tensor:
        return net(batch["codes"].flatten(1), batch["codes"].flatten(1))[1]

    return plain_step(torch.compile(net) if compiled else net, loss_of, adamw)


def contender(make: Callable, case: Case) -> dict[str, Callable[[], object]]:
    """Builds a contender and returns the function to time, "step"; runs in the contender's process."""
    torch.set_float32_matmul_precision("high")  # as in nanoGPT's train.py; on a CPU, fp32 stays fp32
    step = make(case)
    batch = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in blank(case).items()}
    return {"step": lambda: step(batch)}


def flops(case: Case, module: ModuleType | None) -> dict[str, int]:
    """Counts the floating-point operations of a training step, for our net and, if it is present, nanoGPT's."""
    with torch.device("meta"):
        batch = blank(case)
        mine, codes = our_net(case).eval(), batch["codes"].flatten(1)
        found = {"ours": training_flops(lambda: mine(batch)["loss"])}
        if module:
            other = their_net(case, module)
            found["nanoGPT"] = training_flops(lambda: other(codes, codes)[1])
    return found


def contender_kinds(args: argparse.Namespace) -> dict[str, tuple[Callable, bool]]:
    """Returns what is timed: name → (function that builds the step, whether the process keeps freed memory)."""
    kinds: dict[str, tuple[Callable, bool]] = {"ours": (ours, True), "ours, engine": (engine, True)}
    their = partial(theirs, folder=args.nanogpt)
    if args.nanogpt:
        kinds["nanoGPT"] = their, False
    if args.compile:
        kinds |= {f"{kind}, compiled": (partial(make, compiled=True), keep) for kind, (make, keep) in kinds.items()}
    if args.nanogpt and DEVICE.type == "cpu":
        kinds["nanoGPT, our allocator"] = their, True
    kinds |= {f"ours, ZeRO {zero}": (partial(engine, zero=zero), True) for zero in args.stages}
    if unknown := set(args.only) - set(kinds):
        raise SystemExit(f"--only: no row is called {', '.join(sorted(unknown))}; the rows are {', '.join(kinds)}")
    return {kind: made for kind, made in kinds.items() if kind in (args.only or kinds)}


def measure(name: str, args: argparse.Namespace) -> None:
    """Times all contenders of one case and prints its table."""
    case = CASES[name]
    module = load_nanogpt(args.nanogpt) if args.nanogpt else None
    with torch.device("meta"):
        sizes = {"ours": non_embedding(our_net(case), case.entries)}
        if module:
            sizes["nanoGPT"] = non_embedding(their_net(case, module), case.entries)
            assert abs(sizes["ours"] / sizes["nanoGPT"] - 1) < 0.01, sizes
    kinds = contender_kinds(args)
    contenders = {kind: Apart(partial(contender, make, case), keep) for kind, (make, keep) in kinds.items()}
    warm_up(contenders, "step")
    found: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for kind, each in contenders.items():
            found.setdefault(kind, []).append(each.timed("step", args.number))
    print(
        f"\n{name}: {case.length:,} tokens, batch {case.batch}, {case.layers} layers, width {case.width}, K {case.entries}, ",
        end="",
    )
    print(f"{PRECISION}; {args.rounds} rounds of {args.number} steps, {torch.get_num_threads()} threads, {DEVICE}")
    print("non-embedding parameters: " + ", ".join(f"{who} {number:,}" for who, number in sizes.items()) + "\n")
    first = "nanoGPT" if "nanoGPT" in found else "ours, engine"
    print(f"| | ms per step | tokens/s | ÷ {first} | MFU |\n|---|---|---|---|---|")
    work, peak = flops(case, module), peak_flops(DEVICE)
    for kind, seconds in found.items():  # compiled contenders are compared with nanoGPT compiled, the others with it as it is
        peer = found.get(f"{first}, compiled" if "compiled" in kind else first)
        ratio = f"{statistics.median(b / a for a, b in zip(seconds, peer, strict=True)):.2f}" if peer else "–"
        middle = statistics.median(seconds)
        mfu = f"{work[kind.split(',')[0]] / middle / peak:.1%}" if peak else "–"
        row = f"{middle * 1e3:.1f} | {case.batch * case.length / middle:,.0f} | {ratio} | {mfu}"
        print(f"| {kind} | {row} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nanogpt", type=Path, help="folder that holds nanoGPT's model.py")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: small and medium; on a GPU also 350m")
    parser.add_argument("--only", nargs="+", default=[], help="time only these rows of the table")
    parser.add_argument("--stages", type=int, nargs="+", default=[], help="also time our engine under these ZeRO stages")
    parser.add_argument("--compile", action="store_true", help="also time all contenders with torch.compile")
    parser.add_argument("--number", type=int, default=3, help="steps timed in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round of the small case, to check that everything runs")
    args = parser.parse_args()
    cases = args.cases or ["small", "medium"] + ["350m"] * (DEVICE.type == "cuda")
    if args.quick:
        cases, args.number, args.rounds = ["small"], 1, 1
    for name in cases:
        measure(name, args)


if __name__ == "__main__":
    main()
