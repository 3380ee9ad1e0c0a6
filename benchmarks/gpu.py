"""What a GPU makes of this project, in one call: tests, speeds beside other projects, real training. At most six minutes.

    python -m benchmarks.gpu OUT [--peers PEERS] [--images DIR --metadata CSV] [--rehearse]

Runs the sections below one after another, each in processes of its own and with a time limit. OUT/results.json and
OUT/results.md grow after every section; a second call skips the sections that have succeeded. Pictures are OUT/*.png.

PEERS is a folder that holds checkouts of other projects: nanoGPT/ (karpathy), vq-vae-2-pytorch/ (rosinality) and hf/ (the
target of `pip install --target hf transformers`). A comparison whose peer is absent is left out, and the table says so. Without
--images the lesions are drawn.

--rehearse runs every section with tiny sizes, also on a CPU, in about two minutes: it shows that each section runs, and its
figures mean nothing.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PYTHON = (sys.executable, "-m")
TOTAL_SECONDS = 355  # of one call


@dataclass(frozen=True)
class Section:
    """One section of the benchmark.

    Attributes:
        name: Name in the results.
        commands: Commands that run one after another. Their output is the section's result.
        seconds: Time limit of each command.
        missing: Peers that are absent, so that the section cannot compare with them.
    """

    name: str
    commands: list[tuple[str, ...]]
    seconds: int
    missing: tuple[str, ...] = ()


class Peers:
    """The checkouts of other projects that are present."""

    def __init__(self, folder: Path | None):
        places = {"nanoGPT": "nanoGPT", "rosinality": "vq-vae-2-pytorch", "transformers": "hf"}
        self.paths = {name: folder / place for name, place in places.items() if folder and (folder / place).is_dir()}

    def option(self, peer: str, flag: str) -> tuple[str, ...]:
        """Returns the command-line option that names a peer's folder, or nothing."""
        return (flag, str(self.paths[peer])) if peer in self.paths else ()

    def missing(self, *names: str) -> tuple[str, ...]:
        """Returns those of the named peers that are absent."""
        return tuple(name for name in names if name not in self.paths)


def sections(peers: Peers, images: tuple[str, ...], work: Path, out: Path, tiny: bool) -> list[Section]:
    """Lists the sections.

    Args:
        peers: The peers that are present.
        images: Options that name the images; empty for drawn ones.
        work: Folder for runs.
        out: Folder of the results, for pictures.
        tiny: Whether this is a rehearsal.
    """
    nanogpt, rosinality = peers.option("nanoGPT", "--nanogpt"), peers.option("rosinality", "--peer")
    tokenizer = ("--size", "32", "--batch", "2") if tiny else ("--size", "256", "--batch", "32", "--compile")
    tokenizer += ("--number", "1", "--rounds", "1") if tiny else ("--number", "5", "--rounds", "3")
    feed = ("--number", "24", "--size", "32") if tiny else ("--number", "1500", "--size", "256")
    quick = ("--quick",) if tiny else ()
    prior = ("--cases", "tiny") if tiny else ("--cases", "350m", "1b", "--compile")
    prior += ("--number", "1", "--rounds", "1") if tiny else ("--number", "3", "--rounds", "3")
    zero = ("--cases", "tiny" if tiny else "350m", "--stages", "1", "2", "3", "--number", "1", "--rounds", "1")
    return [
        Section("tests", [(*PYTHON, "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/unit", "tests/gpu")], 60),
        Section(
            "VQ-VAE-2 step",
            [
                (*PYTHON, "benchmarks.tokenizer", "speed", *rosinality, *tokenizer, "--precision", p)
                for p in (("bf16",) if tiny else ("bf16", "fp32"))
            ],
            60,
            peers.missing("rosinality"),
        ),
        Section("quantizer", [(*PYTHON, "benchmarks.quantizer", *quick)], 40),
        Section("GPT training", [(*PYTHON, "benchmarks.prior", *nanogpt, *prior)], 110, peers.missing("nanoGPT")),
        Section("GPT under ZeRO 1 to 3 on one rank", [(*PYTHON, "benchmarks.prior", *zero)], 40),
        Section(
            "sampling",
            [(*PYTHON, "benchmarks.sampling", "gpt", *nanogpt, *quick, "--rounds", "1")],
            60,
            peers.missing("nanoGPT", "transformers"),
        ),
        Section("data", [(*PYTHON, "benchmarks.feed", *images, *feed)], 40),
        Section("training", [(*PYTHON, "benchmarks.train_real", str(work), str(out), *images, *quick)], 150),
    ]


def run_section(section: Section, environment: dict[str, str], deadline: float) -> dict:
    """Runs a section's commands. Returns {"ok", "seconds", "commands", "output", "missing"}.

    Args:
        section: The section.
        environment: Environment variables of its commands.
        deadline: Time at which the last command must end, as time.monotonic() gives it; infinite in a rehearsal, which may run
            on a slow and busy machine and has no limits.
    """
    began, outputs, ok = time.monotonic(), [], True
    for command in section.commands:
        limit = None if math.isinf(deadline) else max(1.0, min(section.seconds, deadline - time.monotonic()))
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
            output, code = done.stdout, done.returncode
            error = done.stderr
        except subprocess.TimeoutExpired as raised:
            output, error = _text(raised.stdout), _text(raised.stderr) + f"\nstopped after {limit:.0f} s"
            code = -1
        if code not in (0, 5):  # 5: pytest has found no test to run
            ok = False
            output += "\n" + "\n".join(error.strip().splitlines()[-15:])
        outputs.append(output.strip())
    commands = [" ".join(("python", *command[1:])) for command in section.commands]
    seconds = round(time.monotonic() - began, 1)
    return {"ok": ok, "seconds": seconds, "commands": commands, "output": "\n\n".join(outputs), "missing": section.missing}


def _text(content: bytes | str | None) -> str:
    return content.decode(errors="replace") if isinstance(content, bytes) else content or ""


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
        lines += ["", f"## {name}{state}", "", *(f"    {command}" for command in found["commands"]), ""]
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
    parser.add_argument("--rehearse", action="store_true", help="run every section with tiny sizes, also on a CPU")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("this machine has no GPU; --rehearse runs every section with tiny sizes on the CPU")
    peers = Peers(arguments.peers)
    path = arguments.out / "results.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {"sections": {}}
    results |= {"hardware": hardware(), "rehearsal": arguments.rehearse}
    environment = os.environ | {"OMP_NUM_THREADS": "1" if arguments.rehearse else "4"}
    environment |= {} if arguments.rehearse else {"LESIONGEN_TEST_GPU": "1"}
    if "transformers" in peers.paths:
        environment["PYTHONPATH"] = os.pathsep.join([str(peers.paths["transformers"]), os.environ.get("PYTHONPATH", "")])
    images = ("--images", arguments.images, "--metadata", arguments.metadata) if arguments.images else ()
    work = Path(tempfile.mkdtemp(prefix="lesiongen-gpu-"))
    deadline = math.inf if arguments.rehearse else time.monotonic() + TOTAL_SECONDS
    todo = sections(peers, images, work, arguments.out.resolve(), arguments.rehearse)
    number = len(todo)
    for section in todo:
        if results["sections"].get(section.name, {}).get("ok"):
            continue
        if time.monotonic() > deadline - 10:
            print(f"{section.name}: no time left; the same command goes on here")
            continue
        print(f"{section.name} …", flush=True)
        results["sections"][section.name] = found = run_section(section, environment, deadline)
        print(f"{section.name}: {'done' if found['ok'] else 'FAILED'} in {found['seconds']} s", flush=True)
        path.write_text(json.dumps(results, indent=1))
        (arguments.out / "results.md").write_text(markdown(results))
    shutil.rmtree(work)
    return 0 if len(results["sections"]) == number and all(f["ok"] for f in results["sections"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
