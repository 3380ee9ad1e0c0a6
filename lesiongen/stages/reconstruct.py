"""reconstruct: any images through a trained tokenizer → pairs, maps of codes, codebook, and a table of PSNR and SSIM."""

import csv
import io
from collections import Counter
from pathlib import Path

import torch

from hpc.config import build
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run.progress import bar
from hpc.run.rundir import atomic_write
from lesiongen.data import images
from lesiongen.data.augment import PreprocessConfig, centre, preprocess
from lesiongen.data.images import to_float, to_uint8, to_unit
from lesiongen.data.similarity import psnr, ssim
from lesiongen.evaluation import figures
from lesiongen.experiment import Experiment
from lesiongen.ingest.sources import SUFFIXES
from lesiongen.stages.base import require
from lesiongen.tokenizers.export import load_tokenizer

SHEET = 64  # images in the sheet of pairs


@torch.no_grad()
def reconstruct(config: Experiment, paths: list[Path], out: Path, batch: int = 32) -> dict[str, float]:
    """Writes out/{pairs,codes,codebook}.png, out/images/<name>.png and out/metrics.csv. Returns the means.

    Images that cannot be read are listed and left out; UserError if none can."""
    net, facts = load_tokenizer(require(config, "tokenizer"), Topology().device)
    device, prepare = next(net.parameters()).device, build(PreprocessConfig, facts["preprocess"])
    larger = round(facts["size"] / prepare.centre)
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p])]
    files = [f for f in files if f.suffix.lower() in SUFFIXES or f in paths]
    counts = {name: torch.zeros(net.entries, dtype=torch.long) for name in net.names}
    rows, refused, shown, taken = [], [], [], Counter()
    with bar(len(files), "reconstruct") as progress:
        for first in range(0, len(files), batch):
            named, stack = [], []
            for file in files[first : first + batch]:
                try:
                    image = images.shrink(images.read(file, facts["channels"]), larger)
                except (OSError, images.BadImage) as error:
                    refused.append(f"{file}: {error}")
                    continue
                named.append(file)
                stack.append(centre(preprocess(images.to_tensor(image), prepare), facts["size"]))
            if stack:
                x = to_float(torch.stack(stack).to(device))
                y, levels = net(x)
                values = zip(psnr(to_unit(y), to_unit(x)).tolist(), ssim(to_unit(y), to_unit(x)).tolist(), strict=True)
                painted = to_uint8(y).cpu()
                for file, image, (p, s) in zip(named, painted, values, strict=True):
                    taken[file.stem] += 1  # folders may have images of one name
                    name = f"images/{file.stem}{f'-{taken[file.stem]}' * (taken[file.stem] > 1)}.png"
                    atomic_write(out / name, images.png(image))
                    rows.append((str(file), name, p, s))
                for name, q in levels.items():
                    counts[name] += torch.bincount(q.codes.flatten().cpu(), minlength=net.entries)
                if sum(len(s[0]) for s in shown) < SHEET:
                    shown.append((torch.stack(stack), painted, {name: q.codes.cpu() for name, q in levels.items()}))
            progress.update(len(files[first : first + batch]))
    for line in refused:
        print(f"left out: {line}")
    if not rows:
        raise UserError("None of these is an image that can be read; give image files or folders of them.")
    originals, painted = (torch.cat([s[i] for s in shown])[:SHEET] for i in (0, 1))
    atomic_write(out / "pairs.png", images.png(figures.pairs(originals, painted)))
    maps = {name: torch.cat([s[2][name] for s in shown])[:8] for name in reversed(net.names)}
    atomic_write(out / "codes.png", images.png(figures.with_maps(originals[:8], painted[:8], maps, net.entries)))
    atomic_write(out / "codebook.png", figures.codebooks({n: (net.codebook(n).cpu(), counts[n]) for n in reversed(net.names)}))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("file", "reconstruction", "psnr", "ssim"), *rows])
    atomic_write(out / "metrics.csv", table.getvalue().encode())
    return {"images": len(rows), "psnr": sum(r[2] for r in rows) / len(rows), "ssim": sum(r[3] for r in rows) / len(rows)}
