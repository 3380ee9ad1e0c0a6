"""encode: shards + tokenizer → code store.

The code store has one file for each image shard and augmentation draw, and a manifest that is written last; for the format see
hpc/data/codestore.py. The store is complete: an image that cannot be read ends the stage. The prior stages read the store.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hpc import dist
from hpc.config import to_plain
from hpc.data import manifest
from hpc.data.codestore import code_dtype, file_name, write_codes
from hpc.data.order import sample_seed
from hpc.data.shards import BadSample
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run.progress import progress_bar
from hpc.run.rundir import atomic_write
from lesiongen.data.augment import augment, centre
from lesiongen.data.facts import fact_indices
from lesiongen.data.images import to_float
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.experiment import Experiment
from lesiongen.stages.base import Stage, digest_of, packed, require
from lesiongen.tokenizers.export import load_tokenizer
from lesiongen.tokenizers.tokenizer import Tokenizer


class _File(NamedTuple):
    """One file of the code store, and the number of images in it."""

    split: str
    draw: int
    shard: int
    count: int


def stage(config: Experiment) -> Stage:
    """Returns the stage that encodes all images."""
    identity = {"encode": to_plain(config.encode, volatile=False), "seed": config.seed}
    return Stage("codes", ("shards", "tokenizer"), identity, run)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    """Encodes all images and returns the digest of the manifest. Collective.

    The files are divided among the ranks. A killed stage continues where it stopped: work/ holds the manifest's entry of each
    file that is complete, and a file that equals its entry is kept.
    """
    net, _ = load_tokenizer(require(config, "tokenizer"), topology.device)
    shards = packed(config)
    splits = {name: ImageShards(shards, name) for name in shards.splits}
    mine = _files(config, splits)[topology.rank :: topology.world_size]
    entries: list[dict] = []
    with progress_bar(sum(file.count for file in mine), "encode", shown=topology.leader) as progress:
        for split, draw, shard, count in mine:
            path = folder / file_name(split, draw, shard)
            done = folder / "work" / f"{path.stem}.json"
            entry = _completed(folder, done)
            if entry is None:
                arrays = _encode_shard(config, net, splits[split], draw, shard, shards.vocabularies)
                write_codes(folder, split, draw, shard, arrays)
                contents = {"split": split, "draw": draw, "shard": shard, "set": splits[split].sets[shard]}
                entry = manifest.describe(path, **contents, count=count)
                atomic_write(done, json.dumps(entry).encode())
            entries.append(entry)
            progress.update(count)
    entries = sorted((entry for part in dist.gather(entries) for entry in part), key=lambda entry: entry["name"])
    facts = _describe(config, net, shards, splits)
    return dist.run_on_leader(_finish, folder, facts | {"shards": entries})


def _completed(folder: Path, done: Path) -> dict | None:
    """Returns the entry of a file that an earlier attempt has completed; None if there is none, or the file has changed."""
    try:
        entry = json.loads(done.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return None if manifest.verify(folder, [entry]) else entry


def _finish(folder: Path, content: dict) -> str:
    """Writes the manifest and removes what only a resume needs. Returns the manifest's digest."""
    digest = manifest.write(folder, content)
    shutil.rmtree(folder / "work", ignore_errors=True)
    return digest


def _files(config: Experiment, splits: dict[str, ImageShards]) -> list[_File]:
    """Lists the files of the store. Only the training split has augmented draws."""
    return [
        _File(split, draw, shard, entry["count"])
        for split, data in splits.items()
        for draw in range(config.encode.draws if split == "train" else 1)
        for shard, entry in enumerate(data.entries)
    ]


def _describe(config: Experiment, net: Tokenizer, shards: Packed, splits: dict[str, ImageShards]) -> dict:
    """Returns the manifest without its list of files."""
    grids = net.config.grids(shards.size)
    return {
        "schema": 1,
        "tokenizer": digest_of(config, "tokenizer"),
        "image_shards": digest_of(config, "shards"),
        "splits": list(splits),
        "levels": [
            {
                "name": name,
                "grid": [grids[name], grids[name]],
                "K": net.config.entries,
                "dtype": code_dtype(net.config.entries).name,
                "depth": 1,
            }
            for name in reversed(net.names)
        ],
        "vocabularies": shards.vocabularies,
        "draws": config.encode.draws,
        "counts": {name: len(data) for name, data in splits.items()},
        **shards.about,
    }


@torch.no_grad()
def _encode_shard(
    config: Experiment, net: Tokenizer, data: ImageShards, draw: int, shard: int, vocabularies: dict[str, list[str]]
) -> dict[str, np.ndarray]:
    """Encodes one shard at one draw. Returns the arrays of its file."""
    reader, device = data.reader(), next(net.parameters()).device
    columns: dict[str, list[int]] = {}
    codes: dict[str, list[np.ndarray]] = {name: [] for name in net.names}
    count = data.counts[shard]
    for first in range(0, count, config.encode.batch):
        views = []
        for ordinal in range(first, min(first + config.encode.batch, count)):
            # A code store must hold every image of its shards, so a damaged image ends the stage.
            try:
                image, facts = data.image(reader.read(shard, ordinal))
            except BadSample as error:
                raise UserError(f"The shards in {data.packed.name} are damaged: {error}. See `lesiongen verify`.") from None
            views.append(_view(config, image, data.size, draw, shard, ordinal))
            for column, value in fact_indices(facts, vocabularies).items():
                columns.setdefault(column, []).append(value)
        for name, codes_Bhw in net.encode(to_float(torch.stack(views).to(device))).items():
            codes[name].append(codes_Bhw.cpu().numpy())
    dtype = code_dtype(net.config.entries)
    arrays = {f"codes.{name}": np.concatenate(parts).astype(dtype) for name, parts in codes.items()}
    arrays["index"] = np.arange(count, dtype=np.int64)
    return arrays | {column: np.array(values, dtype=np.int16) for column, values in columns.items()}


def _view(config: Experiment, image_CHW: torch.Tensor, size: int, draw: int, shard: int, ordinal: int) -> torch.Tensor:
    """Returns an image's view at a draw. Draw 0 is unaugmented; the other draws each have a seed for every image."""
    if draw == 0:
        return centre(image_CHW, size)
    seed = sample_seed(config.seed, (draw * 1_000_003 + shard) * 1_000_003 + ordinal)
    return augment(image_CHW, size, config.encode.augment, torch.Generator().manual_seed(seed))
