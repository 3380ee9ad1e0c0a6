"""The config section `data`: where the images are, how they become shards, and how training reads the shards."""

from dataclasses import dataclass, field
from typing import Literal

from hpc.config import PathText, added, volatile
from hpc.data.storage import CacheConfig
from lesiongen.data.augment import PreprocessConfig


@dataclass(frozen=True)
class DataConfig:
    """The config section `data`. Changing a field that is not volatile makes finished shards stale."""

    images: PathText | None = None  # folder of the images, searched recursively, or an HDF5 file of images
    # CSV file that describes the images, or folder with the CSV files of one challenge. Without it, images that are sorted into
    # folders are labelled by their folder, and every image is a lesion of its own.
    metadata: PathText | None = None
    columns: dict[str, str] = field(default_factory=dict)  # for a CSV of unknown format: {our field: its column}
    classes: tuple[str, ...] = ()  # labels to allow, images with other labels are rejected; empty = all labels
    rename: dict[str, str] = field(default_factory=dict)  # {label in the metadata: label to use}, as in {nevus: nv}
    licences: tuple[str, ...] = ()  # licences to allow, as in [CC-0, CC-BY]; images with others are left out; empty = all
    # CSV file with the split (train, val or test) of each image. Without it, folders named train, val and test decide if the
    # images come in such folders, and else a hash of the lesion's id.
    splits: PathText | None = None
    unlabelled: bool = added(False)  # pack images of which none has a label; otherwise packing stops
    # Pack images without lesion or patient although a column of the metadata looks like one; otherwise packing stops.
    ungrouped: bool = added(False)
    # Which photographs must be in one split: all of a patient and of a lesion (patient), or all of a lesion (lesion).
    group_by: Literal["patient", "lesion"] = added("patient")
    near_duplicates: bool = False  # search for photographs of one lesion under several ids, and keep them in one split
    size: int = 256  # short side of the packed images, and side of the square views that are trained on, in pixels
    channels: Literal[1, 3] = 3  # 3 = RGB, 1 = greyscale
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)  # applied once to every image
    format: Literal["jpg", "png"] = "jpg"  # file format inside the shards; png is lossless
    quality: int = 95  # JPEG quality, 1 to 100; ignored for png
    val: float = 0.1  # fraction of the lesions in the validation split, if a hash decides the splits
    test: float = 0.1  # fraction of the lesions in the test split, if a hash decides the splits
    shard_samples: int = 1000  # most images in one shard
    max_rejected: float = volatile(0.05)  # packing fails if a larger fraction of the images and rows cannot be used
    # Processes per rank that pack. 0 = divide the node's cores among its ranks, but use one process for up to 2,000 images.
    processes: int = volatile(0)
    workers: int = volatile(1)  # processes per rank that decode and augment images; 0 = the rank itself does it
    # Where training images are augmented. workers: by the data workers. device: on the training device, for whole batches; the
    # data workers then only decode. Pixels differ slightly between the two.
    augment_on: Literal["workers", "device"] = volatile("workers")
    # With augment_on: device, hold all decoded training images on the GPU if they take at most a quarter of its free memory.
    resident: Literal["auto", "never"] = volatile("auto")
    cache: CacheConfig = volatile(default_factory=CacheConfig)  # copies of remote or slow shards on the node's own disk
    ledger: bool = volatile(False)  # each rank writes the keys of the samples that it trained on to ledger-<rank>.jsonl

    def __post_init__(self):
        if self.size < 16 or not 1 <= self.quality <= 100 or self.shard_samples < 1:
            raise ValueError("size must be at least 16, quality from 1 to 100, and shard_samples at least 1")
        if not (0 < self.val < 1 and 0 < self.test < 1 and self.val + self.test < 1):
            raise ValueError(f"val={self.val} and test={self.test} must be above 0 and must leave something to train on")
        if self.workers < 0 or self.processes < 0 or not 0 <= self.max_rejected <= 1:
            raise ValueError("workers and processes must be at least 0, and max_rejected from 0 to 1")
