"""The views that the priors were trained on: every row of the code store's training split, as the tokenizer decodes it.

A prior that memorises a training image reproduces its codes, and the sample then shows the decoded codes. So samples are
compared with decoded views, not with photographs, from which the tokenizer's blur would tell them apart. All draws of
augmentation count: a memorised view may be a crop or a turned image.

A polished decoder is told the label of each sample that is written. For the comparison it is told no labels, of views or of
samples, so that a sample is also found if it repeats a view under another label.

Thumbnails and features of the views are computed once and cached file by file beside the codes. The search for the nearest view
(nearest.py) reads one file at a time, so memory does not grow with the number of views.

Shapes: S views of a file, N images, C channels, D features, h × w codes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from hpc.config import digest
from hpc.data.codestore import CodeStore
from hpc.dist import Topology
from lesiongen.evaluation.backbone import Backbone
from lesiongen.evaluation.feature_cache import Columns, Features, Source, cache_folder, cached_columns
from lesiongen.evaluation.reconstructions import decode_batches
from lesiongen.tokenizers.tokenizer import Tokenizer

SIDE = 32  # of the thumbnails, in pixels
HELD_OUT = 2_000  # held-out images, at most, whose distances to the training views set the thresholds


@dataclass(frozen=True)
class Described:
    """Images in the three forms in which they are compared.

    Attributes:
        pixels: Thumbnails, uint8 [N, C, 32, 32].
        features: Features of the backbone, fp16 [N, D]; None without a backbone.
        codes: Codes of each level, [N, h, w].
    """

    pixels: np.ndarray
    features: np.ndarray | None
    codes: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.pixels)


def joined(parts: list[Described]) -> Described:
    """Joins descriptions, in order. `parts` must hold at least one."""
    features = None if parts[0].features is None else np.concatenate([part.features for part in parts])
    codes = {level: np.concatenate([part.codes[level] for part in parts]) for level in parts[0].codes}
    return Described(np.concatenate([part.pixels for part in parts]), features, codes)


def thumbnails(images_NCHW: torch.Tensor) -> np.ndarray:
    """Shrinks uint8 images of any size to uint8 [N, C, 32, 32]. Each pixel is the rounded mean of an area."""
    return F.interpolate(images_NCHW.float(), (SIDE, SIDE), mode="area").round().to(torch.uint8).numpy()


def describe(images_NCHW: torch.Tensor, backbone: Backbone | None) -> Columns:
    """Computes the thumbnails ("pixels") of uint8 images and, with a backbone, their "features", fp16."""
    columns = {"pixels": thumbnails(images_NCHW)}
    if backbone is not None:
        columns["features"] = backbone(images_NCHW).to(torch.float16).numpy()
    return columns


class TrainingViews:
    """All training views, and the held-out images for comparison. Made by training_views().

    Attributes:
        files: (draw, shard) of each file of training views, in the order in which they are searched.
        store: The code store.
        backbone: Computes the features; None to compare without features.
    """

    def __init__(self, store: CodeStore, backbone: Backbone | None, train: Features, held_out: Features):
        """Joins the parts; see training_views().

        Args:
            store: The code store.
            backbone: Computes the features; None to compare without features.
            train: Cached columns of the training files.
            held_out: Cached columns of the held-out files.
        """
        self.store, self.backbone = store, backbone
        self.files = [file[1:] for file in _files(store, ["train"])]
        self.held_out_files = _files(store, held_out_splits(store))
        self.levels = [level["name"] for level in store.levels]
        self._train, self._held_out = train, held_out

    def __len__(self) -> int:
        return len(self._train)

    @property
    def draws(self) -> int:
        """Number of views of each training image."""
        return self.store.draws("train")

    @property
    def kinds(self) -> list[str]:
        """The kinds of distance: "pixels", "features" where there is a backbone, and "codes <level>"."""
        features = [] if self.backbone is None else ["features"]
        return ["pixels", *features, *(f"codes {level}" for level in self.levels)]

    def part(self, index: int) -> Described:
        """Reads the views of one file."""
        draw, shard = self.files[index]
        return self._read(self._train, index, self.store.arrays("train", draw, shard))

    def describe(self, batches: Iterable[torch.Tensor], codes: dict[str, np.ndarray]) -> Described:
        """Describes images that are to be compared with the views.

        Args:
            batches: The images as the tokenizer decodes them, batch by batch, uint8 [B, C, H, W].
            codes: Codes of each level of all images.
        """
        parts = [describe(batch, self.backbone) for batch in batches]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return Described(columns["pixels"], columns.get("features"), {level: codes[level] for level in self.levels})

    def held_out(self, seed: int) -> tuple[Described, np.ndarray]:
        """Returns held-out images as the tokenizer decodes them, whose distances set the thresholds.

        At most HELD_OUT held-out images are drawn; these are one half of them, and unseen() returns the other half.

        Args:
            seed: Seed of the draw.

        Returns:
            The description of the images, and (index in `held_out_files`, ordinal) of each, [N, 2].
        """
        return self._held_out_images(self._halves(seed)[0])

    def unseen(self, seed: int) -> Described:
        """Returns the other half of the held-out images, to which the distances to training views are compared."""
        return self._held_out_images(self._halves(seed)[1])[0]

    def _halves(self, seed: int) -> list[np.ndarray]:
        """Draws held-out images and divides them. Returns their indices, each half sorted; a single image is in both."""
        drawn = np.random.default_rng(seed).permutation(len(self._held_out))[:HELD_OUT]
        return [np.sort(half) if len(half) else drawn for half in np.array_split(drawn, 2)]

    def _held_out_images(self, drawn: np.ndarray) -> tuple[Described, np.ndarray]:
        """Reads held-out images by their indices. Returns their description, and (file, ordinal) of each, [N, 2]."""
        rows = np.empty((len(drawn), 2), np.int64)
        rows[:, 0] = np.searchsorted(self._held_out.starts, drawn, side="right") - 1
        rows[:, 1] = drawn - self._held_out.starts[rows[:, 0]]
        parts = []
        for index in np.unique(rows[:, 0]).tolist():
            ordinals = rows[rows[:, 0] == index, 1]
            whole = self._read(self._held_out, index, self.store.arrays(*self.held_out_files[index]))
            features = None if whole.features is None else whole.features[ordinals]
            codes = {level: array[ordinals] for level, array in whole.codes.items()}
            parts.append(Described(whole.pixels[ordinals], features, codes))
        return joined(parts), rows

    def _read(self, cached: Features, index: int, arrays: Columns) -> Described:
        features = None if self.backbone is None else cached.column(index, "features")
        codes = {level: arrays[f"codes.{level}"] for level in self.levels}
        return Described(cached.column(index, "pixels"), features, codes)


def training_views(
    folder: Path, store: CodeStore, net: Tokenizer, decoder_digest: str, backbone: Backbone | None, topology: Topology
) -> TrainingViews:
    """Decodes and describes all views of the code store, unless the cache holds them. Collective.

    Args:
        folder: Folder of the cache where the code store cannot be written; otherwise the cache lies in the store.
        store: The code store.
        net: A tokenizer that decodes the codes; its decoder may be polished.
        decoder_digest: The digest of the export that `net` was read from.
        backbone: Computes the features; None to compare without features.
        topology: This process among the ranks. Each rank decodes a share of the files.
    """
    made_by = digest({"tokenizer": decoder_digest, "backbone": backbone and backbone.digest, "side": SIDE})
    cache, compute = cache_folder(store.folder, folder), partial(describe, backbone=backbone)
    cached = []
    for splits, what in ((["train"], "training views"), (held_out_splits(store), "held-out views")):
        sources = [_source(store, net, *file) for file in _files(store, splits)]
        cached.append(cached_columns([cache] * len(sources), sources, compute, made_by, topology, what))
    return TrainingViews(store, backbone, *cached)


def held_out_splits(store: CodeStore) -> list[str]:
    """Returns the names of the store's held-out splits."""
    return [split for split in store.manifest["splits"] if split != "train"]


def _files(store: CodeStore, splits: list[str]) -> list[tuple[str, int, int]]:
    """Lists (split, draw, shard) of the files of some splits."""
    return [
        (split, draw, entry["shard"]) for split in splits for draw in range(store.draws(split)) for entry in store.shards(split)
    ]


def _source(store: CodeStore, net: Tokenizer, split: str, draw: int, shard: int) -> Source:
    """Returns a file of the code store as a source of decoded images."""
    entry = store.entry(split, draw, shard)
    batches: Callable[[], Iterator[torch.Tensor]] = partial(_decoded, store, net, split, draw, shard)
    return Source(Path(entry["name"]).stem, f"{entry['crc32']:08x}", entry["count"], batches)


def _decoded(store: CodeStore, net: Tokenizer, split: str, draw: int, shard: int) -> Iterator[torch.Tensor]:
    """Decodes the codes of a file. Yields batches, uint8 [B, C, H, W]."""
    arrays = store.arrays(split, draw, shard)
    codes = {level["name"]: arrays[f"codes.{level['name']}"] for level in store.levels}
    yield from decode_batches(net, codes, None)
