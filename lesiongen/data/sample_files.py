"""The image files of samples: where they lie, what a PNG says of its origin, and the contact sheet."""

import io
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hpc.data.shards import write_shard
from hpc.run.rundir import atomic_write
from lesiongen.data import images
from lesiongen.data.sheets import sheet
from lesiongen.data.tables import read_csv

PER_CLASS = 8  # samples of each class in the contact sheet
# The IPTC's digital source type of media made by a trained model; programs that show where a picture comes from read it.
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    'rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType='
    '"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/></rdf:RDF></x:xmpmeta>'
)


def image_paths(labels: Sequence[str]) -> list[str]:
    """Returns where the image of each sample lies below the stage's directory: images/<label>/<index>.png.

    Characters of a label that a file system may refuse are replaced. Labels that then look alike, also to a file system that
    ignores case, get a number.
    """
    folders: dict[str, str] = {}
    for label in dict.fromkeys(labels):
        safe = re.sub(r"[^\w.-]+", "_", label).strip(".")[:60] or "any"
        taken = {name.lower() for name in folders.values()}
        names = itertools.chain([safe], (f"{safe}-{number}" for number in itertools.count(2)))
        folders[label] = next(name for name in names if name.lower() not in taken)
    return [f"images/{folders[label]}/{i:06d}.png" for i, label in enumerate(labels)]


def write_webdataset(folder: Path, per_shard: int = 1000) -> list[Path]:
    """Writes the samples in a directory as WebDataset shards too: webdataset/samples-000000.tar, …

    A sample has the members png, cls (the label's number in the order of classes.txt) and json (its row of metadata.csv).

    Args:
        folder: The samples' directory.
        per_shard: Samples in a shard.

    Returns:
        Paths of the shards.
    """
    rows = read_csv(folder / "metadata.csv")
    classes = sorted({row["label"] for row in rows})
    out = folder / "webdataset"
    out.mkdir(exist_ok=True)
    atomic_write(out / "classes.txt", "".join(f"{name}\n" for name in classes).encode())
    paths = []
    for first in range(0, len(rows), per_shard):
        paths.append(out / f"samples-{first // per_shard:06d}.tar")
        write_shard(
            paths[-1],
            (
                {
                    "__key__": f"{int(row['index']):06d}",
                    "cls": str(classes.index(row["label"])).encode(),
                    "json": json.dumps(row).encode(),
                    "png": (folder / row["file"]).read_bytes(),
                }
                for row in rows[first : first + per_shard]
            ),
        )
    return paths


def png_with(image_CHW: torch.Tensor, text: dict[str, str]) -> bytes:
    """Encodes a uint8 image as PNG, with `text` in its text chunks and the standard mark of generated media in its XMP."""
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP)
    for key, value in text.items():
        info.add_text(key, value or "")
    buffer = io.BytesIO()
    images.to_image(image_CHW).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def contact_sheet(folder: Path, paths: list[str], labels: list[str]) -> bytes:
    """Returns a PNG with a row for each class: its name and its first PER_CLASS samples.

    Args:
        folder: The samples' directory.
        paths: The images below it.
        labels: The label of each image.
    """
    rows: dict[str, list[str]] = {}
    for path, label in zip(paths, labels, strict=True):
        rows.setdefault(label, []).append(path)
    return sheet([(label, map(Image.open, [folder / path for path in shown[:PER_CLASS]])) for label, shown in rows.items()])
