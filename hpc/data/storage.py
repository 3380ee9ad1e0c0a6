"""Opens the files of finished artefacts (results of stages): local files, or remote files through a node-local cache.

A Store opens the files that a manifest lists; shards and catalogs are read through a Store. All processes of a node share one
cache. A file is fetched once, checked against the size and crc32 of its manifest entry, and renamed to its final name.
Invariant: a file with a final name (.cached) in the cache is complete and verified.

A process that fetches a file locks the unfinished file (.part). The operating system releases the lock when the process ends,
also when it is killed. If the cache is full, the least recently used files are deleted. Callers receive an open descriptor,
not a path, so a file may be deleted from the cache while another process reads it. The disk space is free only after all
processes have closed the file, so callers should keep few files open.
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

from hpc.config import expand_path, volatile
from hpc.data import manifest
from hpc.errors import UserError

T = TypeVar("T")
PROTOCOLS = ("http", "https", "s3", "gs", "az", "abfs")  # others in fsspec run programs, read local files, or chain protocols
CACHE_FILE = re.compile(r".+-[0-9a-f]{16}\.(cached|part)")  # the cache deletes no other file of its directory
BLOCK = 1 << 20  # bytes per read
SMALL_FILE = 1 << 28  # bytes of the largest file that read_small() accepts
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class StorageError(OSError):
    """Raised if a listed file cannot be fetched completely in several attempts.

    The network or the source is at fault, not a single sample, so the run stops instead of replacing samples.
    """


class _ContentError(Exception):
    """Raised if the received content differs from the manifest entry."""


@dataclass(frozen=True)
class CacheConfig:
    """A node's cache of shards.

    Attributes:
        directory: Directory of the cache. By default, local data are read in place, and remote data are cached in
            $LESIONGEN_CACHE or, if that is not set, in ~/.cache/lesiongen. With a directory, local data are cached too.
        gigabytes: Largest size of the cache.
    """

    directory: str | None = volatile(None)  # on the node's own disk, such as "$TMPDIR/shards"; expanded on each node
    gigabytes: float = volatile(50.0)  # allow several shards for each data worker of the node

    def __post_init__(self):
        if self.gigabytes <= 0:
            raise ValueError(f"gigabytes is {self.gigabytes}; it must be above 0")


def is_remote(location: str | Path) -> bool:
    """Returns whether a location is an address such as s3://…, not a local path."""
    return "://" in str(location)


def without_secrets(text: str) -> str:
    """Removes passwords and signatures from the addresses in a text.

    Messages must not show them. The names of cached files leave them out too, because the same file may come with another
    signature the next time.
    """
    return re.sub(r"(?<=://)[^/@\s]*@|\?[^\s'\")]*", "", text)


class Store:
    """Opens the files of one finished artefact, through the node's cache if there is one.

    A Store can be pickled, and any number of processes can use it at the same time.

    Attributes:
        where: Folder or address of the artefact.
        cache: The node's cache; None if local files are read in place.
    """

    def __init__(self, location: str | Path, cache: CacheConfig | None = None):
        """Opens no file yet.

        Args:
            location: Local folder, or an address with one of PROTOCOLS.
            cache: The cache to use. None means the default of CacheConfig.

        Raises:
            UserError: The address has another protocol, or the cache directory names an unset variable.
        """
        cache = cache or CacheConfig()
        self.where = str(location)
        if is_remote(location) and self.where.partition("://")[0] not in PROTOCOLS:
            raise UserError(
                f"{without_secrets(self.where)}: give a folder, or an address that begins with {'://, '.join(PROTOCOLS)}://."
            )
        directory = cache.directory
        if is_remote(location):
            directory = directory or os.environ.get("LESIONGEN_CACHE") or "~/.cache/lesiongen"
        directory = directory and Path(expand_path(directory, "data.cache.directory")).absolute()
        self.cache = Cache(directory, int(cache.gigabytes * 1e9)) if directory else None

    def open(self, entry: dict) -> int:
        """Opens a listed file for reading. A fetched file is verified before it is opened.

        Args:
            entry: The manifest's entry, {"name", "bytes", "crc32"}.

        Returns:
            A file descriptor, which the caller closes.

        Raises:
            StorageError: The file cannot be fetched.
            OSError: A local file that is read in place cannot be opened.
            UserError: The file does not fit into the cache, or the cache cannot be used.
        """
        source = self.address(entry["name"])
        if self.cache is None:
            return os.open(source, os.O_RDONLY)
        return self.cache.open(source, int(entry["bytes"]), int(entry["crc32"]))

    def read_small(self, name: str) -> bytes:
        """Reads a small file that no manifest lists, such as the manifest itself.

        Raises:
            FileNotFoundError: The file does not exist.
            StorageError: The file cannot be fetched, or is too large.
        """
        source = self.address(name)
        if not is_remote(source):
            return Path(source).read_bytes()

        def read_all(stream: BinaryIO) -> bytes:
            content = bytearray()
            while block := stream.read(BLOCK):
                content += block
                if len(content) > SMALL_FILE:
                    raise StorageError(
                        f"{without_secrets(source)} has more than {SMALL_FILE >> 20} MiB. That is too large for a manifest; "
                        "check the address."
                    )
            return bytes(content)

        return _read_with_retries(source, read_all)

    def address(self, name: str) -> str:
        """Returns the path or address of a file of this artefact.

        Raises:
            StorageError: The name is not a plain file name. Manifests are untrusted, so a name must not lead to another folder.
        """
        if not manifest.is_plain_name(name):
            raise StorageError(f"{without_secrets(self.where)}: its manifest lists {name!r}, which is not a plain file name.")
        if not is_remote(self.where):
            return os.path.join(os.path.abspath(self.where), name)
        folder, mark, signature = self.where.partition("?")
        return f"{folder.rstrip('/')}/{name}{mark}{signature}"


@dataclass(frozen=True)
class Cache:
    """A node's directory of fetched files, shared by the stores of all processes of the node.

    Attributes:
        directory: The directory.
        limit: Largest total size in bytes, including files that are being fetched.
        attempts: Number of attempts to fetch a file.
        pause: Seconds before the second attempt. The pause doubles with each further attempt.
    """

    directory: Path
    limit: int
    attempts: int = 5
    pause: float = 1.0

    def open(self, source: str, size: int, crc32: int) -> int:
        """Opens the cached copy of a file, and fetches the file first if necessary.

        Other processes that open the same file meanwhile wait for this fetch.

        Args:
            source: Path or address of the file.
            size: Size of the file in bytes.
            crc32: Checksum of the file.

        Returns:
            A file descriptor, which the caller closes.

        Raises:
            StorageError: The file cannot be fetched.
            UserError: The file is larger than the limit, or the directory cannot be created.
        """
        if size > self.limit:
            raise UserError(
                f"{without_secrets(source)} has {size / 1e9:.3g} GB, but the cache {self.directory} holds only "
                f"{self.limit / 1e9:.3g} GB. Raise data.cache.gigabytes, or pack smaller shards."
            )
        key = hashlib.sha256(f"{without_secrets(source)} {size} {crc32}".encode()).hexdigest()[:16]
        path = self.directory / f"{without_secrets(source).rpartition('/')[2]}-{key}.cached"
        part = path.with_suffix(".part")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The cache {self.directory} cannot be made ({error.strerror}). Set data.cache.directory to a directory on "
                "the node's own disk."
            ) from None
        while (descriptor := _open_if_complete(path, size)) is None:
            with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # While this process waited for the lock, another process may have renamed or deleted the file.
                if not _is_same_file(part, file):
                    continue
                if (descriptor := _open_if_complete(path, size)) is None:
                    descriptor = self._fetch_into(file, source, size, crc32, part, path)
                else:
                    part.unlink()
                break
        os.utime(descriptor)  # marks the file as recently used
        return descriptor

    def _fetch_into(self, file: BinaryIO, source: str, size: int, crc32: int, part: Path, path: Path) -> int:
        """Fetches a file into its locked .part file, renames it to its final path, and returns a descriptor to read from."""
        try:
            self._reserve(file, size)
            self._fetch(source, file, size, crc32)
            descriptor = os.open(part, os.O_RDONLY)
            with self._locked():  # without the lock, _make_room() in another process could miss this file
                os.replace(part, path)
            return descriptor
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Gives the unfinished file its full length, so that other processes count its disk space.

        Waits while the unfinished files of other processes leave too little space.
        """
        os.ftruncate(file.fileno(), 0)
        while True:
            with self._locked():
                if self._make_room(size):
                    return os.ftruncate(file.fileno(), size)
            time.sleep(0.1)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock that every process takes while it adds up or changes the sizes of the cache's files."""
        with open(self.directory / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> bool:
        """Deletes files until `size` more bytes fit, and returns whether they do.

        Deletes unfinished files whose process has ended, then the least recently used finished files. Deletes no finished file
        if the files that are being fetched leave too little space in any case.
        """
        finished, arriving = [], 0
        for path in self.directory.iterdir():
            if CACHE_FILE.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    if path.suffix == ".cached":
                        finished.append((stat.st_mtime_ns, path, stat.st_size))
                    elif not _remove_if_abandoned(path):
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
        """Copies a file from its source and verifies it. Raises StorageError."""

        def copy(stream: BinaryIO) -> None:
            received = crc = 0
            file.seek(0)
            while block := stream.read(BLOCK):
                received += len(block)
                if received > size:
                    raise _ContentError(f"more than the {size} bytes of its manifest entry arrived")
                crc = zlib.crc32(block, crc)
                while block:
                    block = block[file.write(block) :]
            if received != size:
                raise _ContentError(f"{received} bytes arrived, {size} expected")
            if crc != crc32:
                raise _ContentError(f"crc32 {crc:08x} arrived, {crc32:08x} expected")
            # Without fsync, a file with a final name could be incomplete after a crash of the machine. _open_if_complete()
            # would not notice: it checks only the length, and the file has had its full length since _reserve().
            os.fsync(file.fileno())

        try:
            _read_with_retries(source, copy, self.attempts, self.pause)
        except FileNotFoundError:
            raise StorageError(f"{without_secrets(source)} is listed in its manifest, but does not exist.") from None
        except OSError as error:
            if error.errno in DISK_FULL:
                raise StorageError(f"The disk of the cache {self.directory} is full. Lower data.cache.gigabytes.") from None
            raise


def _open_if_complete(path: Path, size: int) -> int | None:
    """Returns a descriptor of a finished file, or None if there is no file of that size."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size == size:
        return descriptor
    os.close(descriptor)
    return None


def _is_same_file(path: Path, file: BinaryIO) -> bool:
    """Returns whether an open file is still the file at a path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _remove_if_abandoned(part: Path) -> bool:
    """Deletes an unfinished file if no process is fetching it. Returns whether the file was deleted."""
    with open(part, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # If the path now has another file or none, the fetch has just finished. At worst, its size is counted twice.
        if _is_same_file(part, file):
            part.unlink()
            return True
    return False


def _read_with_retries(source: str, read: Callable[[BinaryIO], T], attempts: int = 5, pause: float = 1.0) -> T:
    """Opens a source, calls read(stream), and repeats both after a failure.

    Args:
        source: Path or address of the file.
        read: Reads the stream from its first byte; its result is returned.
        attempts: Number of attempts.
        pause: Seconds before the second attempt; doubles with each further attempt.

    Raises:
        FileNotFoundError, UserError, or the OSError of a full disk: Raised at once; another attempt would not help.
        StorageError: All attempts failed, or read(stream) raised StorageError.
    """
    for attempt in range(attempts):
        if attempt:
            # A random factor keeps the nodes from retrying all at once. SystemRandom does not change the state of `random`.
            time.sleep(pause * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1.5))
        try:
            with _open_stream(source) as stream:
                return read(stream)
        except (FileNotFoundError, StorageError, UserError):
            raise
        except Exception as error:  # each protocol raises errors of its own classes
            if getattr(error, "errno", None) in DISK_FULL:
                raise
            problem = str(error) if isinstance(error, _ContentError) else f"{type(error).__name__}: {error}"
    raise StorageError(
        f"{without_secrets(source)} could not be read in {attempts} attempts; the last error: {without_secrets(problem)}."
    )


def _open_stream(source: str) -> BinaryIO:
    """Opens a local or remote file for reading. Raises UserError if a package for its protocol is missing."""
    if not is_remote(source):
        return open(source, "rb")
    protocol = source.partition("://")[0]
    try:
        import fsspec  # imported here because only remote data need it

        if protocol not in ("http", "https"):
            return fsspec.filesystem(protocol).open(source, block_size=8 * BLOCK)
        import aiohttp

        # By default aiohttp ends a transfer after five minutes, too early for a large shard. Limit only the time without data.
        session = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60), "trust_env": True}
        system = fsspec.filesystem(protocol, headers={"Accept-Encoding": "identity"}, client_kwargs=session)
        # block_size=0 makes a single GET. Giving any `size` avoids a HEAD request, which signed addresses refuse.
        return system.open(source, block_size=0, size=1)
    except ImportError as error:
        raise UserError(f"{protocol}:// needs a package that is not installed here ({error}). Install it.") from None
