"""Sampling speed of our priors compared with nanoGPT, transformers and rosinality's PixelSNAIL: seconds per batch.

    git clone https://github.com/karpathy/nanoGPT NANOGPT
    git clone https://github.com/rosinality/vq-vae-2-pytorch PEER
    pip install --target HF transformers        (not a dependency of the project)
    OMP_NUM_THREADS=1 PYTHONPATH=HF python -m benchmarks.sampling --nanogpt NANOGPT --peer PEER

GPT: 1,280 tokens of a 32×40 grid, six layers of width 384. It is compared with nanoGPT's generate(), which computes the prefix
again for each token, and with GPT-2 of transformers, which has a key-value cache.

Convolutional priors: 32×32 tokens. They are compared with the usual sampler, which runs the whole net for each token:
rosinality's over the rows so far, and our own nets over the whole grid.

Ours and transformers sample all tokens. A sampler that starts again for each token is too slow for this. It is timed at a few
prefix lengths, a parabola is fitted to the times and summed over all tokens, and the table says "estimated". The weights are
untrained, because no sampler's speed depends on what it samples. Every round times all contenders; the tables have medians of
the times and of the ratios within rounds.
"""

import argparse
import importlib.util
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.prior import Case, load_nanogpt, their_net
from benchmarks.timing import DEVICE, timed
from lesiongen.priors import make
from lesiongen.priors.cuda_graphs import GraphedFunction
from lesiongen.priors.gated_pixelcnn import GatedPixelCNNConfig
from lesiongen.priors.gpt import GPTConfig
from lesiongen.priors.pixelcnn import PixelCNNConfig
from lesiongen.priors.pixelsnail import PixelSNAILConfig
from lesiongen.priors.prior import BasePriorConfig, Prior
from lesiongen.priors.sampling import TokenChooser, uniform_numbers

ENTRIES, CHANNELS = 512, 128
Timer = Callable[[], float]  # seconds of one batch


def reckoned(work: Callable[[int], object], points: list[int], last: int, times: int = 1) -> float:
    """Estimates the seconds of work(1) + … + work(last), each called `times` times, from a few calls.

    The time of attention over a prefix is a quadratic function of its length. So a parabola is fitted to the times.

    Args:
        work: The function; its argument is the length of the prefix.
        points: Lengths at which it is timed.
        last: The largest length.
        times: Calls at each length.
    """
    seconds = [timed(lambda n=n: work(n)) for n in points]
    found = np.polynomial.Polynomial.fit(points, seconds, min(2, len(points) - 1))
    return float(found(np.arange(1, last + 1)).sum()) * times


def blank(net: Prior, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns facts [B, 1] and uniform random numbers [B, T] for a batch."""
    return torch.zeros(batch, 1, dtype=torch.long, device=DEVICE), uniform_numbers(0, range(batch), net.grid).to(DEVICE)


def our_net(config: BasePriorConfig, grid: tuple[int, int]) -> Prior:
    """Builds one of our priors with random weights."""
    torch.manual_seed(0)
    return make(config, grid=grid, entries=ENTRIES, facts={"label": 7}).to(DEVICE).eval()


def ours(name: str, net: Prior, batch: int) -> dict[str, Timer]:
    """Returns the timers of our sampler; on a GPU also one that uses a CUDA graph."""
    facts, numbers = blank(net, batch)

    def sample(facts: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return net.sample(facts, [], numbers, TokenChooser())

    timers = {name: lambda: timed(lambda: sample(facts, numbers))}
    if DEVICE.type == "cuda":
        recorded = GraphedFunction(sample)
        for _ in range(2):  # the first call is a plain one, the second records the graph
            graphed = recorded(facts, numbers)
        assert torch.equal(graphed, sample(facts, numbers)), "the CUDA graph samples other codes"
        timers[f"{name}, CUDA graph"] = lambda: timed(lambda: recorded(facts, numbers))
    return timers


def whole_grid(net: Prior, batch: int) -> Timer:
    """Returns a timer of the usual sampler on our own net. It times one token, because each token costs the same."""
    facts, numbers = blank(net, batch)
    codes, choose = torch.zeros(batch, net.length, dtype=torch.long, device=DEVICE), TokenChooser()

    @torch.no_grad()
    def token(t: int) -> None:
        features = net.features(codes, net.context(facts, []))
        codes[:, t - 1] = choose(net.head(features[:, t - 1]), numbers[:, t - 1])

    return lambda: timed(lambda: token(1)) * net.length


def nanogpt(folder: Path, case: Case) -> Timer:
    """Returns a timer of nanoGPT's generate()."""
    net = their_net(case, load_nanogpt(folder)).to(DEVICE).eval()
    codes = torch.randint(ENTRIES, (case.batch, case.length), device=DEVICE)
    points = [1 + i * (case.length - 1) // 4 for i in range(5)]
    return lambda: reckoned(lambda n: net.generate(codes[:, :n], 1), points, case.length)


def gpt2(case: Case) -> Timer:
    """Returns a timer of transformers' generate(). Without an end-of-text token it always samples all tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    shape = {"n_layer": case.layers, "n_head": case.heads, "n_embd": case.width, "n_positions": case.length + 1}
    config = GPT2Config(vocab_size=ENTRIES, bos_token_id=0, eos_token_id=None, **shape)
    net = GPT2LMHeadModel(config).to(DEVICE).eval()
    start = torch.zeros(case.batch, 1, dtype=torch.long, device=DEVICE)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True, "pad_token_id": 0}

    def generate() -> None:
        found = net.generate(start, max_new_tokens=case.length, **how)
        assert found.shape == (case.batch, case.length + 1), found.shape

    return lambda: timed(generate)


def rosinality(peer: Path, grid: tuple[int, int], batch: int) -> tuple[Timer, int]:
    """Returns a timer of rosinality's PixelSNAIL, and the net's number of parameters."""
    sys.path.insert(0, str(peer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their weight_norm is deprecated
        import pixelsnail

        net = pixelsnail.PixelSNAIL(grid, ENTRIES, CHANNELS, 5, 4, 4, CHANNELS).to(DEVICE).eval()
    codes = torch.zeros(batch, *grid, dtype=torch.long, device=DEVICE)

    @torch.no_grad()
    def token(rows: int) -> None:
        """Samples one token as their sample.py does, from a pass over the rows so far."""
        logits, _ = net(codes[:, :rows])
        torch.multinomial(logits[:, :, rows - 1, 0].softmax(1), 1)

    points = [1, grid[0] // 2, grid[0]]
    return lambda: reckoned(token, points, grid[0], times=grid[1]), size(net)


def size(net: torch.nn.Module) -> int:
    """Returns the number of parameters."""
    return sum(p.numel() for p in net.parameters())


def compare(title: str, contenders: dict[str, Timer], rounds: int, tokens: int) -> None:
    """Times all contenders and prints a table. Ratios are a contender's time over ours.

    Args:
        title: Title of the table.
        contenders: Timers by name, ours first.
        rounds: How often each contender is timed.
        tokens: Tokens of a batch.
    """
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, timer in contenders.items():
            found.setdefault(name, []).append(timer())
    print(f"\n{title}; {rounds} rounds, {torch.get_num_threads()} threads, {DEVICE}\n")
    print("| | seconds | tokens/s | time ÷ ours |\n|---|---|---|---|")
    first = next(iter(found.values()))
    for name, seconds in found.items():
        middle = statistics.median(seconds)
        ratio = statistics.median(b / a for a, b in zip(first, seconds, strict=True))
        print(f"| {name} | {middle:,.1f} | {tokens / middle:,.1f} | {ratio:.2f} |", flush=True)


def gpt(args: argparse.Namespace) -> None:
    """Prints the table of GPT priors."""
    case = Case((4, 8), args.batch, layers=2) if args.quick else Case((32, 40), args.batch)
    net = our_net(GPTConfig(layers=case.layers, width=case.width, heads=case.heads), case.grid)
    contenders = ours("ours", net, case.batch)
    if importlib.util.find_spec("transformers"):
        contenders["transformers, GPT-2 with its cache"] = gpt2(case)
    if args.nanogpt:
        contenders["nanoGPT, generate(), estimated from 5 prefixes"] = nanogpt(args.nanogpt, case)
    title = f"GPT: {case.length:,} tokens × {case.batch}, {case.layers} layers, width {case.width}, K {ENTRIES}"
    compare(title, contenders, args.rounds, case.length * case.batch)


def convolutional(args: argparse.Namespace) -> None:
    """Prints a table for each convolutional prior."""
    grid = (4, 8) if args.quick else (32, 32)
    kinds = {
        "PixelCNN": PixelCNNConfig(),
        "Gated PixelCNN": GatedPixelCNNConfig(),
        "PixelSNAIL": PixelSNAILConfig(width=176),
    }
    for name, config in kinds.items():
        net = our_net(config, grid)
        contenders = ours(f"ours ({size(net) / 1e6:.1f} M)", net, args.batch)
        contenders["the same net, whole grid for each token, estimated from 1"] = whole_grid(net, args.batch)
        if name == "PixelSNAIL" and args.peer:
            timer, number = rosinality(args.peer, grid, args.batch)
            contenders[f"rosinality's ({number / 1e6:.1f} M), rows so far, estimated from 3"] = timer
        title = f"{name}: {grid[0]}×{grid[1]} × {args.batch}, K {ENTRIES}"
        compare(title, contenders, args.rounds, net.length * args.batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", choices=["all", "gpt", "convolutional"], default="all")
    parser.add_argument("--nanogpt", type=Path, help="folder that holds nanoGPT's model.py")
    parser.add_argument("--peer", type=Path, help="folder that holds rosinality's pixelsnail.py")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of small grids, to check that everything runs")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 1
    for name, work in {"gpt": gpt, "convolutional": convolutional}.items():
        if args.what in (name, "all"):
            work(args)


if __name__ == "__main__":
    main()
