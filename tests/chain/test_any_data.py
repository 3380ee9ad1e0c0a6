"""Any tables and folders: packing never ends in a traceback, and every file and row is packed, rejected or left out.

The first test of this file draws a few folders, the test marked `long` many.
"""

import contextlib
import csv
import io
import json
import os
import shutil
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from hpc import errors
from launch.__main__ import main
from lesiongen.data.packed import Packed
from lesiongen.ingest.csv_text import plain
from lesiongen.ingest.folders import IMAGE_SUFFIXES
from lesiongen.ingest.sources import UNKNOWN, image_id


def _encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, ("JPEG", "PNG")[seed % 2])
    return buffer.getvalue()


GOOD = [_encoded(i) for i in range(32)]
BROKEN = [b"", b"no image", GOOD[0][: len(GOOD[0]) // 2], GOOD[1][:60], b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"GIF89a\1\0\1\0"]
NAMES = (
    *("IMG_{}", "img {}", "{}", "ISIC_{:07d}", "lésion_{}", "Läsion {} ½", "病变{}", "a.b.{}", "x{}.jpg", "'{}'", '"{}"'),
    *("a,b;{}", "tab\t{}", "line\n{}", "back\\slash{}", "%d{}", "#{}", "-{}", "{}_lesion", "{}_segmentation", "{}_R1_Label1"),
    *("e\u0301_{}", "😀{}", "N" * 150 + "{}", "\u202e{}", "{} ", " {}", "nan{}", "=1+{}", "{}.0", "{}/etc", "IMG_{}\r"),
)
FOLDERS = ("", "", "a", "a/b", "train", "val", "test", "@eaDir", ".hidden", "mel", "nv", "Ünï cödé", "x.jpg", "__MACOSX")
SUFFIXES = (*IMAGE_SUFFIXES, ".JPG", ".PNG", ".gif", ".heic", "")
HEADERS = {
    "image": ("image_id", "isic_id", "Image", "image name", "file", "photo", "", "ISIC-ID"),
    "dx": ("dx", "diagnosis", "Label", "class", "finding", "", "dx\n"),
    "lesion": ("lesion_id", "Lesion ID", "mole", "", "lesion_id"),
    "patient": ("patient_id", "subject", "Patient No", ""),
    "note": ("note", "age", "sex", "localization", "copyright_license", "target", "melanoma", "é"),
}
CELLS = (
    "mel",
    "nv",
    "bcc",
    "",
    "NaN",
    "unknown",
    "1",
    "0.0",
    "7",
    "a,b",
    "a;b",
    'say "x"',
    "two\nlines",
    "é",
    "=SUM(A1)",
    "\t",
)


@dataclass
class Data:
    """A drawn folder. files: path below images/ → content; tables: name → bytes; rows: image, diagnosis as in the tables."""

    files: dict[str, bytes] = field(default_factory=dict)
    tables: dict[str, bytes] = field(default_factory=dict)


@st.composite
def drawn(draw) -> Data:
    """Images of drawn names, folders and contents, and tables that list some of them, in any spelling."""
    data, ids = Data(), []
    patterns = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4))
    plain = draw(st.booleans())
    for i in range(draw(st.sampled_from([0, 3, 20, *[30] * 7]))):
        name = draw(st.sampled_from(patterns)).format(i).replace("/", "_")
        ids.append(name)
        odd = not plain and draw(st.integers(0, 7)) == 0
        content = draw(st.sampled_from(BROKEN)) if odd else GOOD[i]
        suffix = draw(st.sampled_from(SUFFIXES)) if odd else ".jpg"
        folder = draw(st.sampled_from(FOLDERS)) if not plain else ""
        data.files[os.path.join(folder, name + suffix)] = content
        if odd and draw(st.booleans()):  # again in another folder: a copy, or another image of the same name
            again = draw(st.sampled_from([content, content, GOOD[31]]))
            data.files.setdefault(os.path.join("again", name + suffix), again)
    for number in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2, 3]))):
        data.tables[draw(st.sampled_from(["metadata.csv", "t.tsv", "b.txt"])) if number else "metadata.csv"] = draw(table(ids))
    return data


@st.composite
def table(draw, ids: list[str]) -> bytes:
    """A table of images: some are missing, some are listed twice, some have no file."""
    usual = draw(st.booleans())
    header = {kind: names[0] if usual else draw(st.sampled_from(names)) for kind, names in HEADERS.items()}
    separator, end = draw(st.sampled_from([",", ";", "\t", "|"])), draw(st.sampled_from(["\n", "\r\n", "\r"]))
    out = io.StringIO()
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]))
    writer = csv.writer(out, delimiter=separator, lineterminator=end, quoting=quoting)
    writer.writerow(header.values())
    form = draw(st.sampled_from([str, str.upper, lambda name: f"{name}.jpg", lambda name: f"p\\{name}.PNG"]))
    more = draw(st.lists(st.sampled_from(["", "IMG_999", "nowhere", "  ", *ids[:2]]), max_size=3))
    for i, name in enumerate([*(name for name in ids if usual or draw(st.integers(0, 9))), *more]):
        odd = [draw(st.sampled_from(CELLS)) for _ in range(4)] if not usual or i % 5 == 0 else ["mel", f"L{i // 2}", "", "x"]
        writer.writerow([form(name), *odd][: 5 if usual or draw(st.integers(0, 9)) else draw(st.integers(0, 5))])
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252", "latin-1"]))
    content = out.getvalue().encode(encoding, "replace")
    return content[: draw(st.integers(0, len(content)))] if not usual and draw(st.integers(0, 19)) == 0 else content


def write(data: Data, folder: Path) -> None:
    for name, content in data.files.items():
        path = folder / "images" / name
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):  # a file has a folder's name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (folder / "images").mkdir(exist_ok=True)
    (folder / "tables").mkdir()
    for name, content in data.tables.items():
        (folder / "tables" / name).write_bytes(content)


def check(data: Data, folder: Path) -> None:
    """Packs, and compares what comes out with what went in."""
    write(data, folder)
    command = ["pack", "--images", str(folder / "images"), "--out", str(folder / "s"), "--size", "16"]
    if data.tables:
        named = folder / "tables"
        command += ["--metadata", str(named if len(data.tables) > 1 else named / "metadata.csv")]
    command += ["data.val=0.3", "data.test=0.3", "data.max_rejected=1", "data.unlabelled=true", "data.ungrouped=true"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command)
    event(f"exit code {code}")
    said = err.getvalue()
    assert code in (0, errors.USAGE) and "Traceback" not in said, said
    if code:
        event(said.replace(str(folder), "")[:40])
        assert len(said.strip()) > 20
        return
    packed = {row["image_id"]: row for row in Packed([folder / "s"]).catalog()}
    rejected = {e["image"]: e["reason"] for e in _lines(folder / "s" / "rejected.jsonl")}
    left_out = {e["image"]: e["reason"] for e in _lines(folder / "s" / "left_out.jsonl")}
    assert all(rejected.values()) and all(left_out.values()) and not packed.keys() & left_out.keys()
    known = packed.keys() | rejected.keys() | left_out.keys()
    # Every image file that is not in a hidden or skipped folder is somewhere; the others are counted.
    for path in (folder / "images").rglob("*"):
        parts = path.relative_to(folder / "images").parts
        hidden = any(p.startswith(".") for p in parts) or {"@eaDir", "__MACOSX"} & set(parts[:-1])
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES and not hidden:
            assert plain(path.stem) in known or ascii(str(path))[1:-1] in known, path
        elif path.is_file() and not {"@eaDir", "__MACOSX", ".hidden"} & set(parts[:-1]):
            assert "files of other kinds ignored" in out.getvalue()
    # Every packed image is in its shard, once, with the facts of its row.
    facts = [json.loads(member) for path in (folder / "s").glob("*.tar") for member in _json_members(path)]
    assert sorted(fact["image_id"] for fact in facts) == sorted(packed)
    splits: dict[str, set] = {}
    for row in packed.values():
        splits.setdefault(row["group"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["verify", str(folder / "s")]) == 0


def check_rows(ids: list[str], folder: Path, header: str, separator: str, encoding: str, quoting: int) -> None:
    """Packs 30 images with a table of the usual columns, and compares the facts of each image with its row.

    One more image has no row, one row has no image, and one row comes twice: exactly these are rejected.
    """
    write(Data({f"{name}.png": GOOD[i] for i, name in enumerate([*ids, "no row"])}), folder)
    rows = {name: (("mel", "nv", "", "a, b")[i % 4], f"L{i // 2}") for i, name in enumerate(ids)}
    with open(folder / "tables" / "metadata.csv", "w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=separator, quoting=quoting)
        more = {"nowhere": ("mel", "L0"), f"{ids[3]}.jpg": ("bcc", "L9")}
        writer.writerows([header.split(), *([*cells, name] for name, cells in (rows | more).items())])
    command = ["pack", "--images", str(folder / "images"), "--out", str(folder / "s"), "--size", "16"]
    command += ["--metadata", str(folder / "tables" / "metadata.csv"), "data.val=0.3", "data.test=0.3", "data.max_rejected=0.1"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(command) == 0
    facts = [json.loads(member) for path in (folder / "s").glob("*.tar") for member in _json_members(path)]
    found = {fact["image_id"]: (fact["dx"], fact["lesion_id"]) for fact in facts}
    rejected = [(e["image"], e["reason"].partition(" on line")[0]) for e in _lines(folder / "s" / "rejected.jsonl")]
    reasons = ("listed again", "no image file for this row", "no row in the metadata")
    assert sorted(rejected) == sorted(zip((image_id(ids[3]), "nowhere", "no row"), reasons, strict=True))
    assert found == {image_id(name): cells if cells[0] not in UNKNOWN else ("", cells[1]) for name, cells in rows.items()}


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _json_members(path: Path) -> list[bytes]:
    with tarfile.open(path) as tar:
        return [tar.extractfile(member).read() for member in tar.getmembers() if member.name.endswith(".json")]


def in_a_folder(function, *arguments) -> None:
    folder = Path(tempfile.mkdtemp(prefix="any-data-"))
    try:
        function(*arguments, folder)
    finally:
        shutil.rmtree(folder)


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True, "database": None}


@settings(max_examples=40, derandomize=True, **QUIET)
@given(drawn())
def test_nothing_is_lost_and_nothing_is_silent(data):
    in_a_folder(check, data)


@pytest.mark.long
@pytest.mark.timeout(900)
@settings(max_examples=1500, **QUIET)
@given(drawn())
def test_nothing_is_lost_and_nothing_is_silent_at_length(data):
    in_a_folder(check, data)


@settings(max_examples=15, derandomize=True, **QUIET)
@given(
    st.sampled_from([name for name in NAMES if not name.startswith((" ", "{}_", "x{}")) and not name.endswith((" ", "\r"))]),
    st.sampled_from(["dx lesion_id image_id", "Diagnosis Lesion-ID Image"]),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_every_image_has_the_facts_of_its_row(pattern, header, separator, encoding, quoting):
    ids = [pattern.replace("/", "_").replace("\\", "").format(i) for i in range(30)]
    in_a_folder(lambda folder: check_rows(ids, folder, header, separator, encoding, quoting))
