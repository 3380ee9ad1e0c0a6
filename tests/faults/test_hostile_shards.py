"""Reading detects shards and indexes that were cut or altered. Other tools can read intact shards."""

import os
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from safetensors.numpy import load_file, save, save_file

from hpc.data import manifest
from hpc.data.shards import BLOCK, BadSample, index_path
from tests.faults.shards import SAMPLES, describe, problems, readable, reader, rng, sample_ends


def test_whole_shards_read_and_verify(folder):
    assert readable(folder) == readable(folder, bare=True) == list(range(6))
    assert problems(folder) == []


@pytest.mark.parametrize("shift", [0, -1, 1])
def test_a_shard_cut_anywhere_is_never_silent(folder, shift):
    shard, ends = folder / "a.tar", sample_ends(folder)
    content = shard.read_bytes()
    for end in range(BLOCK, len(content), BLOCK):
        shard.write_bytes(content[: end + shift])
        assert readable(folder) == [i for i, last in enumerate(ends) if last <= end + shift]
        found = problems(folder)
        assert f"{end + shift} bytes, {len(content)} expected" in found[0]
        assert len(found) == 1 + sum(last > end + shift for last in ends)
    shard.unlink()
    assert readable(folder) == []
    assert "missing" in problems(folder)[0]


def test_single_bits_of_a_shard(folder):
    """Flips one bit of each byte of the tar. Samples that can be read must be exact. `verify` must detect 20 of the flips."""
    shard, index = folder / "a.tar", load_file(index_path(folder / "a.tar"))
    content = bytearray(shard.read_bytes())
    inside = np.zeros(len(content), dtype=bool)
    for offset, size in zip(index["offset"].flat, index["size"].flat, strict=True):
        inside[offset : offset + size] = True
    bits = rng.integers(0, 8, len(content))
    source, crc = reader(folder), zlib.crc32(content)
    fd = os.open(shard, os.O_WRONLY)
    ends = np.array(sample_ends(folder))
    for position, bit in enumerate(bits.tolist()):
        i = min(int(np.searchsorted(ends, position, side="right")), 5)
        os.pwrite(fd, bytes([content[position] ^ (1 << bit)]), position)
        try:
            assert source.read(0, i) == SAMPLES[i]
            assert not inside[position]
        except BadSample:
            pass
        os.pwrite(fd, content[position : position + 1], position)
    os.close(fd)
    for position in rng.integers(0, len(content), 20).tolist():
        content[position] ^= 1
        shard.write_bytes(content)
        assert manifest.crc32_file(shard) != crc and "checksum differs" in problems(folder)[0]
        content[position] ^= 1


@pytest.mark.parametrize("bare", [False, True])
def test_an_index_cut_anywhere(folder, bare):
    path = index_path(folder / "a.tar")
    content = path.read_bytes()
    for end in range(0, len(content), 3):
        path.write_bytes(content[:end])
        assert readable(folder, bare) == []
    assert problems(folder)
    path.unlink()
    assert readable(folder, bare) == []
    assert problems(folder)


@pytest.mark.parametrize("bare", [False, True])
def test_single_bits_of_an_index(folder, bare):
    """With a manifest, an altered index is never used. Without a manifest, reading still never returns wrong bytes."""
    path = index_path(folder / "a.tar")
    content = bytearray(path.read_bytes())
    for position in range(len(content)):
        for bit in (0, 4, 7) if bare else (int(rng.integers(8)),):
            content[position] ^= 1 << bit
            path.write_bytes(content)
            found = readable(folder, bare)
            assert bare or found == []
            content[position] ^= 1 << bit
    content[-1] ^= 1
    path.write_bytes(content)
    assert "checksum differs" in problems(folder)[0]


def change(folder: Path, **arrays: np.ndarray) -> None:
    save_file(load_file(index_path(folder / "a.tar")) | arrays, index_path(folder / "a.tar"))
    describe(folder)


@pytest.mark.parametrize("value", [-1, -(2**62), 2**31, 2**40, 2**62, 2**63 - 1])
@pytest.mark.parametrize("name", ["offset", "size"])
def test_an_index_that_claims_other_places(folder, name, value):
    """The manifest matches this index, but reading must not leave the shard and must not allocate terabytes."""
    table = load_file(index_path(folder / "a.tar"))[name]
    table[2, 0] = value
    change(folder, **{name: table})
    assert 2 not in readable(folder)
    assert problems(folder)


@pytest.mark.parametrize("name", ["offset", "size", "crc32"])
def test_an_index_of_other_shapes_and_kinds(folder, name):
    table = load_file(index_path(folder / "a.tar"))[name]
    for other in (table[:3], table[:, :1], table.ravel(), table.astype(np.float64), table[:0]):
        change(folder, **{name: other})
        assert readable(folder) == []
        assert problems(folder)


def test_an_index_without_what_is_needed(folder):
    index_path(folder / "a.tar").write_bytes(save({"offset": np.zeros((6, 2), dtype=np.int64)}))
    describe(folder)
    assert readable(folder) == []
    index_path(folder / "a.tar").write_bytes(save({"codes": np.zeros(3)}))
    describe(folder)
    assert readable(folder) == []


def test_an_index_of_fewer_samples_than_the_manifest_says(folder):
    index = load_file(index_path(folder / "a.tar"))
    change(folder, **{name: index[name][:4] for name in index})
    assert readable(folder) == [0, 1, 2, 3]
    assert len(problems(folder)) == 2


def test_stock_tools_read_our_shards(folder):
    shard = str(folder / "a.tar")
    found = [{k: s[k] for k in ("__key__", "jpg", "json")} for s in webdataset.WebDataset(shard, shardshuffle=False)]
    assert found == SAMPLES
    decoded = list(webdataset.WebDataset(shard, shardshuffle=False).decode("pil").to_tuple("jpg", "json"))
    assert [image.size for image, _ in decoded] == [(9 + i, 9) for i in range(6)]
    assert [facts["image"] for _, facts in decoded] == [f"k{i}" for i in range(6)]
    with tarfile.open(shard) as tar:
        assert all(member.isreg() and member.mode == 0o444 and member.mtime == 0 for member in tar)
        assert tar.getnames() == [f"k{i}.{suffix}" for i in range(6) for suffix in ("jpg", "json")]


def test_labels_that_are_not_where_the_manifest_says(folder):
    """Balanced streams look labels up in the index before they read a sample."""
    source = reader(folder)
    assert [source.member(0, label, 2) for label in (0, 1)] == [4, 5]
    for label, number in ((0, 3), (1, 3), (2, 0), (-1, 0)):
        with pytest.raises(BadSample, match="fewer samples of a label"):
            source.member(0, label, number)
    change(folder, label=np.zeros(4, dtype=np.int32))
    assert readable(folder) == []


def test_a_process_that_ends_in_the_middle_of_a_stream_ends(folder):
    """At exit Python sends the data worker SIGTERM, which the worker ignores, and waits. The process must end all the same."""
    code = """
from functools import partial
from operator import itemgetter
from pathlib import Path
from hpc.data.order import SampleOrder
from hpc.data.shards import ShardReader, Source, loader, training_batches
batches = partial(training_batches, 0, 2, 2, 0, 1)
stream = loader(Source(ShardReader.local(Path("."), ["a.tar"]), SampleOrder((6,), 2), batches), dict, itemgetter(0), 2, 1)
print(next(stream)["__key__"])
"""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.stdout.strip() in {s["__key__"] for s in SAMPLES}
    assert (done.returncode, done.stderr) == (0, "")
