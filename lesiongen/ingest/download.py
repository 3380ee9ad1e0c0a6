"""download: public data sets of skin lesions from where their owners keep them, resumable, checked and unpacked safely.

    DIR/images/<archive>/…   the photographs; the archives' names tell the official splits
    DIR/metadata/…           the tables, under their owners' names
    DIR/LICENCE.txt          what the owners ask for
    DIR/download.json        what came from where, with the sha256 of each file as it came first

Where a checksum is published it is required. Elsewhere the length must fit, a zip's own checksums must, and a later
download must have the sha256 of the first.
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
from hpc.run.progress import bar
from hpc.run.rundir import atomic_write, lock
from lesiongen.ingest.public import SETS, File

BLOCK = 1 << 20
PICTURES, TABLES, TEXTS = (".jpg", ".jpeg", ".png"), (".csv",), (".txt",)
ATTEMPTS = 5  # in a row without a byte
PAUSE = 1.0  # seconds before the second; doubles


def download(name: str, out: Path, base: str | None = None) -> None:
    """Fetches and unpacks a data set into `out`; the same call again goes on where it stopped.

    base: the address of a mirror that holds the files under their names. Raises UserError for what the user can mend."""
    if name not in SETS:
        raise UserError(f"There is no data set '{name}' to download; there are {', '.join(SETS)}.")
    if base and not base.startswith(("http://", "https://")):
        raise UserError(f"The mirror '{base}' is no http:// or https:// address.")
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
        record = _record(out, name)
        missing = [f for f in files if not _there(out, f, record["files"].get(f.name))]
        _check_space(out, missing)
        for file in missing:
            _one(out, file, record)
        shutil.rmtree(out / ".incoming", ignore_errors=True)
    print("All there. Go on with:\n  " + shlex.join(pack_command(out)))


def pack_command(out: Path) -> list[str]:
    folders = {"--images": out / "images", "--metadata": out / "metadata", "--out": out / "shards"}
    return ["lesiongen", "pack", *(str(word) for pair in folders.items() for word in pair)]


def _record(out: Path, name: str) -> dict:
    try:
        record = json.loads((out / "download.json").read_text())
    except FileNotFoundError:
        return {"set": name, "files": {}}
    except ValueError as error:
        raise UserError(f"{out / 'download.json'} is damaged ({error}). Delete it; what is unpacked is kept.") from None
    if record["set"] != name:
        raise UserError(f"{out} holds {record['set']}. Give {name} a directory of its own.")
    return record


def _there(out: Path, file: File, known: dict | None) -> bool:
    """Whether nothing of the file is missing; an archive is judged by what came out of it."""
    if not known:
        return False
    for place, number in known["unpacked"].items():
        path = out / place
        if (len(os.listdir(path)) if path.is_dir() else path.is_file()) < number:
            return False
    if file.name.endswith(".zip") or _digest(out / "metadata" / file.name, "sha256") == known["sha256"]:
        return True
    print(f"{file.name} has been changed since it was downloaded; it is fetched again.")
    return False


def _check_space(out: Path, missing: list[File]) -> None:
    """Photographs hardly compress: what is unpacked takes as much as its archive, which goes once that is done."""
    incoming = out / ".incoming"
    sizes = [_size(incoming / f.name) or f.bytes or _length(f, incoming / f.name) for f in missing]
    arrived = sum(p.stat().st_size for p in incoming.glob("*"))
    needed, free = sum(sizes) + max(sizes, default=0) - arrived, shutil.disk_usage(out).free
    if free < 1.05 * needed:
        raise UserError(f"{out} needs {needed / 1e9:.1f} GB more, and its disk has {free / 1e9:.1f} GB free. Make room there.")


def _one(out: Path, file: File, record: dict) -> None:
    known = record["files"].get(file.name, {})
    path = out / ".incoming" / file.name
    for last in (False, True):
        if not path.exists():
            _fetch(file, path)
        wrong = _wrong(path, file, known.get("sha256"))
        if not wrong:
            break
        path.unlink()
        if last:
            raise UserError(f"{file.name}: {wrong}.")
        print(f"{file.name}: {wrong}; once more.")
    entry = {"urls": file.urls, "bytes": path.stat().st_size, "sha256": _digest(path, "sha256")}
    if file.name.endswith(".zip"):
        entry["unpacked"] = unpack(path, out)
        path.unlink()
    else:
        (out / "metadata").mkdir(exist_ok=True)
        path.replace(out / "metadata" / file.name)
        entry["unpacked"] = {f"metadata/{file.name}": 1}
    os.sync()  # thousands of small files: once for all, before they are called done
    record["files"][file.name] = entry
    atomic_write(out / "download.json", json.dumps(record, indent=1).encode() + b"\n")


def _wrong(path: Path, file: File, first: str | None) -> str | None:
    """What is wrong with a file that has come; None if nothing is."""
    if file.bytes and path.stat().st_size != file.bytes:
        return f"has {path.stat().st_size} bytes, {file.bytes} are published"
    if file.checksum:
        kind, _, published = file.checksum.partition(":")
        if (found := _digest(path, kind)) != published:
            return f"its {kind} is {found}, {published} is published"
    elif first and (found := _digest(path, "sha256")) != first:
        return f"its sha256 is {found}, at the first download it was {first}; delete download.json if you trust the change"
    return None


def _digest(path: Path, kind: str) -> str:
    digest = hashlib.new(kind)
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _request(url: str, method: str = "GET", **headers: str):
    headers = {"User-Agent": "lesiongen", "Accept-Encoding": "identity", **headers}
    return urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=30)


def _length(file: File, path: Path) -> int:
    """What the host says it is; 0 where it does not say. Raises UserError where no host can be reached."""
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
        f"{name} could not be downloaded from {url} ({problem}). If this machine has no network, run the same on one that "
        f"has, or put a copy at {path}, and run it again; what has come is kept."
    )


def _fetch(file: File, path: Path) -> None:
    """Fetches the first of the file's addresses that has it, going on with what is there of it."""
    path.parent.mkdir(exist_ok=True)
    part, problem, failures, urls = path.with_name(path.name + ".part"), "", 0, list(file.urls)
    while failures < ATTEMPTS:
        if failures:
            time.sleep(PAUSE * 2 ** (failures - 1))
        before = _size(part)
        try:
            if _continue(urls[0], part, file.name):
                return os.replace(part, path)
            problem = "the transfer broke off"
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code in (403, 404) and len(urls) > 1:
                urls.pop(0)
                continue
            if error.code in (401, 403, 404, 410):
                break
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"The disk is full at {path.parent}. Make room, and run the same again to go on.") from None
            problem = str(getattr(error, "reason", "") or error or type(error).__name__)
        failures = 1 if _size(part) > before else failures + 1
    raise _unreachable(file.name, urls[0], problem, path)


def _continue(url: str, part: Path, what: str) -> bool:
    """One request for what is missing; whether the file is whole after it.

    The host's version of the file (its ETag) is kept beside: only of that very version is the rest of any use."""
    version = part.with_name(part.name + ".version")
    have = _size(part) if version.exists() else 0
    seen = version.read_text() if have else ""
    resume = {"Range": f"bytes={have}-", "If-Range": seen} if have else {}
    try:
        response = _request(url, **resume)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # shorter than what we have
            version.unlink()
        raise
    with response:
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if response.status == 206 and not (tag == seen and _starts(response, have)):
            version.unlink(missing_ok=True)
            return False
        start = have if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        if start == 0:
            version.unlink(missing_ok=True)  # first: a kill in between must not leave it beside another version's bytes
            part.write_bytes(b"")
            if tag and not tag.startswith("W/"):
                version.write_text(tag)
        with open(part, "ab") as file, bar(total or 0, what, "B", initial=start) as progress:
            while block := response.read(BLOCK):
                file.write(block)
                progress.update(len(block))
    if total is not None and _size(part) != total:
        return False
    version.unlink(missing_ok=True)
    return True


def _starts(response, at: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {at}-")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def unpack(archive: Path, out: Path) -> dict[str, int]:
    """Takes photographs and tables out of a zip, flat; what is there already stays. Returns each table and
    each folder of photographs, with the number of its files.

    Archives are untrusted: a member that leaves its folder, links, or swells beyond reason refuses the whole archive."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            targets = _targets(zipped.infolist(), archive, out)
            with bar(len(targets), f"unpack {archive.stem}", "file") as progress:
                for target, member in targets.items():
                    if _size(target) != member.file_size or not target.exists():
                        target.parent.mkdir(parents=True, exist_ok=True)
                        partial = target.with_name(f".{target.name}.part")
                        with zipped.open(member) as source, open(partial, "wb") as copy:
                            shutil.copyfileobj(source, copy, BLOCK)  # zipfile ends it at the announced size, checks its crc
                        partial.replace(target)
                    progress.update()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        archive.unlink()
        raise UserError(f"{archive.name} is no archive that can be unpacked ({error}). Run the same again.") from None
    except OSError as error:
        raise UserError(f"{archive.name} cannot be unpacked ({error}). Mend that, and run the same again to go on.") from None
    places = [target if target.suffix.lower() in TABLES else target.parent for target in targets]
    return dict(Counter(str(place.relative_to(out)) for place in places))


def _targets(members: Iterable[zipfile.ZipInfo], archive: Path, out: Path) -> dict[Path, zipfile.ZipInfo]:
    targets: dict[Path, zipfile.ZipInfo] = {}
    for member in members:
        inside = PurePosixPath(member.filename)
        if inside.is_absolute() or ".." in inside.parts or "\\" in member.filename or ":" in member.filename:
            raise UserError(f"{archive.name} has a member '{member.filename}' that leaves its folder; nothing was unpacked.")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{archive.name} has a link, '{member.filename}'; nothing was unpacked.")
        suffix, hidden = inside.suffix.lower(), any(part.startswith((".", "__")) for part in inside.parts)
        if member.is_dir() or hidden or suffix not in PICTURES + TABLES + TEXTS or inside.stem.endswith("_superpixels"):
            continue
        target = out / ("metadata" if suffix in TABLES else f"images/{archive.stem}") / inside.name
        if target in targets:
            raise UserError(f"{archive.name} holds two files named {inside.name}; nothing was unpacked.")
        targets[target] = member
    swollen = sum(member.file_size for member in targets.values())
    if swollen > 20 * archive.stat().st_size + (64 << 20):
        raise UserError(f"{archive.name} would swell to {swollen / 1e9:.1f} GB, far beyond its size; nothing was unpacked.")
    return targets
