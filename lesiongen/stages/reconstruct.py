"""reconstruct: image files + tokenizer → their reconstructions, and how close these are.

This is a command, not a stage of a run. It writes images/<name>.png, metrics.csv (PSNR and SSIM of each image), and three
pictures: pairs.png, codes.png and codebook.png.
"""

from collections import Counter
from pathlib import Path

import torch

from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run.progress import progress_bar
from hpc.run.rundir import atomic_write
from lesiongen.data import images
from lesiongen.data.images import to_float, to_uint8, to_unit
from lesiongen.data.prepare import Preparation
from lesiongen.data.similarity import psnr, ssim
from lesiongen.data.tables import write_csv
from lesiongen.evaluation import figures
from lesiongen.experiment import Experiment
from lesiongen.ingest.folders import IMAGE_SUFFIXES
from lesiongen.stages.base import load_decoder
from lesiongen.tokenizers.tokenizer import Tokenizer

PAIRS = 64  # images in pairs.png
MAPS = 8  # images in codes.png


@torch.no_grad()
def reconstruct(config: Experiment, paths: list[Path], out: Path, batch: int = 32) -> dict[str, float]:
    """Reconstructs images with the run's tokenizer. Files that cannot be read are listed and skipped.

    Args:
        config: The run's config.
        paths: Image files, and folders that are searched for image files.
        out: Directory of the results.
        batch: Images that are reconstructed at once.

    Returns:
        The number of images, and the means of their PSNR (dB) and SSIM.

    Raises:
        UserError: None of the files can be read.
    """
    net, facts = load_decoder(config, Topology().device)
    prepare, results = Preparation(facts), _Results(net, out)
    files, refused = _image_files(paths), []
    with progress_bar(len(files), "reconstruct") as progress:
        for first in range(0, len(files), batch):
            part = files[first : first + batch]
            originals, lines = _read(part, prepare)
            refused += lines
            if originals:
                results.add(list(originals), torch.stack(list(originals.values())))
            progress.update(len(part))
    for line in refused:
        print(f"skipped: {line}")
    if not results.rows:
        raise UserError("None of these files is an image that can be read. Give image files, or folders that contain some.")
    results.write_pictures()
    return results.write_table()


def _image_files(paths: list[Path]) -> list[Path]:
    """Lists the files among `paths`, and the image files in the folders among them and below."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES or file in paths]


def _read(files: list[Path], prepare: Preparation) -> tuple[dict[Path, torch.Tensor], list[str]]:
    """Reads image files as the tokenizer's training images were read.

    Returns:
        The images that can be read, uint8 [C, size, size], and a line for each file that cannot.
    """
    found, refused = {}, []
    for file in files:
        try:
            found[file] = prepare(file)
        except (OSError, images.BadImage) as error:
            refused.append(f"{file}: {error}")
    return found, refused


class _Results:
    """Reconstructs batches, writes each image at once, and collects what the table and the pictures show.

    Attributes:
        rows: For each image: file, name of the reconstruction, PSNR, SSIM.
        counts: How often each code of each level was used, {level: [K]}.
        shown: Batches for the pictures: originals, reconstructions, {level: codes [B, h, w]}.
    """

    def __init__(self, net: Tokenizer, out: Path):
        self.net, self.out, self.device = net, out, next(net.parameters()).device
        self.rows: list[tuple[str, str, float, float]] = []
        self.counts = {name: torch.zeros(net.entries, dtype=torch.long) for name in net.names}
        self.shown: list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []
        self._stems: Counter[str] = Counter()

    def add(self, files: list[Path], originals_BCHW: torch.Tensor) -> None:
        """Reconstructs a batch and writes its images."""
        x = to_float(originals_BCHW.to(self.device))
        y, levels = self.net(x)
        psnr_B, ssim_B = psnr(to_unit(y), to_unit(x)).tolist(), ssim(to_unit(y), to_unit(x)).tolist()
        reconstructions = to_uint8(y).cpu()
        for file, image, image_psnr, image_ssim in zip(files, reconstructions, psnr_B, ssim_B, strict=True):
            name = self._name(file)
            atomic_write(self.out / name, images.encode_png(image))
            self.rows.append((str(file), name, image_psnr, image_ssim))
        codes = {name: quantized.codes.cpu() for name, quantized in levels.items()}
        for name, codes_Bhw in codes.items():
            self.counts[name] += torch.bincount(codes_Bhw.flatten(), minlength=self.net.entries)
        if sum(len(batch[0]) for batch in self.shown) < PAIRS:
            self.shown.append((originals_BCHW, reconstructions, codes))

    def _name(self, file: Path) -> str:
        """Returns the name of a reconstruction. Files of the same name in different folders get a number."""
        self._stems[file.stem] += 1
        number = self._stems[file.stem]
        return f"images/{file.stem}{f'-{number}' * (number > 1)}.png"

    def write_pictures(self) -> None:
        """Writes pairs.png, codes.png and codebook.png."""
        net, names = self.net, list(reversed(self.net.names))
        originals, reconstructions = (torch.cat([batch[i] for batch in self.shown])[:PAIRS] for i in (0, 1))
        atomic_write(self.out / "pairs.png", images.encode_png(figures.pairs(originals, reconstructions)))
        maps = {name: torch.cat([codes[name] for *_, codes in self.shown])[:MAPS] for name in names}
        columns = figures.with_maps(originals[:MAPS], reconstructions[:MAPS], maps, net.entries)
        atomic_write(self.out / "codes.png", images.encode_png(columns))
        codebooks = {name: (net.codebook(name).cpu(), self.counts[name]) for name in names}
        atomic_write(self.out / "codebook.png", figures.codebooks(codebooks))

    def write_table(self) -> dict[str, float]:
        """Writes metrics.csv. Returns the number of images and the means of PSNR and SSIM."""
        write_csv(self.out / "metrics.csv", ("file", "reconstruction", "psnr", "ssim"), self.rows)
        number = len(self.rows)
        means = {name: sum(row[i] for row in self.rows) / number for i, name in ((2, "psnr"), (3, "ssim"))}
        return {"images": number, **means}
