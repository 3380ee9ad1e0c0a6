"""Prepares images from outside as the training images of a tokenizer were prepared."""

from pathlib import Path

import torch
from PIL import Image

from hpc.config import from_plain
from lesiongen.data import images
from lesiongen.data.augment import PreprocessConfig, centre, preprocess


class Preparation:
    """Resizes, preprocesses and crops images. Made from the facts in a tokenizer's export."""

    def __init__(self, facts: dict):
        """Reads size, channels and preprocessing from the content of an export's config.yaml."""
        self.size, self.channels = facts["size"], facts["channels"]
        self.preprocess = from_plain(PreprocessConfig, facts["preprocess"])

    def __call__(self, source: str | Path | Image.Image) -> torch.Tensor:
        """Prepares an image file or a PIL image. Returns uint8 [C, size, size].

        Raises:
            BadImage: The image cannot be used.
            OSError: The file cannot be read.
        """
        if isinstance(source, Image.Image):
            image = source.convert("RGB" if self.channels == 3 else "L")
        else:
            image = images.read(Path(source), self.channels)
        image = images.resize_short_side(image, round(self.size / self.preprocess.centre))
        return centre(preprocess(images.to_tensor(image), self.preprocess), self.size)
