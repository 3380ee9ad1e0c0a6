"""WebDataset shards: deterministic writing with an index, and reading under a plan with every checksum verified.

A shard is a plain tar. Beside it `<shard>.index.safetensors` holds offset, size and crc32 of each member as [S, M]
(S samples, M members of a sample in the order they lie), so that a sample is one positioned read and a cut or altered
shard is never silent, and the label of each sample as [S]. The plan's reader is the source of an ordinary webdataset
pipeline.
"""

import atexit
import io
import os
import re
import signal
import tarfile
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch.utils.data
import webdataset as wds
from safetensors.numpy import load, save

from hpc.data.order import SampleOrder, batch_share, contiguous_share, sample_seed
from hpc.data.storage import StorageError, Store
from hpc.errors import UserError
from hpc.run.rundir import atomic_write

os.environ.setdefault("WDS_SECURE", "1")  # no pickles, no shell: shards are untrusted
SUFFIXES = {"jpg", "png", "json"}
BLOCK = 512
INDEX = ".index.safetensors"


class BadSample(Exception):
    """A sample whose bytes are missing, changed or not decodable."""


def write_shard(path: Path, samples: Iterable[dict]) -> int:
    """Writes {"__key__": str, "<suffix>": bytes, …} as a tar and its index; same samples, same bytes. Returns the count.

    "__label__", a number, goes into the index only: streams that are balanced over labels find their samples by it."""
    buffer, labels = io.BytesIO(), []
    with wds.TarWriter(buffer, user="lesiongen", group="lesiongen", mtime=0.0, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
            labels.append(sample.get("__label__", -1))
    number = len(labels)
    content = buffer.getvalue()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = [(m.offset_data, m.size, zlib.crc32(content[m.offset_data : m.offset_data + m.size])) for m in tar]
    table = np.array(members, dtype=np.int64).reshape(number, len(members) // max(1, number), 3)
    index = {name: np.ascontiguousarray(table[..., i]) for i, name in enumerate(("offset", "size", "crc32"))}
    index["label"] = np.array(labels, dtype=np.int32)
    atomic_write(index_path(path), save(index))
    atomic_write(path, content)
    return number


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + INDEX)


class ShardReader:
    """Random access to the samples of finished shards. Not shared between processes; keeps a few shards open.

    shards: the store that holds each, and its entry in the manifest"""

    def __init__(self, shards: Sequence[tuple[Store, dict]]):
        self.shards = list(shards)
        self.open: OrderedDict[int, tuple[int, dict]] = OrderedDict()
        self.members: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def local(cls, folder: Path, names: list[str]) -> "ShardReader":
        return cls([(Store(folder), {"name": name}) for name in names])

    def read(self, shard: int, ordinal: int) -> dict:
        """{"__key__", "<suffix>": bytes, …}. Raises BadSample for missing, cut, altered or foreign members."""
        fd, index = self._shard(shard)
        where = f"{self.shards[shard][1]['name']}[{ordinal}]"
        if not 0 <= ordinal < len(index["offset"]):
            raise BadSample(f"{where}: the shard has {len(index['offset'])} samples")
        length, sample = os.fstat(fd).st_size, {}
        for offset, size, crc in zip(*(index[k][ordinal].tolist() for k in ("offset", "size", "crc32")), strict=True):
            if offset < BLOCK or size < 0 or offset + size > length:
                raise BadSample(f"{where}: bytes {offset} to {offset + size} lie outside the shard, which has {length}")
            data = os.pread(fd, BLOCK + size, offset - BLOCK)
            content = data[BLOCK:]
            if len(content) != size or zlib.crc32(content) != crc:
                raise BadSample(f"{where}: bytes differ from the index")
            key, _, suffix = data[:100].rstrip(b"\0").decode(errors="replace").partition(".")
            plain = data[156:157] in (b"0", b"\0") and re.fullmatch(r"[\w-]+", key)  # a file, not a link or a device
            if not plain or suffix not in SUFFIXES or suffix in sample or sample.setdefault("__key__", key) != key:
                raise BadSample(f"{where}: member {key + '.' + suffix!r} does not belong here")
            sample[suffix] = content
        return sample

    def member(self, shard: int, label: int, number: int) -> int:
        """Ordinal of a label's member `number` in a shard."""
        if shard not in self.members:
            labels = self._shard(shard)[1]["label"]
            order = np.argsort(labels, kind="stable").astype(np.int32)
            self.members[shard] = (order, labels[order])
        order, labels = self.members[shard]
        place = int(labels.searchsorted(label)) + number
        if place >= len(labels) or labels[place] != label:
            raise BadSample(f"{self.shards[shard][1]['name']} has fewer samples of a label than its manifest says")
        return int(order[place])

    def _shard(self, shard: int) -> tuple[int, dict]:
        if shard not in self.open:
            store, entry = self.shards[shard]
            try:
                described = entry.get("index") or {"name": entry["name"] + INDEX}
                with open(store.open(described), "rb") as file:
                    index = _index(file.read(), described.get("crc32"))
                found = (store.open(entry), index)
            except (StorageError, UserError):
                raise  # of the network or the cache, not of this sample
            except Exception as error:
                raise BadSample(f"{entry['name']} cannot be opened: {error}") from None
            self.open[shard] = found
            if len(self.open) > (4 if store.cache else 32):  # a file that the cache gave up holds its room until closed
                os.close(self.open.popitem(last=False)[1][0])
        self.open.move_to_end(shard)
        return self.open[shard]

    def __getstate__(self):  # file descriptors stay behind when a worker starts
        return {"shards": self.shards, "open": OrderedDict(), "members": {}}


def _index(content: bytes, crc32: int | None) -> dict[str, np.ndarray]:
    """Raises ValueError for an index that is none, or not the manifest's."""
    if crc32 is not None and zlib.crc32(content) != crc32:
        raise ValueError("the index differs from the manifest")
    index = load(content)
    shape = index["offset"].shape
    if len(shape) != 2 or any(index[k].shape != shape or index[k].dtype != np.int64 for k in ("offset", "size", "crc32")):
        raise ValueError("the index is no table of offset, size and crc32")
    if index["label"].shape != shape[:1]:
        raise ValueError("the index has not one label for each sample")
    return index


class Source(torch.utils.data.IterableDataset):
    """Yields raw samples in the order of the plan: each worker takes whole batches, in turn.

    batches: function that returns an iterator over lists of (position, slot); called in each worker
    """

    def __init__(self, reader: ShardReader, plan: SampleOrder, batches: Callable[[], Iterator[list[tuple[int, int]]]]):
        self.reader, self.plan, self.batches = reader, plan, batches

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in islice(self.batches(), first, None, step):
            # Read as a whole: between two images that are decoded, this code would find the processor's caches cold.
            yield from [{"position": position, "slot": slot, **self.fetch(position)} for position, slot in batch]

    def fetch(self, position: int) -> dict:
        try:
            shard, ordinal = self.plan.sample(position)  # which looks into an index where labels are balanced
            return {"shard": shard, "ordinal": ordinal, **self.reader.read(shard, ordinal)}
        except BadSample as error:
            return {"error": str(error)}

    def decoded(self, decode: Callable[[dict], dict], raw: dict) -> dict:
        """The decoded sample; a bad one is replaced by a deterministic other one, which "bad" then says."""
        bad = []
        for n in range(100):
            try:
                if "error" in raw:
                    raise BadSample(raw["error"])
                return {**decode(raw), "bad": bad}
            except BadSample as error:
                bad.append({"position": raw["position"], "error": str(error)})
                other = sample_seed(n, raw["position"]) % self.plan.size
                raw = {"position": raw["position"], "slot": raw["slot"], **self.fetch(other)}
        raise RuntimeError(f"100 replacements in a row could not be read; the last: {bad[-1]['error']}")


def loader(source: Source, decode, collate, batch: int, workers: int) -> Iterator:
    """The webdataset pipeline: plan's source → decode → batch; `workers` processes, none for 0. They start at once.

    Workers are spawned, so everything handed in must pickle: a fork of a process that runs threads may deadlock, and
    those of a fork server outlive a trainer that is killed."""
    pipeline = wds.DataPipeline(
        source, wds.map(partial(source.decoded, decode)), wds.batched(batch, collation_fn=collate, partial=True)
    )
    extra = {"collate_fn": _as_it_is}
    if workers:
        extra |= {"prefetch_factor": 4, "multiprocessing_context": "spawn", "worker_init_fn": _worker}
    batches = iter(wds.WebLoader(pipeline, batch_size=None, num_workers=workers, **extra))
    atexit.register(_close, weakref.ref(batches))
    return map(_tensors, batches)


def _as_it_is(batch):
    """Batches are ready; the loader would walk through all their facts in search of arrays."""
    return batch


def _tensors(batch: dict) -> dict:
    """Arrays as tensors: between processes a small array goes by value, a tensor as a file with a connection of its own."""
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}


def _close(batches: weakref.ref) -> None:
    """At exit Python sends workers SIGTERM, which they ignore, and then waits for them: they have to end before."""
    if alive := batches():
        alive.close()


def _worker(_number: int) -> None:
    """A terminal's Ctrl-C and Slurm's warnings reach workers too; they end when their trainer does, which saves first."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    atexit.register(os._exit, 0)  # a thread that still sends a batch would abort the process if Python took itself apart


def training_batches(start: int, batch: int, micro: int, rank: int, world: int) -> Iterator[list[tuple[int, int]]]:
    """This rank's micro-batches of (position, slot) from global position `start`, a multiple of the batch, for ever."""
    slots = batch_share(batch, rank, world)
    for step in count(start // batch):
        for first in range(slots.start, slots.stop, micro):
            yield [(step * batch + slot, slot) for slot in range(first, first + micro)]


def evaluation_batches(size: int, micro: int, rank: int, world: int) -> Iterator[list[tuple[int, int]]]:
    """This rank's contiguous share of `size` samples, once, in batches of `micro`; the last may be smaller."""
    part = contiguous_share(size, rank, world)
    for first in range(part.start, part.stop, micro):
        yield [(i, i - first) for i in range(first, min(first + micro, part.stop))]
