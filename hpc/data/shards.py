"""WebDataset shards: writing them with an index, and reading them in a sample order with every checksum verified.

A shard is a plain tar of S samples with M members each. `<shard>.index.safetensors` beside the shard holds offset, size and
crc32 of the members, int64 [S, M] in the order of the tar, and the label of each sample, int32 [S]. With the index, one sample
is read without a search through the tar. Invariant: a sample comes back exactly as it was written, or an error is raised.
Missing, cut or altered bytes are never returned.

The packing code in lesiongen/ingest writes shards. Source reads samples in the sample order. It is the first step of a
webdataset pipeline, and the batches of the pipeline go to training and evaluation.
"""

import atexit
import io
import multiprocessing
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
from typing import Any

import numpy as np
import torch.utils.data
import webdataset as wds
from safetensors.numpy import load, save

from hpc.data.order import SampleOrder, batch_share, contiguous_share, sample_seed
from hpc.data.storage import StorageError, Store
from hpc.errors import UserError
from hpc.run.parent import exit_with_parent
from hpc.run.rundir import atomic_write

os.environ.setdefault("WDS_SECURE", "1")  # shards are untrusted: webdataset must not unpickle members or run shell commands
SUFFIXES = {"jpg", "png", "json"}  # suffixes of the members that a shard may hold
BLOCK = 512  # bytes of a tar header
INDEX = ".index.safetensors"


class BadSample(Exception):
    """Raised if the bytes of a sample are missing, changed or not decodable."""


def write_shard(path: Path, samples: Iterable[dict]) -> int:
    """Writes a shard and its index. The same samples always give the same bytes.

    Args:
        path: Path of the tar.
        samples: {"__key__": str, "<suffix>": bytes, …} each, all with the same suffixes. An optional "__label__", a number,
            goes into the index only; class-balanced sample orders look samples up by label.

    Returns:
        The number of samples.
    """
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
    """Returns the path of a shard's index."""
    return shard.with_name(shard.name + INDEX)


class ShardReader:
    """Reads single samples of finished shards, in any order. Keeps the most recently used shards open.

    Each process needs its own reader. Pickling a reader leaves its open files out.
    """

    def __init__(self, shards: Sequence[tuple[Store, dict]]):
        """Opens no file yet.

        Args:
            shards: For each shard, the store that holds it and its entry in the store's manifest.
        """
        self.shards = list(shards)
        self.open: OrderedDict[int, tuple[int, dict]] = OrderedDict()  # shard → file descriptor, index
        self.members: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # shard → ordinals sorted by label, their labels

    @classmethod
    def local(cls, folder: Path, names: list[str]) -> "ShardReader":
        """Returns a reader of shards of a local folder, without checking their indexes against a manifest."""
        return cls([(Store(folder), {"name": name}) for name in names])

    def read(self, shard: int, ordinal: int) -> dict:
        """Reads one sample and verifies it.

        Args:
            shard: Index of the shard in the list that the reader was made with.
            ordinal: Index of the sample in the shard.

        Returns:
            {"__key__": str, "<suffix>": bytes, …}.

        Raises:
            BadSample: A member is missing, cut or altered, or is not a file with an allowed name.
            StorageError: The shard cannot be fetched.
            UserError: The shard does not fit into the cache.
        """
        descriptor, index = self._open_shard(shard)
        name = f"{self.shards[shard][1]['name']}[{ordinal}]"
        if not 0 <= ordinal < len(index["offset"]):
            raise BadSample(f"{name}: the shard has only {len(index['offset'])} samples")
        length, sample = os.fstat(descriptor).st_size, {}
        for offset, size, crc in zip(*(index[k][ordinal].tolist() for k in ("offset", "size", "crc32")), strict=True):
            if offset < BLOCK or size < 0 or offset + size > length:
                raise BadSample(f"{name}: bytes {offset} to {offset + size} lie outside the shard, which has {length} bytes")
            # One read for the tar header of the member and its content.
            data = os.pread(descriptor, BLOCK + size, offset - BLOCK)
            content = data[BLOCK:]
            if len(content) != size or zlib.crc32(content) != crc:
                raise BadSample(f"{name}: bytes differ from the index")
            key, _, suffix = data[:100].rstrip(b"\0").decode(errors="replace").partition(".")
            is_file = data[156:157] in (b"0", b"\0")  # the header's type; others are links, devices and directories
            allowed = is_file and re.fullmatch(r"[\w-]+", key) and suffix in SUFFIXES and suffix not in sample
            if not allowed or sample.setdefault("__key__", key) != key:
                raise BadSample(f"{name}: member {key + '.' + suffix!r} is not allowed in this sample")
            sample[suffix] = content
        return sample

    def member(self, shard: int, label: int, number: int) -> int:
        """Returns the ordinal of a sample of a class in a shard.

        Args:
            shard: Index of the shard.
            label: The class.
            number: Which of the shard's samples with this label, from 0.

        Raises:
            BadSample: The shard has fewer samples with this label.
        """
        if shard not in self.members:
            labels = self._open_shard(shard)[1]["label"]
            ordinals = np.argsort(labels, kind="stable").astype(np.int32)
            self.members[shard] = (ordinals, labels[ordinals])
        ordinals, labels = self.members[shard]
        i = int(labels.searchsorted(label)) + number
        if i >= len(labels) or labels[i] != label:
            raise BadSample(f"{self.shards[shard][1]['name']} has fewer samples of a label than its manifest says")
        return int(ordinals[i])

    def _open_shard(self, shard: int) -> tuple[int, dict]:
        """Returns the descriptor and the index of a shard, opening both if necessary."""
        if shard not in self.open:
            store, entry = self.shards[shard]
            try:
                index_entry = entry.get("index") or {"name": entry["name"] + INDEX}
                with open(store.open(index_entry), "rb") as file:
                    index = _parse_index(file.read(), index_entry.get("crc32"))
                opened = (store.open(entry), index)
            except (StorageError, UserError):
                raise  # not BadSample: the network or the cache failed, so every replacement would fail too
            except Exception as error:
                raise BadSample(f"{entry['name']} cannot be opened: {error}") from None
            self.open[shard] = opened
            # Keep few descriptors open: a file that was deleted from the cache uses disk space until it is closed.
            if len(self.open) > (4 if store.cache else 32):
                os.close(self.open.popitem(last=False)[1][0])
        self.open.move_to_end(shard)
        return self.open[shard]

    def __getstate__(self):
        # File descriptors are not valid in another process. A data worker opens the shards again.
        return {"shards": self.shards, "open": OrderedDict(), "members": {}}


def _parse_index(content: bytes, crc32: int | None) -> dict[str, np.ndarray]:
    """Parses and checks an index.

    Args:
        content: The bytes of the index.
        crc32: Checksum in the manifest; None if there is no manifest.

    Raises:
        ValueError: The content differs from the manifest or is not an index.
    """
    if crc32 is not None and zlib.crc32(content) != crc32:
        raise ValueError("the index differs from the manifest")
    index = load(content)
    shape = index["offset"].shape
    if len(shape) != 2 or any(index[k].shape != shape or index[k].dtype != np.int64 for k in ("offset", "size", "crc32")):
        raise ValueError("the index is not a table of offset, size and crc32")
    if index["label"].shape != shape[:1]:
        raise ValueError("the index does not have exactly one label for each sample")
    return index


class Source(torch.utils.data.IterableDataset):
    """Yields raw samples in the sample order: the first step of the pipeline that loader() makes.

    Data worker w of W reads the batches w, w + W, w + 2W, …, each as a whole.
    """

    def __init__(self, reader: ShardReader, order: SampleOrder, batches: Callable[[], Iterator[list[tuple[int, int]]]]):
        """Reads nothing yet.

        Args:
            reader: Reads the shards.
            order: Maps a position to (shard, ordinal). Other classes with `sample` and `size` work too.
            batches: Returns an iterator over batches, lists of (position, slot). Called in each data worker.
        """
        self.reader, self.order, self.batches = reader, order, batches

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in islice(self.batches(), first, None, step):
            # Read the whole batch before decoding it. Alternating the two is slower: each evicts the other's code and data
            # from the CPU caches.
            yield from [{"position": position, "slot": slot, **self.fetch(position)} for position, slot in batch]

    def fetch(self, position: int) -> dict:
        """Reads the sample at a position.

        Returns:
            {"shard", "ordinal", "__key__", "<suffix>": bytes, …}, or {"error": str} if the sample is bad.
        """
        try:
            shard, ordinal = self.order.sample(position)  # BadSample: a balanced order looks labels up in an index
            return {"shard": shard, "ordinal": ordinal, **self.reader.read(shard, ordinal)}
        except BadSample as error:
            return {"error": str(error)}

    def decode_or_replace(self, decode: Callable[[dict], dict], raw: dict) -> dict:
        """Decodes a raw sample, or a replacement if the sample is bad.

        The replacement depends on the position only, so it is the same on every rank and after a resume.

        Args:
            decode: Decodes a raw sample; raises BadSample.
            raw: A sample from __iter__.

        Returns:
            The decoded sample and "bad": a list of {"position", "error"}, one for each bad sample that was replaced.

        Raises:
            RuntimeError: The sample and 99 replacements are all bad.
        """
        bad = []
        for n in range(100):
            try:
                if "error" in raw:
                    raise BadSample(raw["error"])
                return {**decode(raw), "bad": bad}
            except BadSample as error:
                bad.append({"position": raw["position"], "error": str(error)})
                replacement = sample_seed(n, raw["position"]) % self.order.size
                raw = {"position": raw["position"], "slot": raw["slot"], **self.fetch(replacement)}
        raise RuntimeError(f"100 samples in a row could not be read; the last error: {bad[-1]['error']}. Check the shards.")


def loader(
    source: Source,
    decode: Callable[[dict], dict],
    collate: Callable[[list[dict]], dict],
    batch: int,
    workers: int,
) -> Iterator[dict]:
    """Returns the batches of a webdataset pipeline: read, decode, collate.

    The data workers start at once. They are spawned, so it must be possible to pickle all arguments. They are not forked,
    because forking a process that runs threads may deadlock. They do not come from a fork server, because such workers keep
    running when the training process is killed.

    Args:
        source: Yields raw samples.
        decode: Decodes a raw sample; raises BadSample if that is impossible.
        collate: Makes a batch of decoded samples. Its NumPy arrays come out as tensors.
        batch: Samples in a batch; must be the size of the source's batches. The last batch may be smaller.
        workers: Number of data workers. 0 = this process reads.
    """
    pipeline = wds.DataPipeline(
        source,
        wds.map(partial(source.decode_or_replace, decode)),
        wds.batched(batch, collation_fn=collate, partial=True),
    )
    return map(_arrays_to_tensors, computed_ahead(pipeline, workers))


def computed_ahead(items: torch.utils.data.Dataset, workers: int) -> Iterator[Any]:
    """Yields what a dataset holds, in order. Data workers compute it ahead, as loader() describes.

    Args:
        items: Yields or indexes what is computed. It must be possible to pickle it.
        workers: Number of data workers. 0 = this process computes.
    """
    options = {}
    if workers:
        options = {"prefetch_factor": 4, "multiprocessing_context": "spawn", "worker_init_fn": _init_worker}
    found = iter(torch.utils.data.DataLoader(items, batch_size=None, num_workers=workers, collate_fn=_no_collate, **options))
    if workers:
        atexit.register(_end_workers, weakref.ref(found))
    return found


def _no_collate(batch: Any) -> Any:
    """Returns the batch unchanged. The default collate function would waste time on the lists of facts in every batch."""
    return batch


def _arrays_to_tensors(batch: dict) -> dict:
    """Converts the arrays of a batch to tensors.

    The receiving process converts, because a small array is cheaper to send than a tensor: a worker sends an array by value,
    but each tensor as a shared file with its own connection.
    """
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}


def _end_workers(found: weakref.ref) -> None:
    """Ends the data workers at exit, if they still run.

    Otherwise Python would send the workers SIGTERM, which they ignore, and then wait for them without end.
    """
    iterator = found()
    if iterator is not None:  # its truth would ask for a length, which a stream has not
        iterator._shutdown_workers()


def _init_worker(_number: int) -> None:
    """Makes a data worker ignore the signals that stop a run.

    Ctrl-C in a terminal and Slurm's warnings reach the workers too. The training process needs its workers until it has saved
    a checkpoint. The workers end with the training process, at whatever moment it is killed.
    """
    exit_with_parent(multiprocessing.parent_process().pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Skip Python's own shutdown, which would abort the process if a thread is still sending a batch.
    atexit.register(os._exit, 0)


def training_batches(start: int, batch: int, micro: int, rank: int, world: int) -> Iterator[list[tuple[int, int]]]:
    """Yields a rank's micro-batches of the endless training sequence.

    Args:
        start: First position; a multiple of the global batch.
        batch: Size of the global batch.
        micro: Size of a micro-batch; divides the rank's share of the batch.
        rank: The rank, from 0.
        world: Number of ranks.

    Yields:
        A micro-batch: a list of (position, slot).
    """
    slots = batch_share(batch, rank, world)
    for step in count(start // batch):
        for first in range(slots.start, slots.stop, micro):
            yield [(step * batch + slot, slot) for slot in range(first, first + micro)]


def evaluation_batches(size: int, micro: int, rank: int, world: int) -> Iterator[list[tuple[int, int]]]:
    """Yields a rank's contiguous share of `size` samples, once. The last batch may be smaller.

    Args:
        size: Number of samples over all ranks.
        micro: Size of a batch.
        rank: The rank, from 0.
        world: Number of ranks.

    Yields:
        A batch: a list of (position, index in the batch).
    """
    share = contiguous_share(size, rank, world)
    for first in range(share.start, share.stop, micro):
        yield [(i, i - first) for i in range(first, min(first + micro, share.stop))]
