"""Downloads public data sets of skin lesions from their owners' hosts, checks the files and unpacks them.

    DIR/images/<archive>/…   the photographs; the archives' names tell the official splits
    DIR/metadata/…           the tables, under their owners' names
    DIR/LICENCE.txt          the conditions of use
    DIR/download.json        the addresses, size, sha256 and unpacked files of each downloaded file

A file must have its published checksum. Where none is published, the file must have the length that the host announces, a
zip's own checksums must match, and a later download must have the sha256 of the first. Incomplete files are in DIR/.incoming;
an interrupted transfer resumes at the byte where it stopped.
"""

import errno
import hashlib
import http.client
import json
import os
import shlex
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from hpc.errors import UserError
from hpc.run.progress import progress_bar
from hpc.run.rundir import atomic_write, lock
from lesiongen.ingest.public import SETS, File

BLOCK = 1 << 20  # bytes read at once
PICTURES, TABLES, TEXTS = (".jpg", ".jpeg", ".png"), (".csv",), (".txt",)  # files that are unpacked
ATTEMPTS = 5  # that may fail in a row without a new byte
PAUSE = 1.0  # seconds before the second attempt; doubles with each further one


def download(name: str, out: Path, base: str | None = None) -> None:
    """Downloads and unpacks a data set. Running it again continues where it stopped.

    Args:
        name: A key of `public.SETS`.
        out: Directory to write to.
        base: Address of a mirror that has the files under their names; None for the owners' hosts.

    Raises:
        UserError: Wrong arguments, no network, a full disk, or files that are not as published.
    """
    if name not in SETS:
        raise UserError(f"There is no data set '{name}' to download. Known data sets: {', '.join(SETS)}.")
    if base and not base.startswith(("http://", "https://")):
        raise UserError(f"The mirror '{base}' is not an http:// or https:// address.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The directory {out} cannot be made: {error.strerror}.") from None
    files = SETS[name].files
    if base:
        files = tuple(File(f.name, (f"{base.rstrip('/')}/{f.name}",), f.bytes, f.checksum) for f in files)
    with lock(out):
        print(SETS[name].licence)
        atomic_write(out / "LICENCE.txt", SETS[name].licence.encode())
        state = _read_state(out, name)
        missing = [f for f in files if not _is_complete(out, f, state["files"].get(f.name))]
        _check_space(out, missing)
        for file in missing:
            _download_file(out, file, state)
        shutil.rmtree(out / ".incoming", ignore_errors=True)
    print("The download is complete. Pack it with:\n  " + shlex.join(pack_command(out)))


def pack_command(out: Path) -> list[str]:
    """Returns the command that packs a downloaded data set."""
    folders = {"--images": out / "images", "--metadata": out / "metadata", "--out": out / "shards"}
    return ["lesiongen", "pack", *(str(word) for pair in folders.items() for word in pair)]


def _read_state(out: Path, name: str) -> dict:
    """Returns download.json, or its initial content: {"set": name, "files": {}}."""
    try:
        state = json.loads((out / "download.json").read_text())
    except FileNotFoundError:
        return {"set": name, "files": {}}
    except ValueError as error:
        raise UserError(f"{out / 'download.json'} is damaged ({error}). Delete it; unpacked files are kept.") from None
    if state["set"] != name:
        raise UserError(f"{out} holds {state['set']}. Choose another directory for {name}.")
    return state


def _is_complete(out: Path, file: File, entry: dict | None) -> bool:
    """Returns whether a file needs no download. An archive is complete if as many files as it held are in `out`.

    Args:
        out: Directory of the data set.
        file: The published file.
        entry: What download.json says of it; None if it has never been downloaded.
    """
    if not entry:
        return False
    for name, number in entry["unpacked"].items():
        path = out / name
        if (len(os.listdir(path)) if path.is_dir() else path.is_file()) < number:
            return False
    if file.name.endswith(".zip") or _digest(out / "metadata" / file.name, "sha256") == entry["sha256"]:
        return True
    print(f"{file.name} has changed since it was downloaded. Downloading it again.")
    return False


def _check_space(out: Path, missing: list[File]) -> None:
    """Raises UserError if the disk lacks the space for the missing files.

    Photographs hardly compress, so unpacked files take as much space as their archive, which is deleted after unpacking. The
    most that is needed at once is all files unpacked and the largest archive beside them.
    """
    incoming = out / ".incoming"
    sizes = [_size(incoming / f.name) or f.bytes or _remote_size(f, incoming / f.name) for f in missing]
    arrived = sum(p.stat().st_size for p in incoming.glob("*"))
    needed, free = sum(sizes) + max(sizes, default=0) - arrived, shutil.disk_usage(out).free
    if free < 1.05 * needed:
        raise UserError(f"{out} needs {needed / 1e9:.1f} GB more, but its disk has only {free / 1e9:.1f} GB free. Make room.")


def _download_file(out: Path, file: File, state: dict) -> None:
    """Fetches, checks and unpacks one file, then adds it to download.json."""
    path = out / ".incoming" / file.name
    # Fetch and check. A file that fails the check is fetched once more.
    first_sha256 = state["files"].get(file.name, {}).get("sha256")
    for last_attempt in (False, True):
        if not path.exists():
            _fetch(file, path)
        problem = _find_problem(path, file, first_sha256)
        if not problem:
            break
        path.unlink()
        if last_attempt:
            raise UserError(f"{file.name}: {problem}.")
        print(f"{file.name}: {problem}. Downloading it again.")
    # Unpack, or move to its final path.
    entry = {"urls": file.urls, "bytes": path.stat().st_size, "sha256": _digest(path, "sha256")}
    if file.name.endswith(".zip"):
        entry["unpacked"] = unpack(path, out)
        path.unlink()
    else:
        (out / "metadata").mkdir(exist_ok=True)
        path.replace(out / "metadata" / file.name)
        entry["unpacked"] = {f"metadata/{file.name}": 1}
    # One sync before download.json lists the files, since an fsync for each of thousands of small files would be slow.
    os.sync()
    state["files"][file.name] = entry
    atomic_write(out / "download.json", json.dumps(state, indent=1).encode() + b"\n")


def _find_problem(path: Path, file: File, first_sha256: str | None) -> str | None:
    """Compares a downloaded file with its published size and checksum.

    Args:
        path: The downloaded file.
        file: What is published of it.
        first_sha256: Its sha256 at the first download, if there was one; compared if no checksum is published.

    Returns:
        What is wrong with the file; None if nothing is.
    """
    if file.bytes and path.stat().st_size != file.bytes:
        return f"it has {path.stat().st_size} bytes, but the published size is {file.bytes}"
    if file.checksum:
        kind, _, published = file.checksum.partition(":")
        if (actual := _digest(path, kind)) != published:
            return f"its {kind} is {actual}, but the published one is {published}"
    elif first_sha256 and (actual := _digest(path, "sha256")) != first_sha256:
        return (
            f"its sha256 is {actual}, but at the first download it was {first_sha256}. If you trust the change, delete "
            "download.json"
        )
    return None


def _digest(path: Path, kind: str) -> str:
    """Returns a file's checksum in hex. kind: a name that hashlib knows."""
    digest = hashlib.new(kind)
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _request(url: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    headers = {"User-Agent": "lesiongen", "Accept-Encoding": "identity", **headers}
    return urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=30)


def _remote_size(file: File, path: Path) -> int:
    """Returns the size that a host announces, 0 where none does.

    Raises UserError if a host cannot be reached. path: where the user could put the file instead, for the message.
    """
    for url in file.urls:
        try:
            with _request(url, "HEAD") as response:
                return int(response.headers.get("Content-Length") or 0)
        except urllib.error.HTTPError:
            continue
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(file.name, url, str(getattr(error, "reason", error)), path) from None
    return 0


def _unreachable(name: str, url: str, problem: str, path: Path) -> UserError:
    return UserError(
        f"{name} could not be downloaded from {url} ({problem}). If this machine has no network, run the same command on one "
        f"that has, or copy the file to {path} and run the command again. What is already downloaded is kept."
    )


def _fetch(file: File, path: Path) -> None:
    """Downloads a file to `path`, resuming an interrupted transfer.

    An address that answers 403 or 404 is skipped if another one is left. Other failures are retried, with growing pauses.
    Raises UserError after ATTEMPTS failures without a new byte, and if the disk is full.
    """
    path.parent.mkdir(exist_ok=True)
    part, problem, failures, urls = path.with_name(path.name + ".part"), "", 0, list(file.urls)
    while failures < ATTEMPTS:
        if failures:
            time.sleep(PAUSE * 2 ** (failures - 1))
        size_before = _size(part)
        try:
            if _transfer(urls[0], part, file.name):
                os.replace(part, path)
                return
            problem = "the transfer was interrupted"
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code in (403, 404) and len(urls) > 1:
                urls.pop(0)
                continue
            if error.code in (401, 403, 404, 410):
                break  # the host will not answer otherwise at another attempt
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"The disk is full at {path.parent}. Make room there and run the same command again.") from None
            problem = str(getattr(error, "reason", "") or error or type(error).__name__)
        failures = 1 if _size(part) > size_before else failures + 1
    raise _unreachable(file.name, urls[0], problem, path)


def _transfer(url: str, part: Path, label: str) -> bool:
    """Makes one request for the bytes that `part` lacks and appends them. Returns whether the file is complete then.

    The file PART.version holds the host's version of the file (its ETag). Bytes are appended only to bytes of the same
    version; without PART.version the transfer starts at byte 0.

    Args:
        url: Address of the file.
        part: The incomplete file.
        label: Text of the progress bar.
    """
    version_file = part.with_name(part.name + ".version")
    have = _size(part) if version_file.exists() else 0
    version = version_file.read_text() if have else ""
    # If-Range makes the host send the whole file if its version is another now.
    resume = {"Range": f"bytes={have}-", "If-Range": version} if have else {}
    try:
        response = _request(url, **resume)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # the host's file is not longer than `part`: start at byte 0 next time
            version_file.unlink()
        raise
    with response:
        new_version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        # 206 means that the host sends a range. It must be the one asked for, of the same version.
        if response.status == 206 and not (new_version == version and _range_starts_at(response, have)):
            version_file.unlink(missing_ok=True)
            return False
        start = have if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        if start == 0:
            # In this order: if the process is killed in between, no version file is left beside bytes of another version.
            version_file.unlink(missing_ok=True)
            part.write_bytes(b"")
            # Weak ETags (W/) do not identify the exact bytes, so these transfers cannot be resumed.
            if new_version and not new_version.startswith("W/"):
                version_file.write_text(new_version)
        with open(part, "ab") as file, progress_bar(total or 0, label, "B", initial=start) as progress:
            while block := response.read(BLOCK):
                file.write(block)
                progress.update(len(block))
    if total is not None and _size(part) != total:
        return False
    version_file.unlink(missing_ok=True)
    return True


def _range_starts_at(response: http.client.HTTPResponse, byte: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {byte}-")


def _size(path: Path) -> int:
    """Returns a file's size in bytes, 0 if there is no file."""
    return path.stat().st_size if path.exists() else 0


def unpack(archive: Path, out: Path) -> dict[str, int]:
    """Unpacks the photographs and tables of a zip without its folders. Files that are already complete are kept.

    Archives are untrusted: a path out of the archive's folder, a link, or an implausible unpacked size refuses the whole
    archive, before anything is written.

    Args:
        archive: The zip file.
        out: Directory of the data set. Tables are written to out/metadata, all else to out/images/<archive's name>.

    Returns:
        The number of files by path relative to `out`: 1 for each table, and the count of each folder of photographs.

    Raises:
        UserError: The archive is refused, damaged (then it is deleted) or cannot be written.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            targets = _plan_unpacking(zipped.infolist(), archive, out)
            with progress_bar(len(targets), f"unpack {archive.stem}", "file") as progress:
                for target, member in targets.items():
                    if _size(target) != member.file_size or not target.exists():
                        target.parent.mkdir(parents=True, exist_ok=True)
                        partial = target.with_name(f".{target.name}.part")
                        with zipped.open(member) as source, open(partial, "wb") as copy:
                            shutil.copyfileobj(source, copy, BLOCK)  # zipfile stops at file_size and checks the CRC
                        partial.replace(target)
                    progress.update()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        archive.unlink()
        raise UserError(
            f"{archive.name} is not a usable zip file ({error}) and was deleted. Run the same command to download it again."
        ) from None
    except OSError as error:
        raise UserError(f"{archive.name} cannot be unpacked ({error}). Correct that and run the same command again.") from None
    unpacked = [target if target.suffix.lower() in TABLES else target.parent for target in targets]
    return dict(Counter(str(path.relative_to(out)) for path in unpacked))


def _plan_unpacking(members: Iterable[zipfile.ZipInfo], archive: Path, out: Path) -> dict[Path, zipfile.ZipInfo]:
    """Returns the path to write for each member that is wanted. Raises UserError for a suspicious archive."""
    targets: dict[Path, zipfile.ZipInfo] = {}
    for member in members:
        inside = PurePosixPath(member.filename)
        if inside.is_absolute() or ".." in inside.parts or "\\" in member.filename or ":" in member.filename:
            raise UserError(f"{archive.name} has a member '{member.filename}' outside its folder. Nothing was unpacked.")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{archive.name} has a link, '{member.filename}'. Nothing was unpacked.")
        suffix, hidden = inside.suffix.lower(), any(part.startswith((".", "__")) for part in inside.parts)
        if member.is_dir() or hidden or suffix not in PICTURES + TABLES + TEXTS or inside.stem.endswith("_superpixels"):
            continue
        target = out / ("metadata" if suffix in TABLES else f"images/{archive.stem}") / inside.name
        if target in targets:
            raise UserError(f"{archive.name} holds two files named {inside.name}. Nothing was unpacked.")
        targets[target] = member
    unpacked_size = sum(member.file_size for member in targets.values())
    if unpacked_size > 20 * archive.stat().st_size + (64 << 20):
        raise UserError(
            f"{archive.name} would unpack to {unpacked_size / 1e9:.1f} GB, far more than photographs can. Nothing was unpacked."
        )
    return targets
