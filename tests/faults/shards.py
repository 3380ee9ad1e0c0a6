"""A small shard, its index and its manifest, for tests that damage them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from hpc.data import manifest
from hpc.data.shards import BadSample, ShardReader, index_path
from hpc.data.storage import Store
from launch import verify
from lesiongen.data import images

rng = np.random.default_rng(0)


def sample(i: int) -> dict:
    picture = Image.fromarray(rng.integers(0, 256, (9, 9 + i, 3), dtype=np.uint8))
    return {"__key__": f"k{i}", "jpg": images.encode(picture, "jpg", 90), "json": json.dumps({"image": f"k{i}"}).encode()}


SAMPLES = [sample(i) for i in range(6)]


def describe(folder: Path, **changes) -> None:
    """Writes a manifest that matches the shard and its index; `changes` replace fields of the shard's entry."""
    index = manifest.describe(index_path(folder / "a.tar"))
    entry = manifest.describe(folder / "a.tar", split="train", count=len(SAMPLES), index=index) | changes
    manifest.write(folder, {"schema": 1, "shards": [entry]})


def reader(folder: Path, bare: bool = False) -> ShardReader:
    """Opens the shard with its manifest entry, as a run does, or (bare) without a manifest."""
    entry = {"name": "a.tar"} if bare else manifest.read(folder)["shards"][0]
    return ShardReader([(Store(folder), entry)])


def readable(folder: Path, bare: bool = False) -> list[int]:
    """Returns the numbers of the samples that can be read. These must be exact; all others must raise BadSample."""
    source, found = reader(folder, bare), []
    for i, expected in enumerate(SAMPLES):
        try:
            assert source.read(0, i) == expected
            found.append(i)
        except BadSample:
            pass
    return found


def sample_ends(folder: Path) -> list[int]:
    """Returns the offset in the shard at which each sample ends."""
    index = load_file(index_path(folder / "a.tar"))
    return (index["offset"] + index["size"]).max(1).tolist()


def problems(folder: Path) -> list[str]:
    return verify.verify_path(folder)[1]
