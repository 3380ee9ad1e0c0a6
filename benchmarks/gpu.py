"""What a GPU makes of this project: tests, real training, speeds beside other projects. One call takes at most nine minutes.

    python -m benchmarks.gpu OUT [--peers PEERS] [--images DIR --metadata CSV] [--seconds 540] [--rehearse]

Runs the sections below one after another, each in processes of its own and with a time limit. OUT/results.json and
OUT/results.md grow after every section; a second call goes on with the sections that have not succeeded. Pictures are
OUT/*.png.

PEERS is a folder that holds checkouts of other projects: nanoGPT/ (karpathy) and vq-vae-2-pytorch/ (rosinality). transformers
and vector-quantize-pytorch are compared where they are installed. A comparison whose peer is absent is left out, and the table
says so. Without --images the lesions are drawn.

--rehearse runs every section with tiny sizes, also on a CPU: it shows that each section runs, and its figures mean nothing.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TESTS = ("tests/gpu", "tests/unit/test_prefetch.py", "tests/unit/test_graphs.py", "tests/chain/test_device_augment.py")


@dataclass(frozen=True)
class Section:
    """One section of the benchmark.

    Attributes:
        name: Name in the results.
        command: Its output is the section's result.
        seconds: Time limit.
        missing: Peers that are absent, so that the section cannot compare with them.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    missing: tuple[str, ...] = ()


class Peers:
    """The other projects that are present: checkouts and installed packages."""

    def __init__(self, folder: Path | None):
        places = {"nanoGPT": "nanoGPT", "rosinality": "vq-vae-2-pytorch"}
        self.paths = {name: folder / place for name, place in places.items() if folder and (folder / place).is_dir()}
        packages = ("transformers", "vector-quantize-pytorch")
        self.present = set(self.paths) | {p for p in packages if importlib.util.find_spec(p.replace("-", "_"))}

    def option(self, peer: str, flag: str) -> tuple[str, ...]:
        """Returns the command-line option that names a peer's folder, or nothing."""
        return (flag, str(self.paths[peer])) if peer in self.paths else ()

    def missing(self, *names: str) -> tuple[str, ...]:
        """Returns those of the named peers that are absent."""
        return tuple(name for name in names if name not in self.present)


def sections(peers: Peers, images: tuple[str, ...], work: Path, out: Path, tiny: bool) -> list[Section]:
    """Lists the sections, the most telling first.

    Args:
        peers: The peers that are present.
        images: Options that name the images; empty for drawn ones.
        work: Folder for runs.
        out: Folder of the results, for pictures.
        tiny: Whether this is a rehearsal.
    """
    nanogpt, rosinality = peers.option("nanoGPT", "--nanogpt"), peers.option("rosinality", "--peer")
    tokenizer = ("speed", *rosinality, *(("--size", "32", "--batch", "2") if tiny else ("--size", "256", "--batch", "32")))
    tokenizer += ("--number", "1", "--rounds", "1") if tiny else ("--number", "5", "--rounds", "3")
    bf16 = (*tokenizer, "--precision", "bf16")
    feed = ("--number", "24", "--size", "32") if tiny else ("--number", "1500", "--size", "256")
    quick = ("--quick",) if tiny else ()
    prior = ("--number", "1", "--rounds", "1") if tiny else ("--number", "3", "--rounds", "3")
    case, large = ("small", "small") if tiny else ("350m", "1b")
    zero = ("--cases", case, "--stages", "1", "2", "3", "--number", "1", "--rounds", "1")
    found = [
        ("tests", "pytest", ("-q", "-m", "gpu", "-p", "no:cacheprovider", *TESTS), 90, ()),
        ("training", "benchmarks.train_real", (str(work), str(out), *images, *quick), 260, ()),
        ("VQ-VAE-2 step", "benchmarks.tokenizer", bf16, 60, ("rosinality",)),
        ("GPT training", "benchmarks.prior", (*nanogpt, "--cases", case, *prior), 60, ("nanoGPT",)),
        ("sampling", "benchmarks.sampling", ("gpt", *nanogpt, *quick, "--rounds", "1"), 80, ("nanoGPT", "transformers")),
        ("quantizer", "benchmarks.quantizer", quick, 40, ("vector-quantize-pytorch",)),
        ("GPT under ZeRO 1 to 3 on one rank", "benchmarks.prior", zero, 60, ()),
        ("data", "benchmarks.feed", (*images, *feed), 50, ()),
        ("GPT training, 1 billion parameters", "benchmarks.prior", (*nanogpt, "--cases", large, *prior), 60, ("nanoGPT",)),
        # Compiling a model takes minutes.
        ("VQ-VAE-2 step, compiled", "benchmarks.tokenizer", (*bf16, "--compile"), 150, ("rosinality",)),
        ("GPT training, compiled", "benchmarks.prior", (*nanogpt, "--cases", case, "--compile", *prior), 240, ("nanoGPT",)),
    ]
    return [
        Section(name, (sys.executable, "-m", module, *options), seconds, peers.missing(*others))
        for name, module, options, seconds, others in found
    ]


def run_command(command: tuple[str, ...], environment: dict[str, str], limit: float | None) -> tuple[str, str, int]:
    """Runs a command. Returns what it wrote to stdout and stderr, and its exit code.

    After `limit` seconds, or when this process is interrupted, the command is killed with the processes of its session; the
    exit code is then -1.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        output, error = process.communicate(timeout=limit)
        return output, error, process.returncode
    except BaseException as reason:
        os.killpg(process.pid, signal.SIGKILL)
        if not isinstance(reason, subprocess.TimeoutExpired):
            raise
        output, error = process.communicate()
        return output, f"{error}\nstopped after {limit:.0f} s", -1


def run_section(section: Section, environment: dict[str, str], deadline: float) -> dict | None:
    """Runs a section. Returns {"ok", "seconds", "command", "output", "missing"}; None if no time is left.

    Args:
        section: The section.
        environment: Environment variables of its command.
        deadline: Time at which it must end, as time.monotonic() gives it; infinite in a rehearsal, which may run on a slow and
            busy machine and has no limits.
    """
    began = time.monotonic()
    if began > deadline - 10:
        return None
    print(f"{section.name} …", flush=True)
    limit = None if math.isinf(deadline) else min(section.seconds, deadline - began)
    output, error, code = run_command(section.command, environment, limit)
    if code:
        output += "\n" + "\n".join(error.strip().splitlines()[-15:])
    command = " ".join(("python", *section.command[1:]))
    seconds = round(time.monotonic() - began, 1)
    return {"ok": code == 0, "seconds": seconds, "command": command, "output": output.strip(), "missing": section.missing}


def hardware() -> dict[str, str]:
    """Describes this machine."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    facts = {"gpu": gpu, "cpu cores": str(os.cpu_count()), "python": platform.python_version(), "torch": torch.__version__}
    return facts | {"date": time.strftime("%Y-%m-%d")}


def markdown(results: dict) -> str:
    """Returns the results as a page."""
    lines = ["# GPU benchmark", "", ", ".join(f"{key}: {value}" for key, value in results["hardware"].items())]
    if results["rehearsal"]:
        lines += ["", "A rehearsal with tiny sizes. The figures mean nothing."]
    for name, found in results["sections"].items():
        state = "" if found["ok"] else " — failed"
        lines += ["", f"## {name}{state}", "", f"    {found['command']}", ""]
        if found["missing"]:
            lines += [f"Not compared with {', '.join(found['missing'])}: absent on this machine.", ""]
        lines += [found["output"], "", f"{found['seconds']} s"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Parses the command line and runs the sections. Returns 1 if one has failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--peers", type=Path, help="folder with checkouts of other projects")
    parser.add_argument("--images", help="folder of images")
    parser.add_argument("--metadata", help="CSV with the images' labels")
    parser.add_argument("--seconds", type=float, default=540, help="time limit of this call")
    parser.add_argument("--rehearse", action="store_true", help="run every section with tiny sizes, also on a CPU")
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if not arguments.rehearse and not has_gpu:
        parser.error("this machine has no GPU; --rehearse runs every section with tiny sizes on the CPU")
    path = arguments.out / "results.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {"sections": {}}
    if results.get("rehearsal") != arguments.rehearse:
        results["sections"] = {}
    results |= {"hardware": hardware(), "rehearsal": arguments.rehearse}
    environment = os.environ | {"OMP_NUM_THREADS": "1" if arguments.rehearse else "4"}
    environment |= {"LESIONGEN_TEST_GPU": "1"} if has_gpu else {}
    images = ("--images", arguments.images, "--metadata", arguments.metadata) if arguments.images else ()
    work = Path(tempfile.mkdtemp(prefix="lesiongen-gpu-"))
    deadline = math.inf if arguments.rehearse else time.monotonic() + arguments.seconds
    every = sections(Peers(arguments.peers), images, work, arguments.out.resolve(), arguments.rehearse)
    for section in every:
        if results["sections"].get(section.name, {}).get("ok"):
            continue
        found = run_section(section, environment, deadline)
        if found is None:
            print(f"{section.name}: no time left; the same command goes on here")
            continue
        results["sections"][section.name] = found
        print(f"{section.name}: {'done' if found['ok'] else 'FAILED'} in {found['seconds']} s", flush=True)
        path.write_text(json.dumps(results, indent=1))
        (arguments.out / "results.md").write_text(markdown(results))
    shutil.rmtree(work)
    return 0 if len(results["sections"]) == len(every) and all(f["ok"] for f in results["sections"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
