"""Files of finished artefacts, wherever they lie: a local folder, or a slow or remote one behind a node-local cache.

The cache is shared by all processes of a node. A file is brought in once, checked against the size and crc32 that its
manifest gives, and renamed into place whole; the unfinished file is itself the lock, which the system frees when its
holder dies. Least recently used files go first. What is handed out is an open descriptor and not a path, so that a file
that is evicted while someone reads it does no harm (its room is free once all have closed it: keep few open).
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import re
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from hpc.config import volatile
from hpc.data import manifest
from hpc.errors import UserError

T = TypeVar("T")
PROTOCOLS = ("http", "https", "s3", "gs", "az", "abfs")  # others run programs, read local files, or chain such
CACHED = re.compile(r".+-[0-9a-f]{16}\.(cached|part)")  # all that is ever deleted, whatever else lies in the directory
BLOCK = 1 << 20
SMALL = 1 << 28
FULL = (errno.ENOSPC, errno.EDQUOT)


class StorageError(OSError):
    """A file that should be there cannot be had, or not whole, after several attempts. No fault of any one sample."""


class _Differs(Exception):
    """What arrived is not what was asked for."""


@dataclass(frozen=True)
class CacheConfig:
    """A node's cache of shards. By default local data are read in place and remote ones go to ~/.cache/lesiongen, or to
    $LESIONGEN_CACHE; a directory stages local ones too."""

    directory: str | None = volatile(None)  # on the node's own disk, as "$TMPDIR/shards"
    gigabytes: float = volatile(50.0)  # at most; several shards for each data worker of the node

    def __post_init__(self):
        if self.gigabytes <= 0:
            raise ValueError("gigabytes is above 0")


def is_remote(where: str | Path) -> bool:
    return "://" in str(where)


def shown(text: str) -> str:
    """Without passwords and signatures, for messages and for names: signatures change, the file does not."""
    return re.sub(r"(?<=://)[^/@\s]*@|\?[^\s'\")]*", "", text)


class Store:
    """The folder of a finished artefact. Pickles; safe in any number of processes."""

    def __init__(self, where: str | Path, cache: CacheConfig | None = None):
        """Raises UserError for an address of an unknown kind."""
        cache = cache or CacheConfig()
        self.where = str(where)
        if is_remote(where) and self.where.partition("://")[0] not in PROTOCOLS:
            raise UserError(f"{shown(self.where)}: give a folder, or an address that begins with {'://, '.join(PROTOCOLS)}://.")
        directory = cache.directory
        if is_remote(where):
            directory = directory or os.environ.get("LESIONGEN_CACHE") or "~/.cache/lesiongen"
        self.cache = Cache(_expanded(directory), int(cache.gigabytes * 1e9)) if directory else None

    def open(self, entry: dict) -> int:
        """A descriptor to read the file {"name", "bytes", "crc32"} from; the caller closes it. Verified if it was fetched.

        Raises StorageError if it cannot be had, OSError for a local one read in place."""
        source = self.address(entry["name"])
        if self.cache is None:
            return os.open(source, os.O_RDONLY)
        return self.cache.open(source, int(entry["bytes"]), int(entry["crc32"]))

    def read_small(self, name: str) -> bytes:
        """A whole small file that no manifest describes: the manifest itself. Raises FileNotFoundError or StorageError."""
        source = self.address(name)
        if not is_remote(source):
            return Path(source).read_bytes()

        def whole(stream: BinaryIO) -> bytes:
            content = bytearray()
            while block := stream.read(BLOCK):
                content += block
                if len(content) > SMALL:
                    raise StorageError(f"{shown(source)} has more than {SMALL >> 20} MiB, which no such file has.")
            return bytes(content)

        return _retried(source, whole)

    def address(self, name: str) -> str:
        """Names come from manifests, which are untrusted: only plain file names of this very folder."""
        if not manifest.plain(name):
            raise StorageError(f"{shown(self.where)}: its manifest names {name!r}, which is no plain file name.")
        if not is_remote(self.where):
            return os.path.join(os.path.abspath(self.where), name)
        folder, mark, signature = self.where.partition("?")
        return f"{folder.rstrip('/')}/{name}{mark}{signature}"


@dataclass(frozen=True)
class Cache:
    """A directory of at most `limit` bytes, files on their way in included."""

    directory: Path
    limit: int
    attempts: int = 5
    pause: float = 1.0  # seconds before the second attempt; doubles

    def open(self, source: str, size: int, crc32: int) -> int:
        """A descriptor of the file's copy, fetched if it is not there; others who want the same file wait for it.

        Raises StorageError, and UserError where the limit is smaller than the file."""
        if size > self.limit:
            raise UserError(
                f"{shown(source)} has {size / 1e9:.3g} GB, and the cache {self.directory} holds {self.limit / 1e9:.3g} GB. "
                "Raise data.cache.gigabytes, or pack smaller shards."
            )
        key = hashlib.sha256(f"{shown(source)} {size} {crc32}".encode()).hexdigest()[:16]
        path = self.directory / f"{shown(source).rpartition('/')[2]}-{key}.cached"
        part = path.with_suffix(".part")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The cache {self.directory} cannot be made ({error.strerror}). Set data.cache.directory."
            ) from None
        while (found := _complete(path, size)) is None:
            with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not _is(part, file):  # the one who had it has finished, or it was cleared away
                    continue
                if (found := _complete(path, size)) is None:
                    try:
                        self._reserve(file, size)
                        self._fetch(source, file, size, crc32)
                        found = os.open(part, os.O_RDONLY)
                        with self._locked():  # or a count in progress would miss it
                            os.replace(part, path)
                    except BaseException:
                        part.unlink(missing_ok=True)
                        raise
                else:
                    part.unlink()
                break
        os.utime(found)
        return found

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Gives the unfinished file its full length at once, by which others count it; waits while theirs fill the limit."""
        os.ftruncate(file.fileno(), 0)
        while True:
            with self._locked():
                if self._make_room(size):
                    return os.ftruncate(file.fileno(), size)
            time.sleep(0.1)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.directory / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> bool:
        """Clears away what dead processes left and, if that can help, the least recently used files."""
        finished, arriving = [], 0
        for path in self.directory.iterdir():
            if CACHED.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    if path.suffix == ".cached":
                        finished.append((stat.st_mtime_ns, path, stat.st_size))
                    elif not _abandoned(path):
                        arriving += stat.st_size
        if arriving + size > self.limit:
            return False
        total = arriving + size + sum(length for *_, length in finished)
        for _, path, length in sorted(finished):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= length
        return True

    def _fetch(self, source: str, file: BinaryIO, size: int, crc32: int) -> None:
        def copy(stream: BinaryIO) -> None:
            received = crc = 0
            file.seek(0)
            while block := stream.read(BLOCK):
                received += len(block)
                if received > size:
                    raise _Differs(f"more than the {size} bytes that its manifest gives")
                crc = zlib.crc32(block, crc)
                while block:
                    block = block[file.write(block) :]
            if received != size:
                raise _Differs(f"{received} bytes arrived, {size} expected")
            if crc != crc32:
                raise _Differs(f"crc32 {crc:08x} arrived, {crc32:08x} expected")
            os.fsync(file.fileno())  # its length is right from the start, so that after a crash only this makes it whole

        try:
            _retried(source, copy, self.attempts, self.pause)
        except FileNotFoundError:
            raise StorageError(f"{shown(source)} is listed in its manifest, but it is not there.") from None
        except OSError as error:
            if error.errno in FULL:
                raise StorageError(f"The disk of the cache {self.directory} is full. Lower data.cache.gigabytes.") from None
            raise


def _expanded(directory: str) -> Path:
    path = os.path.expanduser(os.path.expandvars(directory))
    if "$" in path:
        raise UserError(f"data.cache.directory is {directory}, but that variable is not set here.")
    return Path(path).absolute()


def _complete(path: Path, size: int) -> int | None:
    """A descriptor of a finished file, None where there is none of that size."""
    try:
        found = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(found).st_size == size:
        return found
    os.close(found)
    return None


def _is(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _abandoned(part: Path) -> bool:
    """Removes an unfinished file that nobody holds."""
    with open(part, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if _is(part, file):  # else finished this moment, and counted as arriving once more at worst
            part.unlink()
            return True
    return False


def _retried(source: str, take: Callable[[BinaryIO], T], attempts: int = 5, pause: float = 1.0) -> T:
    """take(stream from the source's first byte), again after a failure. What cannot change is raised at once."""
    for attempt in range(attempts):
        if attempt:  # not all nodes at once; `random` itself belongs to the user's seeds
            time.sleep(pause * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1.5))
        try:
            with _stream(source) as stream:
                return take(stream)
        except (FileNotFoundError, StorageError, UserError):
            raise
        except Exception as error:  # each protocol has errors of its own
            if getattr(error, "errno", None) in FULL:
                raise
            problem = str(error) if isinstance(error, _Differs) else f"{type(error).__name__}: {error}"
    raise StorageError(f"{shown(source)} could not be read in {attempts} attempts; the last: {shown(problem)}.")


def _stream(source: str) -> BinaryIO:
    if not is_remote(source):
        return open(source, "rb")
    protocol = source.partition("://")[0]
    try:
        import fsspec  # only remote data need it

        if protocol not in ("http", "https"):
            return fsspec.filesystem(protocol).open(source, block_size=8 * BLOCK)
        import aiohttp

        # aiohttp's own limit is five minutes in all, too little for a large shard; here silence is what counts.
        session = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60), "trust_env": True}
        system = fsspec.filesystem(protocol, headers={"Accept-Encoding": "identity"}, client_kwargs=session)
        return system.open(source, block_size=0, size=1)  # one GET; "size" spares a HEAD, which signed addresses refuse
    except ImportError as error:
        raise UserError(f"{protocol}:// needs a package that is not installed here ({error}).") from None
