"""The config section `data`: where the images are, and how they become shards and batches."""

from dataclasses import dataclass, field
from typing import Literal

from hpc.config import volatile
from hpc.data.storage import CacheConfig
from lesiongen.data.augment import PreprocessConfig


@dataclass(frozen=True)
class DataConfig:
    images: str | None = None  # folder, searched recursively
    metadata: str | None = None  # CSV, or a folder of a challenge's; none = labelled by folder, one group per image
    columns: dict[str, str] = field(default_factory=dict)  # our field: column, for an unknown CSV
    classes: tuple[str, ...] = ()  # allowed labels; empty = those found
    rename: dict[str, str] = field(default_factory=dict)  # label as found: label to use, as in {nevus: nv}
    licences: tuple[str, ...] = ()  # allowed ones, such as CC-0 and CC-BY; empty = all
    splits: str | None = None  # CSV of image and split; none = folders train, val, test where the data come so, else by hash
    near_duplicates: bool = False  # find lesions photographed or scanned again, and join their groups
    size: int = 256  # short side in pixels
    channels: Literal[1, 3] = 3
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)  # of every image, once
    format: Literal["jpg", "png"] = "jpg"
    quality: int = 95  # of JPEG; format png is lossless
    val: float = 0.1  # share of lesions
    test: float = 0.1
    shard_samples: int = 1000
    max_rejected: float = volatile(0.05)  # share of images and rows that may be unusable
    processes: int = volatile(0)  # for packing; 0 = one per core, for up to 2,000 images one
    workers: int = volatile(1)  # processes per rank that decode and augment
    cache: CacheConfig = volatile(default_factory=CacheConfig)  # of shards that lie far away
    ledger: bool = volatile(False)  # each rank logs the samples delivered to it

    def __post_init__(self):
        if self.size < 16 or not 1 <= self.quality <= 100 or self.shard_samples < 1:
            raise ValueError("size is at least 16, quality 1 to 100, shard_samples at least 1")
        if not (0 < self.val < 1 and 0 < self.test < 1 and self.val + self.test < 1):
            raise ValueError(f"val={self.val} and test={self.test} must leave something to train on, and be above 0")
        if self.workers < 0 or self.processes < 0 or not 0 <= self.max_rejected <= 1:
            raise ValueError("workers and processes are at least 0, max_rejected lies in 0 to 1")
