"""Malicious shards and manifests: names that lead out of the folder, and tar members that are not regular files."""

import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from hpc.data import manifest
from hpc.data.shards import BLOCK, BadSample, index_path
from hpc.data.storage import StorageError, Store
from hpc.errors import UserError
from launch import verify
from lesiongen.data.packed import Packed
from tests.faults.shards import describe, problems, readable, reader


def hostile(folder: Path, *members: tarfile.TarInfo | tuple[str, bytes]) -> None:
    """Writes a shard of one sample with the given members, and an index and a manifest that match it."""
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
    with pytest.raises(BadSample, match="is not allowed") as caught:
        reader(folder).read(0, 0)
    assert "\x1b" not in str(caught.value)
    assert any("is not allowed" in line for line in problems(folder))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_members_that_are_no_files_are_refused(folder, kind):
    hostile(folder, link("k.jpg", "/etc/hostname", kind), ("k.json", b"{}"))
    with pytest.raises(BadSample, match="is not allowed"):
        reader(folder).read(0, 0)


def test_two_members_of_one_kind_are_refused(folder):
    hostile(folder, ("k.jpg", b"abc"), ("k.jpg", b"def"))
    with pytest.raises(BadSample, match="is not allowed"):
        reader(folder).read(0, 0)


def test_a_member_that_is_a_link_on_disk_is_read_like_any_file(folder, tmp_path):
    """A shard may be a symbolic link, as data management tools create them. The content is verified all the same."""
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
    for read in (manifest.read, verify.verify_path, lambda where: Packed([where])):
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
