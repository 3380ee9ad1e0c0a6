"""Shards, indexes and manifests that were cut, altered or made by someone with bad intentions."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from safetensors.numpy import load_file, save, save_file

from hpc import manifest
from hpc.errors import UserError
from hpc.shards import BLOCK, BadSample, ShardReader, index_path, write_shard
from hpc.storage import StorageError, Store
from launch import verify
from lesiongen.data import images
from lesiongen.data.packed import Packed

rng = np.random.default_rng(0)


def sample(i: int) -> dict:
    picture = Image.fromarray(rng.integers(0, 256, (9, 9 + i, 3), dtype=np.uint8))
    return {"__key__": f"k{i}", "jpg": images.encode(picture, "jpg", 90), "json": json.dumps({"image": f"k{i}"}).encode()}


SAMPLES = [sample(i) for i in range(6)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A shard of six samples, its index and a manifest."""
    folder = tmp_path_factory.mktemp("whole")
    write_shard(folder / "a.tar", [{**s, "__label__": i % 2} for i, s in enumerate(SAMPLES)])
    describe(folder)
    return folder


@pytest.fixture
def folder(packed, tmp_path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards"))


def describe(folder: Path, **changes) -> None:
    index = manifest.describe(index_path(folder / "a.tar"))
    entry = manifest.describe(folder / "a.tar", split="train", count=len(SAMPLES), index=index) | changes
    manifest.write(folder, {"schema": 1, "shards": [entry]})


def reader(folder: Path, bare: bool = False) -> ShardReader:
    """As a run opens it, by the manifest's entry, or as someone who has only the files."""
    entry = {"name": "a.tar"} if bare else manifest.read(folder)["shards"][0]
    return ShardReader([(Store(folder), entry)])


def readable(folder: Path, bare: bool = False) -> list[int]:
    """The samples that come back, each exact; all others raise BadSample and nothing else."""
    source, found = reader(folder, bare), []
    for i, expected in enumerate(SAMPLES):
        try:
            assert source.read(0, i) == expected
            found.append(i)
        except BadSample:
            pass
    return found


def last_byte(folder: Path) -> list[int]:
    """Of each sample."""
    index = load_file(index_path(folder / "a.tar"))
    return (index["offset"] + index["size"]).max(1).tolist()


def problems(folder: Path) -> list[str]:
    return verify.walk(folder)[1]


def test_whole_shards_read_and_verify(folder):
    assert readable(folder) == readable(folder, bare=True) == list(range(6))
    assert problems(folder) == []


@pytest.mark.parametrize("shift", [0, -1, 1])
def test_a_shard_cut_anywhere_is_never_silent(folder, shift):
    shard, ends = folder / "a.tar", last_byte(folder)
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
    """Every byte of the tar, one bit of it: what is read is exact, and verify sees each flip."""
    shard, index = folder / "a.tar", load_file(index_path(folder / "a.tar"))
    content = bytearray(shard.read_bytes())
    inside = np.zeros(len(content), dtype=bool)
    for offset, size in zip(index["offset"].flat, index["size"].flat, strict=True):
        inside[offset : offset + size] = True
    bits = rng.integers(0, 8, len(content))
    source, crc = reader(folder), zlib.crc32(content)
    fd = os.open(shard, os.O_WRONLY)
    ends = np.array(last_byte(folder))
    for place, bit in enumerate(bits.tolist()):
        i = min(int(np.searchsorted(ends, place, side="right")), 5)
        os.pwrite(fd, bytes([content[place] ^ (1 << bit)]), place)
        try:
            assert source.read(0, i) == SAMPLES[i]
            assert not inside[place]
        except BadSample:
            pass
        os.pwrite(fd, content[place : place + 1], place)
    os.close(fd)
    for place in rng.integers(0, len(content), 20).tolist():
        content[place] ^= 1
        shard.write_bytes(content)
        assert manifest.crc32_file(shard) != crc and "checksum differs" in problems(folder)[0]
        content[place] ^= 1


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
    """With a manifest no altered index is used at all; without one, still no wrong bytes come back."""
    path = index_path(folder / "a.tar")
    content = bytearray(path.read_bytes())
    for place in range(len(content)):
        for bit in (0, 4, 7) if bare else (int(rng.integers(8)),):
            content[place] ^= 1 << bit
            path.write_bytes(content)
            found = readable(folder, bare)
            assert bare or found == []
            content[place] ^= 1 << bit
    content[-1] ^= 1
    path.write_bytes(content)
    assert "checksum differs" in problems(folder)[0]


def change(folder: Path, **arrays: np.ndarray) -> None:
    save_file(load_file(index_path(folder / "a.tar")) | arrays, index_path(folder / "a.tar"))
    describe(folder)


@pytest.mark.parametrize("value", [-1, -(2**62), 2**31, 2**40, 2**62, 2**63 - 1])
@pytest.mark.parametrize("name", ["offset", "size"])
def test_an_index_that_claims_other_places(folder, name, value):
    """Even one that its manifest vouches for reads nothing outside the shard, and asks for no terabytes."""
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


def hostile(folder: Path, *members: tarfile.TarInfo | tuple[str, bytes]) -> None:
    """A shard of one sample with such members, and an index and a manifest that vouch for them."""
    buffer, table = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member in members:
            info, content = (member, b"") if isinstance(member, tarfile.TarInfo) else (tarfile.TarInfo(member[0]), member[1])
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            table.append((tar.offset - -(-len(content) // BLOCK) * BLOCK, len(content), zlib.crc32(content)))
    (folder / "a.tar").write_bytes(buffer.getvalue())
    arrays = {name: np.array([row]) for name, row in zip(("offset", "size", "crc32"), zip(*table, strict=True), strict=True)}
    index_path(folder / "a.tar").write_bytes(save(arrays | {"label": np.zeros(1, dtype=np.int32)}))
    describe(folder, count=1)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_the_harness_makes_readable_shards(folder):
    hostile(folder, ("k.jpg", b"abc"), ("k.json", b"{}"))
    assert reader(folder).read(0, 0) == {"__key__": "k", "jpg": b"abc", "json": b"{}"}


@pytest.mark.parametrize(
    "name",
    [
        "../k.jpg",
        "../../etc/k.jpg",
        "/etc/k.jpg",
        "a/k.jpg",
        "./k.jpg",
        "..jpg",
        ".jpg",
        "k.pyd",
        "k.pkl",
        "k.pickle",
        "k.pth",
        "k.npy",
        "k.jpg.pkl",
        "k",
        "k.JPG",
        "k\n.jpg",
        "k.jpg\x1b[2J",
    ],
)
def test_members_with_other_names_are_refused(folder, name):
    hostile(folder, (name, b"abc"), (name.partition(".")[0] + ".json", b"{}"))
    with pytest.raises(BadSample, match="does not belong here") as caught:
        reader(folder).read(0, 0)
    assert "\x1b" not in str(caught.value)
    assert any("does not belong here" in line for line in problems(folder))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_members_that_are_no_files_are_refused(folder, kind):
    hostile(folder, link("k.jpg", "/etc/hostname", kind), ("k.json", b"{}"))
    with pytest.raises(BadSample, match="does not belong here"):
        reader(folder).read(0, 0)


def test_two_members_of_one_kind_are_refused(folder):
    hostile(folder, ("k.jpg", b"abc"), ("k.jpg", b"def"))
    with pytest.raises(BadSample, match="does not belong here"):
        reader(folder).read(0, 0)


def test_a_member_that_is_a_link_on_disk_is_read_like_any_file(folder, tmp_path):
    """Shards may be links, as data managers make them; what counts is the content."""
    (folder / "a.tar").rename(tmp_path / "elsewhere.tar")
    (folder / "a.tar").symlink_to(tmp_path / "elsewhere.tar")
    assert readable(folder) == list(range(6))
    (tmp_path / "elsewhere.tar").write_bytes(b"another")
    assert readable(folder) == []


EVIL = ["pipe:touch owned", "../a.tar", "/etc/passwd", "a/../../b.tar", "..", "", "file:///etc/passwd", "http://x/y.tar", "a\n"]


@pytest.mark.parametrize("name", [*EVIL, None, 3, ["a.tar"]])
@pytest.mark.parametrize("what", ["shard", "index", "catalog"])
def test_manifests_name_only_files_beside_them(folder, name, what, monkeypatch):
    monkeypatch.chdir(folder)
    facts = json.loads((folder / manifest.NAME).read_text())
    facts["catalogs"] = [{"name": "catalog.csv", "bytes": 0, "crc32": 0, "count": 0}]
    entry = facts["shards"][0]
    {"shard": entry, "index": entry["index"], "catalog": facts["catalogs"][0]}[what]["name"] = name
    (folder / manifest.NAME).write_text(json.dumps(facts))
    for read in (manifest.read, verify.walk, lambda where: Packed([where])):
        with pytest.raises(UserError, match=r"not to be trusted|damaged"):
            read(folder)
    with pytest.raises((StorageError, KeyError)):
        Store(folder).open({"name": name, "bytes": 3, "crc32": 0})
    assert not (folder / "owned").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"shards": 3}', '{"shards": [{}]}', '{"shards": ["a.tar"]}'])
def test_manifests_that_are_none(folder, content):
    (folder / manifest.NAME).write_text(content)
    with pytest.raises(UserError, match="damaged"):
        manifest.read(folder)


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
    """Balanced streams look labels up before they read."""
    source = reader(folder)
    assert [source.member(0, label, 2) for label in (0, 1)] == [4, 5]
    for label, number in ((0, 3), (1, 3), (2, 0), (-1, 0)):
        with pytest.raises(BadSample, match="fewer samples of a label"):
            source.member(0, label, number)
    change(folder, label=np.zeros(4, dtype=np.int32))
    assert readable(folder) == []


def test_a_process_that_ends_in_the_middle_of_a_stream_ends(folder):
    """Its worker ignores the signal that Python would end it with."""
    code = """
from functools import partial
from operator import itemgetter
from pathlib import Path
from hpc.plan import Plan
from hpc.shards import ShardReader, Source, loader, training_batches
batches = partial(training_batches, 0, 2, 2, 0, 1)
stream = loader(Source(ShardReader.local(Path("."), ["a.tar"]), Plan((6,), 2), batches), dict, itemgetter(0), 2, 1)
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
