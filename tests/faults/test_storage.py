"""The cache of shards under faults: cut, altered and failing transfers, many processes, kills, eviction.

`Server` is a real HTTP server that misbehaves on request. The tests of `lesiongen download` use it too.
"""

import errno
import http.server
import multiprocessing
import os
import pickle
import random
import signal
import threading
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from hpc.data.storage import CacheConfig, StorageError, Store
from hpc.errors import UserError

pytest.importorskip("aiohttp")


class Server(http.server.ThreadingHTTPServer):
    """An HTTP server. files: path → content. faults: path → what goes wrong with its next GET requests, in order."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        self.files, self.faults, self.etag = files, {}, '"1"'
        self.ranges = self.if_range = True
        self.log: list[tuple[str, str, str]] = []  # method, path, Range
        self.half_sent, self.send_rest = threading.Event(), threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self) -> Counter:
        return Counter(path for method, path, _ in self.log if method == "GET")

    def __exit__(self, *args):
        self.send_rest.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a test killed the client; print no traceback


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, wanted = self.path.partition("?")[0], self.headers.get("Range", "") * self.server.ranges
        if self.server.if_range and self.headers.get("If-Range", self.server.etag) != self.server.etag:
            wanted = ""
        self.server.log.append((self.command, path, wanted))
        fault = (self.server.faults.get(path) or [""]).pop(0) if self.command == "GET" else ""
        content = self.server.files.get(path)
        if fault == "500" or content is None:
            return self.send_error(500 if fault else 404)
        first, last = 0, len(content)
        if wanted:
            a, _, b = wanted.removeprefix("bytes=").partition("-")
            first, last = int(a), min(int(b) + 1, last) if b else last
            if first >= len(content):
                return self.send_error(416)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(content)}")
        self.send_header("Content-Length", str(last - first))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        if self.command == "HEAD":
            return None
        body = content[first:last]
        half = len(body) // 2
        if fault == "flip":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        self.wfile.write(body[:half])
        if fault == "wait":
            self.wfile.flush()
            self.server.half_sent.set()
            self.server.send_rest.wait(20)
        if fault != "cut":
            self.wfile.write(body[half:])

    def log_message(self, *args):
        pass


def content_of(n: int, size: int = 300_000) -> bytes:
    return random.Random(n).randbytes(size)


def entry(name: str, content: bytes) -> dict:
    return {"name": name, "bytes": len(content), "crc32": zlib.crc32(content)}


@pytest.fixture
def server():
    with Server({f"/shards/{n}.tar": content_of(n) for n in range(6)}) as server:
        yield server


ENTRIES = [entry(f"{n}.tar", content_of(n)) for n in range(6)]


def read_file(store: Store, wanted: dict) -> bytes:
    fd = store.open(wanted)
    try:
        return os.pread(fd, wanted["bytes"] + 1, 0)
    finally:
        os.close(fd)


def store_of(where: str, directory: Path, shards: float = 100) -> Store:
    store = Store(where, CacheConfig(str(directory), shards * 300_000 / 1e9))
    store.cache = replace(store.cache, pause=0.01)
    return store


def cached_bytes(directory: Path) -> int:
    """Returns the bytes in the cache, with unfinished files. An upper bound while other processes change the cache."""
    total = 0
    for path in directory.glob("*.tar-*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.mark.parametrize("fault", ["cut", "flip", "500"])
def test_a_bad_transfer_is_repeated_and_never_kept(server, tmp_path, fault):
    store = store_of(server.url + "/shards", tmp_path)
    server.faults["/shards/0.tar"] = [fault, fault]
    assert read_file(store, ENTRIES[0]) == content_of(0)
    assert read_file(store, ENTRIES[0]) == content_of(0)
    assert server.gets() == {"/shards/0.tar": 3}


@pytest.mark.parametrize(("fault", "words"), [("cut", "Payload"), ("flip", "crc32"), ("500", "500")])
def test_after_some_attempts_the_error_names_what_differed(server, tmp_path, fault, words):
    store = store_of(server.url + "/shards?signature=secret", tmp_path)
    server.faults["/shards/0.tar"] = [fault] * 99
    with pytest.raises(StorageError, match=words) as error:
        store.open(ENTRIES[0])
    assert "/shards/0.tar" in str(error.value) and "secret" not in str(error.value)
    assert server.gets() == {"/shards/0.tar": 5}
    assert not list(tmp_path.glob("*.tar-*")), "a failed transfer left a file"


def test_a_file_that_is_not_there_is_asked_for_once(server, tmp_path):
    with pytest.raises(StorageError, match="does not exist"):
        store_of(server.url + "/shards", tmp_path).open(entry("9.tar", b"x"))
    with pytest.raises(FileNotFoundError):
        store_of(server.url + "/shards", tmp_path).read_small("9.json")
    assert server.gets() == {"/shards/9.tar": 1, "/shards/9.json": 1}


def test_a_server_that_is_gone(server, tmp_path):
    store = store_of("http://127.0.0.1:9/shards", tmp_path)
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9/shards/0\.tar could not be read"):
        store.open(ENTRIES[0])


def test_a_file_longer_than_its_manifest_says_is_not_stored(server, tmp_path):
    server.files["/shards/0.tar"] *= 10
    with pytest.raises(StorageError, match="more than the 300000 bytes"):
        store_of(server.url + "/shards", tmp_path).open(ENTRIES[0])


def _read_all(store: Store, seed: int, rounds: int, failures) -> None:
    rng = random.Random(seed)
    for _ in range(rounds):
        for wanted in rng.sample(ENTRIES, len(ENTRIES)):
            if read_file(store, wanted) != content_of(int(wanted["name"][0])):
                failures.put(wanted["name"])


def _open_one(store: Store, wanted: dict) -> None:
    os.close(store.open(wanted))


def _start(number: int, target, *args) -> list:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(args[0], n, *args[1:])) for n in range(number)]
    for process in processes:
        process.start()
    return processes


def test_eight_processes_fetch_each_file_once(server, tmp_path):
    failures = multiprocessing.get_context("spawn").Queue()
    for process in _start(8, _read_all, store_of(server.url + "/shards", tmp_path), 1, failures):
        process.join(60)
        assert process.exitcode == 0
    assert failures.empty()
    assert server.gets() == {f"/shards/{n}.tar": 1 for n in range(6)}


def test_eight_processes_evict_one_is_killed_and_the_limit_holds(server, tmp_path):
    context = multiprocessing.get_context("spawn")
    failures, limit = context.Queue(), 3 * 300_000
    store = store_of(server.url + "/shards", tmp_path, 3)
    server.faults["/shards/5.tar"] = ["wait"]
    victim = context.Process(target=_open_one, args=(store, ENTRIES[5]))
    victim.start()
    assert server.half_sent.wait(20)
    others = _start(8, _read_all, store, 3, failures)
    while server.gets().total() < 4:  # wait until the other processes fetch files
        others[0].join(0.02)
    assert not list(tmp_path.glob("5.tar-*.cached")), "an unfinished file has its final name"
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(10)
    largest = 0
    while any(process.is_alive() for process in others):
        largest = max(largest, cached_bytes(tmp_path))
        others[0].join(0.01)
        others = [p for p in others if p.is_alive() or p.join() or p.exitcode]
    assert not others and failures.empty()
    assert largest <= limit + 300_000, "too large, even if one file was counted under its old and its new name"
    assert cached_bytes(tmp_path) <= limit and not list(tmp_path.glob("*.part"))
    assert max(server.gets().values()) <= 8 * 3 + 1


def test_what_a_killed_process_left_goes_with_the_next_fetch(server, tmp_path):
    store = store_of(server.url + "/shards", tmp_path)
    server.faults["/shards/0.tar"] = ["wait"]
    victim = multiprocessing.get_context("spawn").Process(target=_open_one, args=(store, ENTRIES[0]))
    victim.start()
    assert server.half_sent.wait(20)
    victim.kill()
    victim.join(10)
    assert [p.suffix for p in tmp_path.glob("0.tar-*")] == [".part"]
    assert read_file(store, ENTRIES[1]) == content_of(1)
    assert not list(tmp_path.glob("0.tar-*")) and len(list(tmp_path.glob("1.tar-*.cached"))) == 1


def test_a_slow_transfer_blocks_only_those_who_want_that_file(server, tmp_path):
    store = store_of(server.url + "/shards", tmp_path)
    server.faults["/shards/0.tar"] = ["wait"]
    found = []
    waiting = [threading.Thread(target=lambda: found.append(read_file(store, ENTRIES[0]))) for _ in range(3)]
    for thread in waiting:
        thread.start()
    assert server.half_sent.wait(20)
    assert read_file(store, ENTRIES[1]) == content_of(1) and not found
    server.send_rest.set()
    for thread in waiting:
        thread.join(20)
    assert found == [content_of(0)] * 3 and server.gets()["/shards/0.tar"] == 1


def test_a_descriptor_outlives_its_eviction(server, tmp_path):
    store = store_of(server.url + "/shards", tmp_path, shards=1)
    fd = store.open(ENTRIES[0])
    read_file(store, ENTRIES[1])
    assert not list(tmp_path.glob("0.tar-*")) and os.pread(fd, 300_001, 0) == content_of(0)
    os.close(fd)


def test_a_full_disk_is_said_and_leaves_nothing(server, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk of the cache"):
        store_of(server.url + "/shards", tmp_path).open(ENTRIES[0])
    assert server.gets() == {"/shards/0.tar": 1} and not list(tmp_path.glob("0.tar-*"))


def test_a_store_and_its_errors_pickle(tmp_path):
    store = Store("https://host/shards", CacheConfig(str(tmp_path)))
    assert pickle.loads(pickle.dumps(store)).cache == store.cache
    assert str(pickle.loads(pickle.dumps(StorageError("text")))) == "text"


def test_s3_is_read_in_ranges(server, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    for name, value in {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(name, value)
    server.files["/shards/big/0.tar"] = big = content_of(7, 20_000_000)
    server.files["/shards/big/manifest.json"] = b"{}"
    server.faults["/shards/big/0.tar"] = ["", "flip"]
    store = Store("s3://shards/big", CacheConfig(str(tmp_path), 0.1))
    store.cache = replace(store.cache, pause=0.01)
    assert store.read_small("manifest.json") == b"{}"
    assert read_file(store, entry("0.tar", big)) == big
    assert 4 <= server.gets()["/shards/big/0.tar"] <= 8, "expected ranges of 8 MiB, and the altered file once more"
    with pytest.raises(UserError, match="holds"):
        store_of("s3://shards/big", tmp_path, 1).open(entry("0.tar", big))
