"""encode: shards + tokenizer → code store, one file per image shard and augmentation draw."""

from pathlib import Path

import numpy as np
import torch

from hpc import dist
from hpc.config import plain
from hpc.data import manifest
from hpc.data.codestore import code_dtype, file_name, write_codes
from hpc.data.order import sample_seed
from hpc.data.shards import BadSample
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run.progress import bar
from lesiongen.data.augment import augment, centre
from lesiongen.data.facts import columns_of
from lesiongen.data.images import to_float
from lesiongen.data.stream import ImageShards
from lesiongen.experiment import Experiment
from lesiongen.stages.base import Stage, digest_of, packed, require
from lesiongen.tokenizers.export import load_tokenizer
from lesiongen.tokenizers.tokenizer import Tokenizer


def stage(config: Experiment) -> Stage:
    identity = {"encode": plain(config.encode, volatile=False), "seed": config.seed}
    return Stage("codes", ("shards", "tokenizer"), identity, run)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    """Files are divided among ranks; those that exist are kept. Rank 0 commits the manifest. Returns its digest."""
    net, _ = load_tokenizer(require(config, "tokenizer"), topology.device)
    shards = packed(config)
    splits = {name: ImageShards(shards, name) for name in shards.splits}
    vocabularies = shards.vocabularies
    jobs = [
        (split, draw, shard, entry["count"])
        for split, data in splits.items()
        for draw in range(config.encode.draws if split == "train" else 1)
        for shard, entry in enumerate(data.entries)
    ]
    entries: list[dict] = []
    mine = jobs[topology.rank :: topology.world]
    with bar(sum(j[-1] for j in mine), "encode", shown=topology.leader) as progress:
        for split, draw, shard, count in mine:
            if not (folder / file_name(split, draw, shard)).exists():
                arrays = _encode_shard(config, net, splits[split], draw, shard, vocabularies)
                write_codes(folder, split, draw, shard, arrays)
            path = folder / file_name(split, draw, shard)
            place = {"split": split, "draw": draw, "shard": shard, "set": splits[split].sets[shard]}
            entries.append(manifest.describe(path, **place, count=count))
            progress.update(count)
    entries = sorted((e for part in dist.gather(entries) for e in part), key=lambda e: e["name"])
    grids = net.config.grids(shards.size)
    facts = {
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
        "vocabularies": vocabularies,
        "draws": config.encode.draws,
        "counts": {name: len(data) for name, data in splits.items()},
        **shards.about,
    }
    return dist.run_on_leader(manifest.write, folder, facts | {"shards": entries})


@torch.no_grad()
def _encode_shard(config, net: Tokenizer, data: ImageShards, draw: int, shard: int, vocabularies) -> dict[str, np.ndarray]:
    reader, device = data.reader(), next(net.parameters()).device
    rows: dict[str, list] = {"index": []}
    codes: dict[str, list] = {name: [] for name in net.names}
    pending: list[torch.Tensor] = []

    def flush() -> None:
        for name, found in net.encode(to_float(torch.stack(pending).to(device))).items():
            codes[name].append(found.cpu().numpy())
        pending.clear()

    for ordinal in range(data.counts[shard]):
        try:  # an altered shard ends the stage: a store must be complete
            image, facts = data.image(reader.read(shard, ordinal))
        except BadSample as error:
            raise UserError(f"The shards in {data.packed.name} are damaged: {error}. See `lesiongen verify`.") from None
        if draw == 0:
            view = centre(image, data.size)
        else:
            seed = sample_seed(config.seed, (draw * 1_000_003 + shard) * 1_000_003 + ordinal)
            view = augment(image, data.size, config.encode.augment, torch.Generator().manual_seed(seed))
        pending.append(view)
        rows["index"].append(ordinal)
        for column, value in columns_of(facts, vocabularies).items():
            rows.setdefault(column, []).append(value)
        if len(pending) == config.encode.batch:
            flush()
    if pending:
        flush()
    kind = code_dtype(net.config.entries)
    arrays = {f"codes.{name}": np.concatenate(found).astype(kind) for name, found in codes.items()}
    arrays["index"] = np.array(rows.pop("index"), dtype=np.int64)
    return arrays | {column: np.array(values, dtype=np.int16) for column, values in rows.items()}
