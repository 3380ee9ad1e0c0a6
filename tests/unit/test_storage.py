"""Shards, code stores and run directories: damage and locks are detected, and finished results are never changed."""

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from safetensors.numpy import load_file

from hpc.data import manifest
from hpc.data.codestore import CodeStore, code_dtype, write_codes
from hpc.data.shards import BadSample, ShardReader, write_shard
from hpc.errors import UserError
from hpc.run import rundir
from hpc.run.rundir import StageDir, lock


def samples(number: int) -> list[dict]:
    return [{"__key__": f"k{i}", "jpg": bytes([i]) * (300 + i), "json": json.dumps({"i": i}).encode()} for i in range(number)]


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "a.tar", samples(9))
    return tmp_path / "a.tar"


def test_stock_webdataset_and_tar_read_the_shards(shard):
    found = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [(s["__key__"], s["jpg"], s["json"]) for s in found] == [(s["__key__"], s["jpg"], s["json"]) for s in samples(9)]
    with tarfile.open(shard) as tar:
        assert tar.getnames() == [f"k{i}.{suffix}" for i in range(9) for suffix in ("jpg", "json")]


def test_same_samples_same_bytes(shard, tmp_path):
    write_shard(tmp_path / "b.tar", samples(9))
    assert (tmp_path / "b.tar").read_bytes() == shard.read_bytes()


def test_random_access(shard):
    reader = ShardReader.local(shard.parent, [shard.name])
    for i in (8, 0, 4):
        assert reader.read(0, i) == samples(9)[i]


def test_a_cut_shard_is_never_silent(shard):
    content = shard.read_bytes()
    whole = len(content)
    for end in range(0, whole - 10240, 512):  # the last 10 kB of a tar are padding
        shard.write_bytes(content[:end])
        reader = ShardReader.local(shard.parent, [shard.name])
        read = 0
        for i in range(9):
            try:
                assert reader.read(0, i) == samples(9)[i]
                read += 1
            except BadSample:
                pass
        assert read < 9 or end >= tarfile.BLOCKSIZE * 36 - 512, end


def test_every_flipped_bit_of_content_is_found(shard):
    content = bytearray(shard.read_bytes())
    index = load_file(str(shard) + ".index.safetensors")
    for i in range(9):
        for member in range(2):
            position = int(index["offset"][i, member]) + 7
            content[position] ^= 1
            shard.write_bytes(content)
            with pytest.raises(BadSample, match="differ"):
                ShardReader.local(shard.parent, [shard.name]).read(0, i)
            content[position] ^= 1


def test_foreign_members_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("../k0.jpg", "k0.pyd"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    (tmp_path / "y.tar").write_bytes((tmp_path / "x.tar").read_bytes())
    write_shard(tmp_path / "x.tar", [{"__key__": "k0", "jpg": b"abc", "json": b"abc"}])
    (tmp_path / "x.tar").write_bytes((tmp_path / "y.tar").read_bytes())
    with pytest.raises(BadSample):
        ShardReader.local(tmp_path, ["x.tar"]).read(0, 0)


def test_codes_read_back_and_damage_is_named(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"codes.top": rng.integers(0, 300, (5, 2, 3)).astype(code_dtype(300)), "label": np.arange(5, dtype=np.int16)}
    write_codes(tmp_path, "train", 0, 0, arrays)
    entry = manifest.describe(tmp_path / "train-00-000000.safetensors", split="train", draw=0, shard=0, count=5)
    manifest.write(tmp_path, {"levels": [], "shards": [entry]})
    store = CodeStore(tmp_path)
    found = store.gather_rows("train", [(0, 0, 4), (0, 0, 1)], ["codes.top", "label"])
    assert np.array_equal(found["codes.top"], arrays["codes.top"][[4, 1]])
    assert found["label"].tolist() == [4, 1]
    with pytest.raises(UserError, match="no split 'val'"):
        store.shards("val")
    path = tmp_path / "train-00-000000.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    assert "bytes" in manifest.verify(tmp_path, store.manifest["shards"])[0]
    with pytest.raises(UserError, match="cannot be read"):
        CodeStore(tmp_path).all("train", 0, ["label"])


def test_dtypes():
    assert [code_dtype(k).name for k in (2, 256, 257, 65536, 65537)] == ["uint8", "uint8", "uint16", "uint16", "int32"]


def test_a_stage_is_refused_when_it_was_made_from_something_else(tmp_path):
    one = StageDir(tmp_path / "s", {"model": {"codes": 512}}, {"shards": "abc"}, target=10)
    one.begin()
    assert not one.done()
    one.finish("d1")
    assert one.done()
    assert not StageDir(one.path, one.identity, one.inputs, target=20).done(), "a stage with a larger target must be unfinished"
    other = StageDir(one.path, {"model": {"codes": 256}}, {"shards": "xyz"})
    with pytest.raises(UserError, match=r"model.codes: 512 → 256; input.shards: 'abc' → 'xyz'.*--fresh s"):
        other.check()
    assert one.digest == "d1"
    other.delete()
    assert not one.path.exists()


def test_locks_exclude_and_say_who(tmp_path):
    with lock(tmp_path):
        with pytest.raises(UserError, match="in use by another process"), lock(tmp_path):
            pass
    with lock(tmp_path):
        pass


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    rundir.atomic_write(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rundir.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        rundir.atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
