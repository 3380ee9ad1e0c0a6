"""encode: shards + tokenizer → code store.

The code store has one file for each image shard and augmentation draw, and a manifest that is written last; for the format see
hpc/data/codestore.py. The store is complete: an image that cannot be read ends the stage. The prior stages read the store.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hpc import dist
from hpc.config import to_plain
from hpc.data import manifest
from hpc.data.codestore import code_dtype, file_name, write_codes
from hpc.data.order import sample_seed
from hpc.data.shards import BadSample, computed_ahead
from hpc.data.storage import StorageError
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

    @property
    def name(self) -> str:
        """The file's name in the store."""
        return file_name(self.split, self.draw, self.shard)


def stage(config: Experiment) -> Stage:
    """Returns the stage that encodes all images."""
    identity = {"encode": to_plain(config.encode, volatile=False), "seed": config.seed}
    return Stage("codes", ("shards", "tokenizer"), identity, run, describe=lambda config: f"{config.encode.draws} views")


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    """Encodes all images and returns the digest of the manifest. Collective.

    The files are divided among the ranks. A killed stage continues where it stopped: work/ holds the manifest's entry of each
    file that is complete, and a file that equals its entry is kept.
    """
    net, _ = load_tokenizer(require(config, "tokenizer"), topology.device)
    shards = packed(config)
    splits = {name: ImageShards(shards, name) for name in shards.splits}
    mine = _files(config, splits)[topology.rank :: topology.world_size]
    records = {file: folder / "work" / f"{Path(file.name).stem}.json" for file in mine}
    completed = {file: entry for file, done in records.items() if (entry := _completed(folder, done))}
    left = [file for file in mine if file not in completed]
    views = _Views(config, splits, left)
    batches = computed_ahead(views, min(config.data.workers, len(views)))
    with progress_bar(sum(file.count for file in mine), "encode", shown=topology.leader) as progress:
        progress.update(sum(file.count for file in completed))
        for file in left:
            write_codes(folder, file.split, file.draw, file.shard, _encode_file(net, file, batches, shards.vocabularies))
            contents = {"split": file.split, "draw": file.draw, "shard": file.shard, "set": splits[file.split].sets[file.shard]}
            completed[file] = manifest.describe(folder / file.name, **contents, count=file.count)
            atomic_write(records[file], json.dumps(completed[file]).encode())
            progress.update(file.count)
    del batches  # ends the data workers
    gathered = dist.gather(list(completed.values()))
    entries = sorted((entry for part in gathered for entry in part), key=lambda entry: entry["name"])
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
def _encode_file(
    net: Tokenizer,
    file: _File,
    batches: Iterator[tuple[torch.Tensor, list[dict]] | Exception],
    vocabularies: dict[str, list[str]],
) -> dict[str, np.ndarray]:
    """Encodes the images of one file. Returns the arrays of the file.

    Args:
        net: The tokenizer.
        file: The file.
        batches: What _Views computes; the file's batches come next.
        vocabularies: Values of each fact that has a vocabulary.

    Raises:
        UserError, StorageError: An image cannot be read.
    """
    device = next(net.parameters()).device
    columns: dict[str, list[int]] = {}
    codes: dict[str, list[np.ndarray]] = {name: [] for name in net.names}
    count = 0
    while count < file.count:
        found = next(batches)
        if isinstance(found, Exception):
            raise found
        images_BCHW, facts = found
        count += len(facts)
        for each in facts:
            for column, value in fact_indices(each, vocabularies).items():
                columns.setdefault(column, []).append(value)
        for name, codes_Bhw in net.encode(to_float(images_BCHW.to(device))).items():
            codes[name].append(codes_Bhw.cpu().numpy())
    dtype = code_dtype(net.config.entries)
    arrays = {f"codes.{name}": np.concatenate(parts).astype(dtype) for name, parts in codes.items()}
    arrays["index"] = np.arange(count, dtype=np.int64)
    return arrays | {column: np.array(values, dtype=np.int16) for column, values in columns.items()}


class _Views(torch.utils.data.Dataset):
    """The batches of views of some files, one after the other. Data workers compute them."""

    def __init__(self, config: Experiment, splits: dict[str, ImageShards], files: list[_File]):
        self.config, self.splits = config, splits
        self.readers = {split: data.reader() for split, data in splits.items()}
        self.batches = [(file, first) for file in files for first in range(0, file.count, config.encode.batch)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, list[dict]] | Exception:
        """Returns the views of a batch, uint8 [B, C, H, W], and the facts of each image; or the error if one cannot be read.

        A code store must hold every image of its shards, so one such image ends the stage. An error that is raised in a data
        worker would reach the user as the text of a traceback.
        """
        (split, draw, shard, count), first = self.batches[number]
        data, views, found = self.splits[split], [], []
        for ordinal in range(first, min(first + self.config.encode.batch, count)):
            try:
                image, facts = data.image(self.readers[split].read(shard, ordinal))
            except BadSample as error:
                return UserError(f"The shards in {data.packed.name} are damaged: {error}. See `lesiongen verify`.")
            except (UserError, StorageError) as error:
                return error
            views.append(_view(self.config, image, data.size, draw, shard, ordinal))
            found.append(facts)
        return torch.stack(views), found


def _view(config: Experiment, image_CHW: torch.Tensor, size: int, draw: int, shard: int, ordinal: int) -> torch.Tensor:
    """Returns an image's view at a draw. Draw 0 is unaugmented; the other draws each have a seed for every image."""
    if draw == 0:
        return centre(image_CHW, size)
    seed = sample_seed(config.seed, (draw * 1_000_003 + shard) * 1_000_003 + ordinal)
    return augment(image_CHW, size, config.encode.augment, torch.Generator().manual_seed(seed))
