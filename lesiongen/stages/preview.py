"""preview: a picture of what training would see, originals beside augmented views.

This is a command, not a stage of a run. The images come from finished shards, if there are any that fit the config. Otherwise
they come from the image files, so that augmentation can be chosen before packing.
"""

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

HEADER, GAP = 20, 12  # pixels: height of the headings, space between blocks


def preview(config: Experiment, out: Path | None = None, rows: int = 8, columns: int = 6) -> Path:
    """Writes the picture as PNG. The seed of the config decides which images and views are shown.

    A row shows the label, the unaugmented view, `columns` views of tokenizer.augment, and as many views of encode.augment if
    that differs.

    Args:
        config: The run's config.
        out: Path of the PNG; by default preview.png in the run.
        rows: Number of images.
        columns: Views of each augmentation.

    Returns:
        Path of the PNG.

    Raises:
        UserError: The config names no images, or none of them can be read.
    """
    if shards_are_current(config):
        data = ImageShards(packed(config), "train")
        size, labelled_images = data.size, _from_shards(data, config.seed)
    elif config.data.images:
        size, labelled_images = config.data.size, _from_files(config)
    else:
        raise UserError("A preview needs images. Set data.images, or set inputs.shards to packed images.")
    shown = list(islice(labelled_images, rows))
    if not shown:
        raise UserError("None of the images can be read. `lesiongen pack` reports why.")
    blocks = _blocks(config, [image for _, image in shown], size, columns)
    sheet = _sheet([label or "unlabelled" for label, _ in shown], blocks)
    path = Path(out or config.directory / "preview.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, images.encode(sheet, "png", 0))
    return path


def _blocks(config: Experiment, originals: list[torch.Tensor], size: int, columns: int) -> dict[str, torch.Tensor]:
    """Returns a grid of views for each heading, uint8 [C, H, W], with a row for each image."""
    settings = {"tokenizer.augment": config.tokenizer.augment, "encode.augment": config.encode.augment}
    if config.encode.augment == config.tokenizer.augment:
        settings = {"tokenizer.augment and encode.augment": config.tokenizer.augment}
    blocks = {"original": images.tile_images(torch.stack([centre(image, size) for image in originals]), 1)}
    for heading, setting in settings.items():
        views = [
            augment(image, size, setting, torch.Generator().manual_seed(sample_seed(config.seed, row * columns + column)))
            for row, image in enumerate(originals)
            for column in range(columns)
        ]
        blocks[heading] = images.tile_images(torch.stack(views), columns)
    return blocks


def _from_shards(data: ImageShards, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (label, image) from packed shards, in the order of `_spread`."""
    reader = data.reader()
    members = [
        (shard, label, number)
        for shard, tally in enumerate(data.label_counts())
        for label, count in tally.items()
        for number in range(count)
    ]
    for i in _spread([label for _, label, _ in members], seed):
        shard, label, number = members[i]
        try:
            image, _ = data.image(reader.read(shard, data.member(reader, shard, label, number)))
        except BadSample:
            continue  # training replaces the sample too
        yield data.classes[label] if label >= 0 else "", image


def _from_files(config: Experiment) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (label, image) from image files, preprocessed as packing would, in the order of `_spread`."""
    data = config.data
    metadata = Path(data.metadata) if data.metadata else None
    records = catalog.read_catalog(
        Path(data.images), metadata, data.columns, data.classes, data.licences, rename=data.rename
    ).records
    for i in _spread([record.dx for record in records], config.seed):
        try:
            image = images.read(Path(records[i].path), data.channels)
        except (images.BadImage, OSError):
            continue  # `lesiongen pack` lists the file
        shrunk = images.resize_short_side(image, round(data.size / data.preprocess.centre))
        yield records[i].dx, preprocess(images.to_tensor(shrunk), data.preprocess)


def _spread(labels: list, seed: int) -> list[int]:
    """Returns the indices in the order to show them: one random index of each label, then another of each, and so on."""
    seen, ranked = Counter(), []
    for i in random.Random(seed).sample(range(len(labels)), len(labels)):
        ranked.append((seen[labels[i]], labels[i], i))
        seen[labels[i]] += 1
    return [i for *_, i in sorted(ranked)]


def _sheet(labels: list[str], blocks: dict[str, torch.Tensor]) -> Image.Image:
    """Draws the picture.

    Args:
        labels: The label of each row.
        blocks: Heading → uint8 [C, H, W]. All blocks have the same height and one row of views for each label.
    """
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
