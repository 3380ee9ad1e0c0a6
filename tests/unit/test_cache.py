"""Stores: where they read from, which names and addresses they refuse, and which files the cache keeps."""

import os
import zlib
from pathlib import Path

import pytest

from hpc.data.storage import Cache, CacheConfig, StorageError, Store, is_remote, without_secrets
from hpc.errors import UserError


def write(path: Path, content: bytes) -> dict:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return {"name": path.name, "bytes": len(content), "crc32": zlib.crc32(content)}


def read(store: Store, entry: dict) -> bytes:
    fd = store.open(entry)
    try:
        return os.read(fd, 1 << 20)
    finally:
        os.close(fd)


def cached_names(directory: Path) -> list[str]:
    return sorted(p.name[:5] for p in directory.glob("*.cached"))


def test_a_local_folder_is_read_in_place(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONGEN_CACHE", str(tmp_path / "cache"))
    entry = write(tmp_path / "data" / "a.tar", b"abc")
    store = Store(tmp_path / "data")
    assert read(store, entry) == b"abc" and store.read_small("a.tar") == b"abc"
    assert not (tmp_path / "cache").exists()
    with pytest.raises(FileNotFoundError):
        store.open({**entry, "name": "b.tar"})


def test_a_cache_stages_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    entry = write(tmp_path / "data" / "a.tar", b"abc")
    store = Store(tmp_path / "data", CacheConfig("$SCRATCH/shards"))
    assert read(store, entry) == b"abc"
    (tmp_path / "data" / "a.tar").unlink()
    assert read(store, entry) == b"abc"
    assert cached_names(tmp_path / "scratch" / "shards") == ["a.tar"]
    assert oct((tmp_path / "scratch" / "shards").stat().st_mode)[-3:] == "700", "other users have access"


def test_remote_data_go_to_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("LESIONGEN_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store("s3://bucket/run").cache.directory == tmp_path / ".cache" / "lesiongen"
    monkeypatch.setenv("LESIONGEN_CACHE", "/elsewhere")
    assert Store("s3://bucket/run").cache.directory == Path("/elsewhere")
    assert Store("s3://bucket/run", CacheConfig(str(tmp_path))).cache.directory == tmp_path


def test_an_unset_variable_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(UserError, match=r"\$NOWHERE/x"):
        Store(tmp_path, CacheConfig("$NOWHERE/x"))


@pytest.mark.parametrize(
    "name", ["../a.tar", "/etc/passwd", "a/b.tar", "..", ".hidden", "", "file:///a", "pipe:ls", "s3::a", "a.tar?x", "a\n", 3]
)
@pytest.mark.parametrize("where", ["/data", "https://host/data"])
def test_names_in_manifests_are_plain(where, name):
    with pytest.raises(StorageError, match="not a plain file name"):
        Store(where, CacheConfig("/nowhere")).open({"name": name, "bytes": 1, "crc32": 0})


@pytest.mark.parametrize(
    "where", ["file:///data", "pipe://ls", "simplecache::s3://bucket/x", "zip://a::https://host/b", "ftp://host/x"]
)
def test_addresses_that_run_or_chain_are_refused(where):
    assert is_remote(where)
    with pytest.raises(UserError, match="begins with http"):
        Store(where)


def test_a_signature_goes_behind_the_name_and_is_not_shown():
    address = Store("https://me:word@host/shards/?sig=a/b", CacheConfig("/nowhere")).address("a.tar")
    assert address == "https://me:word@host/shards/a.tar?sig=a/b"
    assert without_secrets(f"GET '{address}' failed") == "GET 'https://host/shards/a.tar' failed"


def test_least_recently_used_go_first_and_strangers_stay(tmp_path):
    entries = [write(tmp_path / "data" / f"{n}.tar", bytes([n]) * 1000) for n in range(4)]
    store = Store(tmp_path / "data", CacheConfig(str(tmp_path / "cache"), 3000 / 1e9))
    (tmp_path / "cache").mkdir()
    stranger = tmp_path / "cache" / "thesis.part"
    stranger.write_bytes(bytes(9999))
    for n in (0, 1, 2, 0):
        read(store, entries[n])
    for age, n in enumerate((0, 2, 1)):  # set access order explicitly, because clocks are coarse
        path = next((tmp_path / "cache").glob(f"{n}.tar-*"))
        os.utime(path, ns=(0, path.stat().st_mtime_ns - age * 10**9))
    read(store, entries[3])
    assert cached_names(tmp_path / "cache") == ["0.tar", "2.tar", "3.tar"] and stranger.exists()


def test_use_makes_a_file_recent(tmp_path):
    entry = write(tmp_path / "data" / "a.tar", b"abc")
    store = Store(tmp_path / "data", CacheConfig(str(tmp_path / "cache")))
    read(store, entry)
    path = next((tmp_path / "cache").glob("a.tar-*"))
    os.utime(path, (1, 1))
    read(store, entry)
    assert path.stat().st_mtime > 1e9


def test_equal_names_of_two_sources_do_not_collide(tmp_path):
    config = CacheConfig(str(tmp_path / "cache"))
    for folder in ("x", "y"):
        assert read(Store(tmp_path / folder, config), write(tmp_path / folder / "a.tar", folder.encode())) == folder.encode()
    assert cached_names(tmp_path / "cache") == ["a.tar", "a.tar"]


def test_a_cached_file_of_another_size_is_fetched_again(tmp_path):
    entry = write(tmp_path / "data" / "a.tar", b"abc")
    store = Store(tmp_path / "data", CacheConfig(str(tmp_path / "cache")))
    read(store, entry)
    next((tmp_path / "cache").glob("a.tar-*")).write_bytes(b"ab")
    assert read(store, entry) == b"abc"


def test_a_limit_below_one_shard(tmp_path):
    entry = write(tmp_path / "data" / "a.tar", bytes(2000))
    with pytest.raises(UserError, match=r"Raise data\.cache\.gigabytes"):
        Store(tmp_path / "data", CacheConfig(str(tmp_path / "cache"), 1e-6)).open(entry)
    with pytest.raises(ValueError, match="above 0"):
        CacheConfig(gigabytes=0)


def test_a_changed_source_is_never_cached(tmp_path):
    entry = write(tmp_path / "data" / "a.tar", b"abc")
    write(tmp_path / "data" / "a.tar", b"abd")
    cache = Cache(tmp_path / "cache", 1000, attempts=2, pause=0)
    with pytest.raises(StorageError, match=f"crc32 .* {entry['crc32']:08x} expected"):
        cache.open(str(tmp_path / "data" / "a.tar"), 3, entry["crc32"])
    assert cached_names(tmp_path / "cache") == []
