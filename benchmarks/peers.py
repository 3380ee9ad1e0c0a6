"""A diffusion model compared with a run of ours: trained as long, on the same images, judged by the same evaluation.

    pip install diffusers
    python -m benchmarks.peers RUN/config.yaml OUT --minutes 60 [--guidance 1.0] [--steps 25] [--precision bf16] [--patch 2]

RUN is a finished run. The peer is a class-conditional UNet of diffusers, trained by flow matching (Lipman et al., 2210.02747)
with the views of the run's encode stage and the balance of its coarsest prior, and sampled by Heun's method from averaged
weights. With `--patch 2`, squares of 2 × 2 pixels are its channels, so that it sees about four times as many images in its
time. `--minutes` is the time of its training; choose the time that all trainings of the run took together. On two cores it
trains faster with OMP_NUM_THREADS=1. The peer makes one sample for each sample of the run, with the same label.

The training saves OUT/peer.pt every two minutes and continues from it; the samples are in OUT/samples. The table has the same
figures for both: KID × 1,000, precision, recall and coverage by the main ruler, KID by the small lesion network, the judge's
balanced accuracy, that of a probe trained on the samples alone, and the gain of samples added to 100 real images of each class.
"""

import argparse
import csv
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hpc.data.codestore import CodeStore
from hpc.dist import Topology
from hpc.run.progress import progress_bar
from hpc.run.rundir import atomic_write
from lesiongen import experiment
from lesiongen.data import images
from lesiongen.data.images import to_float, to_uint8
from lesiongen.data.stream import ImageShards
from lesiongen.evaluation import parts
from lesiongen.evaluation.fidelity import fidelity
from lesiongen.evaluation.subject import Subject
from lesiongen.experiment import Experiment, PolishAugment
from lesiongen.stages.base import load_decoder, packed, packed_locations, require

BATCH = 32
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SAVE_SECONDS = 120


def unet(size: int, channels: int, classes: int) -> nn.Module:
    """Returns the peer: 8 million parameters, four resolutions, attention at the coarsest. Label `classes` means no label."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 96, 128, 192),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=32,
        num_class_embeds=classes + 1,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def _average(averages: list[torch.Tensor], current: list[torch.Tensor], steps: torch.Tensor | int) -> None:
    """Averages weights over the last ninth of the steps so far, at most over the last 1,000: a short training has few steps."""
    decay = min(0.999, (1 + int(steps)) / (10 + int(steps)))
    torch._foreach_lerp_(averages, current, 1 - decay)


class Peer:
    """The peer and its training.

    Attributes:
        net, average: The model, and its weights averaged over the training.
        seconds, seen: The training so far: its time, and the images it has seen.
    """

    def __init__(self, config: Experiment, path: Path, precision: str, patch: int):
        """Builds the peer, or loads it from `path` if a training has saved it there."""
        self.config, self.path, self.shards, self.patch = config, path, packed(config), patch
        torch.manual_seed(config.seed)
        self.classes = len(self.shards.classes)
        net = unet(self.shards.size // patch, self.shards.channels * patch**2, self.classes)
        self.net = net.to(DEVICE, memory_format=torch.channels_last)
        self.average = AveragedModel(self.net, multi_avg_fn=_average)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=5e-4, betas=(0.9, 0.99), weight_decay=0.0)
        self.autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")
        self.seconds, self.seen = 0.0, 0
        if path.exists():
            saved = torch.load(path, map_location=DEVICE, weights_only=True)
            self.net.load_state_dict(saved["net"])
            self.average.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.seconds, self.seen = saved["seconds"], saved["seen"]

    def save(self) -> None:
        """Writes the state of the training."""
        state = {name: getattr(self, name).state_dict() for name in ("net", "average", "optimizer")}
        torch.save(state | {"seconds": self.seconds, "seen": self.seen}, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def batches(self) -> Iterator[dict]:
        """Yields the training batches that follow those already seen."""
        coarsest = self.config.priors[self.config.levels[0]]
        # Not the views of encode: enlarged crops are blurred, and the peer would learn to blur.
        order = self.seen, BATCH, BATCH, PolishAugment(), self.config.seed, 1, coarsest.stream
        return ImageShards(self.shards, "train").train(*order)

    def train(self, minutes: float) -> None:
        """Trains until the training has taken `minutes`. The learning rate falls to 0 over the last 40 %."""
        limit, saved = 60 * minutes, self.seconds
        with progress_bar(int(limit), "peer", unit="s") as progress:
            progress.update(int(self.seconds))
            for batch in self.batches():
                if self.seconds >= limit:
                    break
                start = time.perf_counter()
                warm = min(1.0, (self.seen + BATCH) / (100 * BATCH))
                lr = 5e-4 * warm * min(1.0, (1 - self.seconds / limit) / 0.4)
                loss = self._step(batch, lr)
                took = time.perf_counter() - start
                progress.update(int(self.seconds + took) - int(self.seconds))
                self.seconds, self.seen = self.seconds + took, self.seen + BATCH
                if self.seen % (50 * BATCH) == 0:
                    progress.set_postfix(images=self.seen, loss=round(float(loss), 4))
                if self.seconds - saved > SAVE_SECONDS:
                    self.save()
                    saved = self.seconds
        self.save()

    def _step(self, batch: dict, lr: float) -> torch.Tensor:
        """Makes one step of flow matching and returns the loss."""
        image = F.pixel_unshuffle(to_float(batch["image"].to(DEVICE)), self.patch).to(memory_format=torch.channels_last)
        label = torch.as_tensor(batch["label"], device=DEVICE)
        label = torch.where((label < 0) | (torch.rand(len(label), device=DEVICE) < 0.1), self.classes, label)
        noise, t = torch.randn_like(image), torch.sigmoid(torch.randn(len(image), device=DEVICE))  # t as in 2403.03206
        with self.autocast:
            flow = self.net(torch.lerp(image, noise, t[:, None, None, None]), 1000 * t, label).sample
        loss = (flow.float() - (noise - image)).square().mean()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.net)
        return loss.detach()

    @torch.no_grad()
    def sample(self, labels: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
        """Returns an image for each label, uint8 [B, C, H, W]."""
        size = self.shards.size // self.patch
        shape = len(labels), self.shards.channels * self.patch**2, size, size
        x = torch.randn(shape, device=DEVICE).to(memory_format=torch.channels_last)
        times = torch.linspace(1, 0, steps + 1, device=DEVICE).tolist()
        for now, then in itertools.pairwise(times):
            flow = self._flow(x, now, labels, guidance)
            if then > 0:  # Heun's correction
                flow = (flow + self._flow(x + (then - now) * flow, then, labels, guidance)) / 2
            x = x + (then - now) * flow
        return to_uint8(F.pixel_shuffle(x, self.patch))

    def _flow(self, x: torch.Tensor, t: float, labels: torch.Tensor, guidance: float) -> torch.Tensor:
        time_B = torch.full((len(x),), 1000 * t, device=DEVICE)
        with self.autocast:
            flow = self.average(x, time_B, labels).sample.float()
            if guidance != 1:
                without = self.average(x, time_B, torch.full_like(labels, self.classes)).sample.float()
                flow = without + guidance * (flow - without)
        return flow


def write_samples(peer: Peer, rows: list[dict], folder: Path, steps: int, guidance: float) -> None:
    """Samples one image for each row of the run's metadata.csv and writes them and a table. Keeps images that are there."""
    label_of = {name: label for label, name in enumerate(peer.shards.classes)}
    peer.average.eval()
    with progress_bar(len(rows), "sample") as progress:
        for first in range(0, len(rows), 2 * BATCH):
            part = rows[first : first + 2 * BATCH]
            if not all((folder / row["file"]).exists() for row in part):
                torch.manual_seed(first)
                labels = torch.tensor([label_of[row["label"]] for row in part], device=DEVICE)
                for row, image in zip(part, peer.sample(labels, steps, guidance), strict=True):
                    atomic_write(folder / row["file"], images.encode_png(image))
            progress.update(len(part))
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def judge(config: Experiment, samples: Path) -> dict[str, str]:
    """Evaluates the samples in a folder. Returns the row of the table: column → text."""
    net, _ = load_decoder(config, DEVICE)
    places = packed_locations(config), CodeStore(require(config, "codes")), net, samples, config.directory
    subject = Subject(config.evaluate, config.seed, Topology(), packed(config), *places)
    rulers = parts.likeness_part(subject)["rulers"]
    main = next(iter(rulers.values()))["all"]["both"]
    use = parts.utility_part(subject)
    judged = fidelity(subject.judged, subject.classes, subject.trained_on)
    figures = {
        "KID": (main["kid"], 1, 0),
        **{name: (main[name], 1, 2) for name in ("precision", "recall", "coverage")},
        "KID, lesions": (rulers["lesions"]["all"]["both"]["kid"], 1, 1),
        "judge %": (judged["balanced_accuracy"]["samples"], 100, 0),
        "probe %": (use["arms"]["synthetic"]["all"]["balanced_accuracy"], 100, 0),
        "gain": (use["gain"]["100"]["balanced_accuracy"], 100, 1),
    }
    return {name: _text(figure, scale, digits) for name, (figure, scale, digits) in figures.items()}


def _text(figure: dict, scale: float, digits: int) -> str:
    """Returns a figure with its interval, such as "202 [175, 230]"; "–" if it could not be measured."""
    if figure["value"] is None:
        return "–"
    value, low, high = (f"{scale * figure[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def main() -> None:
    """Trains, samples and judges the peer, and judges the run's own samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--patch", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    config = experiment.load(options.config)
    options.out.mkdir(parents=True, exist_ok=True)
    ours = require(config, "samples")
    peer = Peer(config, options.out / "peer.pt", options.precision, options.patch)
    peer.train(options.minutes)
    with open(ours / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    start = time.perf_counter()
    write_samples(peer, rows, options.out / "samples", options.steps, options.guidance)
    took = time.perf_counter() - start
    print(f"peer: {peer.seen:,} images in {peer.seconds / 60:.0f} min, {len(rows):,} samples in {took:.0f} s")
    table = {"ours": judge(config, ours), "flow matching": judge(config, options.out / "samples")}
    atomic_write(options.out / "table.json", json.dumps(table, indent=1).encode())
    print("| |", " | ".join(table["ours"]), "|")
    for name, row in table.items():
        print(f"| {name} |", " | ".join(row.values()), "|")


if __name__ == "__main__":
    main()
