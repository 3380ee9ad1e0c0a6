"""Memory and speed of a prior on several ranks: what each rank holds at build, step, evaluation, save, export and resume.

    python -m benchmarks.scale [--parameters 200] [--ranks 4] [--stages 0 3] [--folder FOLDER]

Ranks are processes on this machine, joined by gloo, under ZeRO 0 and ZeRO 3. They run the project's own training: Trainer,
PriorTask, checkpoints and export, on codes drawn at random. Memory is the high-water mark of resident pages in each phase,
above the size of the process before the model is built, and is printed as a multiple of the weights. "whole" is the share of
the weights that was whole on one rank at one time. Fails if a peak of ZeRO 3 is above BAR times what ZeRO 0 takes for weights,
gradients and moments together, or if a rank holds all weights.

A second table compares the peaks with those that `lesiongen plan` computes, and fails if one is off by more than TOLERANCE. A
third has, by the same computation, a prior of 7 B parameters on 512 GPUs. The last has tokens a second at 1, 2 and 4 ranks,
each rank with the same batch of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.resident import FREE_AT_ONCE, Resident
from hpc import dist
from hpc.data import manifest
from hpc.data.codestore import code_dtype, file_name, write_codes
from hpc.run.rundir import StageDir
from hpc.train import checkpoint
from hpc.train.engine import Engine, EngineConfig, build
from hpc.train.loop import TrainConfig, Trainer
from hpc.train.memory import ModelSize, device_bytes, host_bytes, peak_activations
from hpc.train.optim import OptimConfig, build_optimizer
from lesiongen.experiment import DataConfig, Experiment, PriorConfig
from lesiongen.priors import make
from lesiongen.priors.gpt import GPTConfig
from lesiongen.priors.objective import Objective, blank_batch
from lesiongen.stages.prior import PriorTask

BAR = 0.45  # largest peak of ZeRO 3 on four ranks, as a share of weights, gradients and moments of ZeRO 0
BARRED = ("build", "evaluation", "save", "export")  # phases that BAR holds for; a step also has activations
TOLERANCE = 0.15  # largest relative difference between planned and measured peaks
ENTRIES, IMAGES, SIDE = 512, 48, 8  # of the random codes
SPEED_MILLIONS = 10  # parameters of the model whose speed is measured
PHASES = ("build", "step", "evaluation", "save", "export", "resume")


def model_of(millions: float) -> GPTConfig:
    """Returns a GPT of about this many parameters."""
    width = 1024 if millions >= 50 else 256
    return GPTConfig(layers=max(1, round(millions * 1e6 / (12 * width**2))), width=width, heads=width // 64, dropout=0.0)


def write_random_codes(folder: Path, side: int) -> None:
    """Writes a finished code store of one level with random codes."""
    StageDir(folder, {}, {}).begin()
    rng, entries = np.random.default_rng(0), []
    for split in ("train", "val"):
        columns = {"codes.top": rng.integers(ENTRIES, size=(IMAGES, side, side)).astype(code_dtype(ENTRIES))}
        columns |= {"label": rng.integers(7, size=IMAGES).astype(np.int16), "index": np.arange(IMAGES)}
        write_codes(folder, split, 0, 0, columns)
        path = folder / file_name(split, 0, 0)
        entries.append(manifest.describe(path, split=split, draw=0, shard=0, set=0, count=IMAGES))
    content = {"tokenizer": "none", "image_shards": "none", "splits": ["train", "val"], "draws": 1}
    content |= {"levels": [{"name": "top", "grid": [side, side], "K": ENTRIES, "dtype": "uint16", "depth": 1}]}
    content |= {"vocabularies": {"label": list("abcdefg")}, "counts": {"train": IMAGES, "val": IMAGES}}
    content |= {"licences": {}, "attributions": {}, "sources": {}, "shards": entries}
    StageDir(folder, {}, {}).finish(manifest.write(folder, content))


def configure(folder: Path, millions: float, zero: int, ranks: int) -> tuple[Experiment, PriorConfig]:
    """Returns the run's config and that of its only prior. Each rank has one sample a step."""
    engine = EngineConfig(zero=zero, gather_gib=0.0)
    train = TrainConfig(samples=10**9, batch=ranks, engine=engine, eval_every=10**9, save_every=10**9, log_every=10**9)
    prior = PriorConfig(model=model_of(millions), train=train, facts=("label",))
    return Experiment(name="scale", runs=str(folder), data=DataConfig(images="none")), prior


def trainer_of(folder: Path, millions: float, zero: int, topology: dist.Topology, start: Path | None) -> Trainer:
    """Builds the trainer as the prior stage does."""
    config, prior = configure(folder, millions, zero, topology.world_size)
    stage = folder / f"zero-{zero}"
    task = PriorTask(config, prior, "top", stage, topology)
    task.picture = SimpleNamespace(draw=lambda net: {})  # there is no tokenizer that could decode samples of random codes
    return Trainer(task, prior.train, stage, topology, 0, "scale", start, False)


def load_libraries(zero: int, ranks: int) -> None:
    """Trains a tiny prior for one step, so that the libraries that this loads are not counted as memory of the large one."""
    shape = {"grid": (2, 2), "entries": 4, "facts": {}, "upper": ()}
    config = EngineConfig(zero=zero)
    module = build(lambda: Objective(make(GPTConfig(layers=1, width=16, heads=2), **shape)), config, ranks)
    engine = Engine(module, build_optimizer(module, OptimConfig()), config, ranks)
    engine.step([blank_batch(shape, 1)], 1e-3, {})


def measure(folder: Path, millions: float, zero: int, resume: bool) -> dict:
    """Runs the phases on this rank. Returns {"peaks", "whole", "weights"} in bytes."""
    topology = dist.detect()
    dist.init(topology)
    load_libraries(zero, topology.world_size)
    folder_of_checkpoints = folder / f"zero-{zero}" / "checkpoints"
    resident = Resident()
    if resume:
        with resident.phase("resume"):
            trainer = trainer_of(folder, millions, zero, topology, checkpoint.newest_sound(folder_of_checkpoints))
    else:
        with resident.phase("build"):
            trainer = trainer_of(folder, millions, zero, topology, None)
    with trainer, resident.phase("resume" if resume else "step"):
        for _ in range(1 if resume else 2):
            trainer.step([next(trainer.batches)], stop=False)
    if not resume:
        with resident.phase("save"):
            trainer.save()
        with resident.phase("evaluation"), trainer.engine.evaluating():
            metrics, _ = trainer.task.evaluate(trainer.engine)
        with resident.phase("export"), trainer.engine.evaluating():
            trainer.task.export(trainer.engine.weights, metrics)
    weights = 4 * sum(shape.numel() for shape in trainer.engine.weights.shapes().values())
    dist.leave()
    return {"peaks": resident.peaks, "whole": resident.whole, "weights": weights}


def tokens_per_second(folder: Path, millions: float, zero: int, steps: int = 6) -> dict:
    """Times training steps on all ranks. Returns {"rate": tokens a second over all ranks}."""
    topology = dist.detect()
    dist.init(topology)
    trainer = trainer_of(folder, millions, zero, topology, None)
    with trainer:
        trainer.step([next(trainer.batches)], stop=False)
        dist.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            trainer.step([next(trainer.batches)], stop=False)
        dist.barrier()
        seconds = time.perf_counter() - began
    dist.leave()
    return {"rate": steps * topology.world_size * trainer.task.tokens_per_sample / seconds}


def on_ranks(folder: Path, ranks: int, *arguments: str) -> list[dict]:
    """Runs this file on several ranks. Returns each rank's result. Raises RuntimeError if a rank fails."""
    port = str(20_000 + os.getpid() % 10_000)
    common = os.environ | FREE_AT_ONCE | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(ranks):
        command = [sys.executable, "-m", "benchmarks.scale", "--rank-result", str(folder / f"result-{rank}.json")]
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen([*command, "--folder", str(folder), *arguments], env=environment))
    if any([process.wait() for process in processes]):
        raise RuntimeError(f"a rank failed: {arguments}")
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(ranks)]


def peaks_of(folder: Path, ranks: int, millions: float, zero: int) -> dict:
    """Returns the largest figures of all ranks, as multiples of the weights: {"peaks": {phase: …}, "whole": {phase: …}}."""
    sizes = ("--parameters", str(millions), "--zero", str(zero))
    results = on_ranks(folder, ranks, *sizes) + on_ranks(folder, ranks, *sizes, "--resume")
    return {
        kind: {phase: max(r[kind][phase] / r["weights"] for r in results if phase in r[kind]) for phase in PHASES}
        for kind in ("peaks", "whole")
    }


def print_peaks(found: dict[int, dict], ranks: int) -> bool:
    """Prints the table of peaks and returns whether ZeRO 3 stays below its bar."""
    print(f"\nLargest peak of {ranks} ranks, in multiples of the fp32 weights")
    print(f"{'phase':12}{'ZeRO 0':>8}{'ZeRO 3':>8}{'÷ ZeRO 0':>10}{'÷ 4 weights':>13}{'whole':>8}")
    passed = True
    for phase in PHASES:
        zero0, zero3, whole = found[0]["peaks"][phase], found[3]["peaks"][phase], found[3]["whole"][phase]
        passed &= (zero3 / 4 <= BAR or phase not in BARRED) and whole < 1
        print(f"{phase:12}{zero0:8.2f}{zero3:8.2f}{zero3 / zero0:10.2f}{zero3 / 4:13.2f}{whole:8.2f}")
    print(f"weights, gradients and moments of ZeRO 0 are 4 times the weights; bar {BAR} for {', '.join(BARRED)}")
    return passed


def size_of(model: GPTConfig, side: int) -> ModelSize:
    """Returns what the memory of training this model with one sample on each rank depends on."""
    shape = {"grid": (side, side), "entries": ENTRIES, "facts": {"label": 7}, "upper": ()}

    def make_step() -> tuple[Objective, dict]:
        return Objective(make(model, **shape)), blank_batch(shape, 1)

    with torch.device("meta"):
        parameters = tuple(p.numel() for p in make(model, **shape).parameters())
    return ModelSize(parameters, peak_activations(make_step), peak_activations(make_step, training=False))


def print_plan(found: dict[int, dict], ranks: int, millions: float) -> bool:
    """Prints planned over measured peaks and returns whether all are within TOLERANCE."""
    size, passed = size_of(model_of(millions), SIDE), True
    print("\nPlanned ÷ measured")
    print(f"{'phase':12}" + "".join(f"{f'ZeRO {zero}':>8}" for zero in found))
    planned = {zero: device_bytes(size, EngineConfig(zero=zero), ranks, gloo=ranks > 1) for zero in found}
    for phase in ("build", "step", "evaluation", "save", "export"):
        name = "start" if phase == "build" else phase
        ratios = [planned[zero][name] / size.weights / found[zero]["peaks"][phase] for zero in found]
        passed &= all(abs(ratio - 1) <= TOLERANCE for ratio in ratios)
        print(f"{phase:12}" + "".join(f"{ratio:8.2f}" for ratio in ratios))
    return passed


def print_seven_billion() -> None:
    """Prints the planned memory of a prior of 7 B parameters on 512 GPUs."""
    size = size_of(GPTConfig(layers=32, width=4096, heads=32, checkpoint=True), 64)
    config = EngineConfig(zero=3)
    device, host = device_bytes(size, config, 512), host_bytes(size, config, 512)
    print(f"\n{sum(size.parameters) / 1e9:.1f} B parameters, 4,096 tokens, ZeRO 3 on 512 GPUs, by computation: GiB of a rank")
    print(f"{'phase':12}{'GPU':>8}{'host':>8}")
    for phase in host:
        print(f"{phase:12}{device.get(phase, 0) / 2**30:8.2f}{host[phase] / 2**30:8.2f}")


def print_speed(folder: Path, millions: float) -> None:
    """Prints tokens a second at 1, 2 and 4 ranks, and the efficiency: the speed over that of as many single ranks."""
    device = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print(f"\nTokens a second, {millions:g} M parameters, one sample a rank, {device}")
    print(f"{'ranks':>5}{'ZeRO 0':>10}{'efficiency':>12}{'ZeRO 3':>10}{'efficiency':>12}")
    single: dict[int, float] = {}
    for ranks in (1, 2, 4):
        if torch.cuda.is_available() and ranks > torch.cuda.device_count():
            break
        cells = ""
        for zero in (0, 3):
            rate = on_ranks(folder, ranks, "--parameters", str(millions), "--zero", str(zero), "--speed")[0]["rate"]
            single.setdefault(zero, rate)
            cells += f"{rate:10.0f}{rate / single[zero] / ranks:12.2f}"
        print(f"{ranks:5}{cells}", flush=True)


def main() -> int:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=200, help="millions of parameters")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where checkpoints and exports are written")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 3], help="ZeRO stages to measure")
    parser.add_argument("--zero", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--speed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank-result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_result:
        sizes = arguments.folder, arguments.parameters, arguments.zero
        result = tokens_per_second(*sizes) if arguments.speed else measure(*sizes, arguments.resume)
        arguments.rank_result.write_text(json.dumps(result))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write_random_codes(Path(folder) / "scale" / "codes", SIDE)
        found = {zero: peaks_of(Path(folder), arguments.ranks, arguments.parameters, zero) for zero in arguments.stages}
        passed = print_peaks(found, arguments.ranks) if {0, 3} <= set(found) else True
        passed &= print_plan(found, arguments.ranks, arguments.parameters)
        print_seven_billion()
        print_speed(Path(folder), SPEED_MILLIONS)
        return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
