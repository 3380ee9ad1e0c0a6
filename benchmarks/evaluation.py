"""Memory and time of the evaluate stage at 10,000 and at 100,000 training images.

    python -m benchmarks.evaluation [--images 10000 100000] [--folder FOLDER]

Lesions are drawn, packed, and tokenized by tiny models; all stages are the project's own. A set of N training images is made of
links to one packed shard, each under a name of its own and with images and lesions of its own in the catalog; its held-out
images are always the same. The evaluation is `lesiongen evaluate`, a process that is watched through /proc, so Linux only.

Anonymous memory is what the process has allocated. The whole resident memory also counts the pages of the code store's files
that are mapped, at most 256 files; the system takes these pages back when it needs them. A phase begins with a progress bar and
lasts until the next one. The process returns freed memory at once, unlike in use (hpc/train/allocator.py): otherwise the table
would show by how much the heap happens to be fragmented, which is up to 100 MB at any number of images.

Fails if the peak of anonymous memory grows by more than LIMIT bytes for each training image.
"""

import argparse
import contextlib
import csv
import io
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks.resident import FREE_AT_ONCE
from hpc.config import to_yaml
from hpc.data import manifest
from hpc.data.shards import index_path
from hpc.train import allocator
from launch.__main__ import main as launch_main
from launch.commands import run_only
from lesiongen import experiment
from lesiongen.data.packed import CATALOG, rows
from lesiongen.evaluation.classifier import small_network
from lesiongen.experiment import Experiment
from lesiongen.ingest import phantom

SIDE = 32  # of the images, in pixels
LESIONS = 90  # of each class that are drawn
DRAWS = 2
LIMIT = 200  # bytes of anonymous memory for each training image
SAMPLE_S = 0.01  # how often the memory is read
PHASE = re.compile(rb"[\r\n]([a-z][\w +-]*): +\d+%")  # a progress bar's text, as hpc/run/progress.py writes it


def settings(runs: Path, name: str, inputs: dict, backbone: Path) -> dict:
    """Returns the config of a run with tiny models."""
    train = {"samples": 320, "batch": 32, "log_every": 160, "eval_every": 320, "save_every": 320}
    prior = {"model": {"layers": 1, "heads": 2, "width": 32}, "train": train}
    images = {"images": str(runs / "images" / "images"), "metadata": str(runs / "images" / "metadata.csv")}
    return {
        "name": name,
        "runs": str(runs),
        "inputs": inputs,
        "data": {"size": SIDE, "val": 0.12, "test": 0.12, "workers": 0} | ({} if inputs else images),
        "tokenizer": {
            "model": {"strides": [4, 2], "hidden": 16, "residual_layers": 1, "residual_hidden": 8, "dim": 8, "entries": 64},
            "train": train,
        },
        "encode": {"draws": DRAWS},
        "priors": {"top": prior, "bottom": prior},
        "sample": {"number": 210, "batch": 70},
        "evaluate": {
            "features": {"backbone": str(backbone), "size": SIDE},
            "classifier_samples": 1_000,
            "fine_tuning_samples": 64,
            "utility": {"seeds": 2, "sizes": [10, 100]},
        },
    }


def write_config(folder: Path, plain: dict) -> tuple[Experiment, Path]:
    """Writes a config file. Returns the config and the file."""
    config = experiment.make(plain)
    path = folder / f"{config.name}.yaml"
    path.write_text(to_yaml(config))
    return config, path


def make(config: Experiment, names: list[str]) -> None:
    """Runs the named stages. Raises RuntimeError if one fails."""
    if code := run_only(config, names, []):
        raise RuntimeError(f"{', '.join(names)} failed with {code}")


def enlarge(packed: Path, folder: Path, images: int) -> int:
    """Writes a packed set whose training split repeats that of another set until it has about this number of images.

    Args:
        packed: The set to repeat. Its shards are linked, not copied.
        folder: Directory of the new set.
        images: Training images.

    Returns:
        The number of training images.
    """
    folder.mkdir(parents=True)
    content = manifest.read(packed)
    base = [entry for entry in content["shards"] if entry["split"] == "train"]
    repeats = round(images / sum(entry["count"] for entry in base))
    catalog = list(rows(packed / entry["name"] for entry in content["catalogs"]))
    table, shards = io.StringIO(), []
    writer = csv.DictWriter(table, CATALOG, lineterminator="\n")
    writer.writeheader()
    for entry in content["shards"]:
        of_shard = [row for row in catalog if row["shard"] == entry["name"]]
        for repeat in range(repeats if entry["split"] == "train" else 1):
            suffix = f"r{repeat:04d}"
            path = folder / f"{suffix}-{entry['name']}"
            os.link(packed / entry["name"], path)
            os.link(index_path(packed / entry["name"]), index_path(path))
            shards.append(entry | {"name": path.name, "index": entry["index"] | {"name": index_path(path).name}})
            renamed = ("image_id", "own_group", "group", "lesion")
            writer.writerows(row | {"shard": path.name} | {k: f"{row[k]}_{suffix}" for k in renamed} for row in of_shard)
    (folder / "catalog.csv").write_text(table.getvalue())
    counts = {
        split: {name: number * (repeats if split == "train" else 1) for name, number in by_class.items()}
        for split, by_class in content["counts"].items()
    }
    catalogs = [manifest.describe(folder / "catalog.csv", count=sum(entry["count"] for entry in shards))]
    manifest.write(folder, content | {"shards": shards, "catalogs": catalogs, "counts": counts})
    return sum(counts["train"].values())


class Watched:
    """Memory and time of a process by phases, read from outside while it runs.

    Attributes:
        peaks: Phase → largest anonymous bytes, in the order of the phases.
        resident: Phase → largest resident bytes, mapped files included.
        seconds: Phase → seconds.
    """

    def __init__(self, command: list[str]):
        """Runs the command to its end. Raises RuntimeError if it fails; the error has what it has printed last."""
        self.peaks: dict[str, int] = {}
        self.resident: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.phase, self.text = "start", b"\n"
        environment = os.environ | FREE_AT_ONCE | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        reader = threading.Thread(target=self._read, args=(process.stdout.fileno(),), daemon=True)
        reader.start()
        while process.poll() is None:
            phase, began = self.phase, time.perf_counter()
            with contextlib.suppress(OSError, KeyError):  # the process has just ended
                self._sample(phase, Path(f"/proc/{process.pid}"))
            time.sleep(SAMPLE_S)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
        reader.join()
        if process.returncode:
            raise RuntimeError(f"{command} failed:\n{self.text.decode(errors='replace')[-4000:]}")

    def _sample(self, phase: str, folder: Path) -> None:
        """Reads the memory of the process. A new phase resets the high-water mark."""
        if phase not in self.peaks:
            (folder / "clear_refs").write_text("5")
        lines = (line.split() for line in (folder / "status").read_text().splitlines())
        found = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[0] in ("VmHWM:", "RssAnon:")}
        self.peaks[phase] = max(self.peaks.get(phase, 0), found["RssAnon"])
        self.resident[phase] = max(self.resident.get(phase, 0), found["VmHWM"])

    def _read(self, descriptor: int) -> None:
        """Follows what the process prints. A progress bar begins a phase."""
        while part := os.read(descriptor, 65536):
            self.text = self.text[-10_000:] + part
            if found := PHASE.findall(self.text):
                self.phase = found[-1].decode()


def measure(runs: Path, images: int, backbone: Path) -> tuple[int, Watched]:
    """Makes a run with about this many training images and evaluates it. Returns the number of images, and what was read."""
    shards = runs / f"shards-{images}"
    number = enlarge(runs / "base" / "shards", shards, images)
    inputs = {"shards": [str(shards)], "tokenizer": str(runs / "base")}
    config, path = write_config(runs, settings(runs, f"run-{images}", inputs, backbone))
    make(config, ["codes", "prior-top", "prior-bottom", "samples"])
    return number, Watched([sys.executable, "-m", "benchmarks.evaluation", "--evaluate", str(path)])


def evaluate(path: Path) -> int:
    """Runs `lesiongen evaluate`, with freed memory returned to the system. Returns the exit code."""
    allocator.keep_freed_memory = lambda device: None
    return launch_main(["evaluate", str(path)])


def print_table(found: dict[int, Watched]) -> bool:
    """Prints the phases of the smaller and the larger run. Returns whether memory is flat in the number of images."""
    (few, small), (many, large) = sorted(found.items())
    print("\nPeak of anonymous memory, growth for each further training image, time, and peak with mapped files")
    print(f"{'training images':22}{few:>11,}{many:>11,}{'B/image':>9}{few:>9,}{many:>9,}{few:>11,}{many:>11,}")
    peak = resident = 0
    for phase in large.peaks:  # the smaller run may pass a phase faster than the memory is read: the one before counts
        peak, resident = small.peaks.get(phase, peak), small.resident.get(phase, resident)
        growth = (large.peaks[phase] - peak) / (many - few)
        memory = f"{peak / 1e6:8.0f} MB{large.peaks[phase] / 1e6:8.0f} MB{growth:9.0f}"
        seconds = f"{small.seconds.get(phase, 0):7.0f} s{large.seconds[phase]:7.0f} s"
        print(f"{phase:22}{memory}{seconds}{resident / 1e6:8.0f} MB{large.resident[phase] / 1e6:8.0f} MB")
    low, high = (max(run.peaks.values()) for run in (small, large))
    growth = (high - low) / (many - few)
    print(
        f"peak {low / 1e6:.0f} MB and {high / 1e6:.0f} MB, ratio {high / low:.2f}; {growth:.0f} bytes an image, limit {LIMIT}"
    )
    print(f"time {sum(small.seconds.values()):.0f} s and {sum(large.seconds.values()):.0f} s")
    return growth <= LIMIT


def main() -> int:
    """Parses the command line, measures, prints. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs=2, default=[10_000, 100_000], help="training images of the two runs")
    parser.add_argument("--folder", type=Path, help="where the runs are written; they are removed in the end")
    parser.add_argument("--evaluate", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.evaluate:
        return evaluate(arguments.evaluate)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        runs = Path(folder)
        phantom.write(runs / "images", LESIONS, SIDE, progress=False)
        backbone = runs / "small.pt"
        torch.manual_seed(0)
        torch.jit.script(small_network().eval()).save(str(backbone))
        config, _ = write_config(runs, settings(runs, "base", {}, backbone))
        make(config, ["shards", "tokenizer"])
        found = dict(measure(runs, images, backbone) for images in arguments.images)
    return 0 if print_table(found) else 1


if __name__ == "__main__":
    sys.exit(main())
