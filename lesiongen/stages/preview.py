"""One picture of what training would see: originals beside augmented views, from packed shards or before packing."""

import math
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import to_pil_image

from hpc.data.order import sample_seed
from hpc.data.shards import BadSample
from hpc.errors import UserError
from hpc.run.rundir import atomic_write
from lesiongen.data import images
from lesiongen.data.augment import augment, centre, preprocess
from lesiongen.data.stream import ImageShards
from lesiongen.experiment import Experiment
from lesiongen.ingest import catalog
from lesiongen.stages.base import packed, shards_are_current

HEADER, GAP = 20, 12  # pixels: for headings, between blocks


def preview(config: Experiment, out: Path | None = None, rows: int = 8, columns: int = 6) -> Path:
    """Writes a PNG, by default preview.png in the run, and returns where. A row: class, unaugmented view, `columns` views of
    tokenizer.augment, and as many of encode.augment where that is another. The seed decides which images and views."""
    if shards_are_current(config):
        data = ImageShards(packed(config), "train")
        size, found = data.size, _from_shards(data, config.seed)
    elif config.data.images:
        size, found = config.data.size, _from_files(config)
    else:
        raise UserError("A preview needs images: set data.images, or inputs.shards to packed ones.")
    chosen = list(islice(found, rows))
    if not chosen:
        raise UserError("None of the images can be read; `lesiongen pack` says why.")
    settings = {"tokenizer.augment": config.tokenizer.augment, "encode.augment": config.encode.augment}
    if config.encode.augment == config.tokenizer.augment:
        settings = {"tokenizer.augment and encode.augment": config.tokenizer.augment}
    blocks = {"original": images.grid(torch.stack([centre(image, size) for _, image in chosen]), 1)}
    for name, setting in settings.items():
        views = [
            augment(image, size, setting, torch.Generator().manual_seed(sample_seed(config.seed, row * columns + column)))
            for row, (_, image) in enumerate(chosen)
            for column in range(columns)
        ]
        blocks[name] = images.grid(torch.stack(views), columns)
    path = Path(out or config.directory / "preview.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, images.encode(_sheet([label or "unlabelled" for label, _ in chosen], blocks), "png", 0))
    return path


def _from_shards(data: ImageShards, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    reader = data.reader()
    members = [
        (shard, label, number)
        for shard, tally in enumerate(data.label_counts())
        for label, count in tally.items()
        for number in range(count)
    ]
    for i in _spread([label for _, label, _ in members], seed):
        shard, label, _ = members[i]
        try:
            image, _ = data.image(reader.read(shard, data.member(reader, *members[i])))
        except BadSample:
            continue  # training replaces it too
        yield data.classes[label] if label >= 0 else "", image


def _from_files(config: Experiment) -> Iterator[tuple[str, torch.Tensor]]:
    data = config.data
    prepare = data.preprocess
    metadata = Path(data.metadata) if data.metadata else None
    records = catalog.read_catalog(
        Path(data.images), metadata, data.columns, data.classes, data.licences, rename=data.rename
    ).records
    for i in _spread([r.dx for r in records], config.seed):
        try:
            image = images.read(Path(records[i].path), data.channels)
        except (images.BadImage, OSError):
            continue  # packing lists it
        shrunk = images.shrink(image, round(data.size / prepare.centre))
        yield records[i].dx, preprocess(images.to_tensor(shrunk), prepare)


def _spread(labels: list, seed: int) -> list[int]:
    """Indices in the order to show them: one of each label, then another of each, and so on."""
    turns, ranked = Counter(), []
    for i in random.Random(seed).sample(range(len(labels)), len(labels)):
        ranked.append((turns[labels[i]], labels[i], i))
        turns[labels[i]] += 1
    return [i for *_, i in sorted(ranked)]


def _sheet(labels: list[str], blocks: dict[str, torch.Tensor]) -> Image.Image:
    """blocks: heading → uint8 [C, H, W], all of one height; labels: one for each row of theirs."""
    font = ImageFont.load_default(12)
    margin = GAP + math.ceil(max(font.getlength(label) for label in labels))
    height = next(iter(blocks.values())).shape[1]
    sheet = Image.new("RGB", (margin + sum(block.shape[2] + GAP for block in blocks.values()), HEADER + height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels):
        draw.text((margin - 4, HEADER + (row + 0.5) * height / len(labels)), label, "black", font, anchor="rm")
    left = margin
    for heading, block in blocks.items():
        draw.text((left + 2, HEADER / 2), heading, "black", font, anchor="lm")
        sheet.paste(to_pil_image(block), (left, HEADER))
        left += block.shape[2] + GAP
    return sheet
