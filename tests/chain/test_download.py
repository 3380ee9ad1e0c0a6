"""`lesiongen download` from a local server with small archives that have the layout of the real ones."""

import hashlib
import io
import json
import os
import shutil
import stat
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from hpc.errors import UserError
from lesiongen.ingest import catalog, download
from lesiongen.ingest.public import SETS, DataSet, File
from tests.faults.test_storage import Server

ONE_HOT = {"nv": "0,1,0,0,0,0,0", "mel": "1,0,0,0,0,0,0"}


def picture(n: int) -> bytes:
    out = io.BytesIO()
    Image.frombytes("RGB", (24, 24), os.urandom(24 * 24 * 3)).save(out, "JPEG", quality=95)
    return out.getvalue() + bytes([n % 256]) * 20_000  # so long that a transfer can be cut in the middle


def zipped(files: dict[str, bytes | str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def pictures(folder: str, first: int, number: int) -> bytes:
    found = {f"{folder}/ISIC_{first + n:07d}.jpg": picture(n) for n in range(number)}
    extra = {f"{folder}/ISIC_{first:07d}_superpixels.png": b"mask", f"{folder}/LICENSE.txt": "CC", "__MACOSX/._x.jpg": b"x"}
    return zipped({f"{folder}/": b""} | found | extra)


def host_of(name: str) -> dict[str, bytes]:
    """Returns {file name: content} of a public data set, as its owner's servers offer it, but with few and small images."""
    if name == "isic-2016":
        part = "ISBI2016_ISIC_Part3_"
        return {
            part + "Training_Data.zip": pictures(part + "Training_Data", 0, 4),
            part + "Test_Data.zip": pictures(part + "Test_Data", 100, 2),
            part + "Training_GroundTruth.csv": b"".join(b"ISIC_%07d,benign\n" % n for n in range(4)),
            part + "Test_GroundTruth.csv": b"ISIC_0000100,0.0\nISIC_0000101,1.0\n",
        }
    if name == "ham10000":
        rows = [f"HAM_{n // 2},ISIC_{n:07d},nv,histo,40,male,back,x" for n in range(6)]
        table = "\n".join(["lesion_id,image_id,dx,dx_type,age,sex,localization,dataset", *rows])
        return {
            "HAM10000_metadata.csv": table.encode(),
            **{f"HAM10000_images_part_{k}.zip": pictures(".", 3 * k - 3, 3) for k in (1, 2)},
        }
    files = {"ISIC2018_Task3_Training_LesionGroupings.csv": b"image,lesion_id,diagnosis_confirm_type\nISIC_0000000,HAM_7,x\n"}
    for k, split in enumerate(("Training", "Validation", "Test")):
        stem = f"ISIC2018_Task3_{split}"
        rows = [f"ISIC_{10 * k + n:07d},{ONE_HOT['mel' if n else 'nv']}" for n in range(3)]
        table = "\n".join(["image,MEL,NV,BCC,AKIEC,BKL,DF,VASC", *rows])
        files[f"{stem}_GroundTruth.zip"] = zipped({f"{stem}_GroundTruth/{stem}_GroundTruth.csv": table})
        files[f"{stem}_Input.zip"] = pictures(f"{stem}_Input", 10 * k, 3)
    return files


@pytest.fixture
def host(monkeypatch):
    """A server with a small data set, "toy", of two files. SETS lists their true sizes and checksums."""
    table, archive = b"image,dx\nISIC_0000000,nv\nISIC_0000001,mel\n", pictures("Train_Data", 0, 2)
    files = (
        File("table.csv", (), len(table), "sha256:" + hashlib.sha256(table).hexdigest()),
        File("train.zip", (), len(archive), "md5:" + hashlib.md5(archive).hexdigest()),
    )
    monkeypatch.setitem(SETS, "toy", DataSet("CC-0 of the toy\n", files))
    monkeypatch.setattr(download, "PAUSE", 0.01)
    with Server({"/table.csv": table, "/train.zip": archive}) as server:
        yield server


def unpublished(monkeypatch) -> None:
    """Removes the sizes and checksums of the data set "toy" from SETS."""
    files = tuple(replace(f, bytes=None, checksum=None) for f in SETS["toy"].files)
    monkeypatch.setitem(SETS, "toy", replace(SETS["toy"], files=files))


def ranges(server: Server, path: str) -> list[str]:
    """Returns the Range header of each GET request for a path, "" if the request had none."""
    return [requested_range for method, logged_path, requested_range in server.log if logged_path == path and method == "GET"]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("name", ["isic-2016", "isic-2018", "ham10000"])
def test_each_set_comes_whole_and_pack_understands_it(name, tmp_path, monkeypatch, capsys):
    files = host_of(name)
    assert sorted(files) == sorted(f.name for f in SETS[name].files)
    unchecked = tuple(replace(f, bytes=None, checksum=None) for f in SETS[name].files)
    monkeypatch.setitem(SETS, name, replace(SETS[name], files=unchecked))
    with Server({f"/mirror/{k}": v for k, v in files.items()}) as server:
        download.download(name, tmp_path, server.url + "/mirror/")
        before = len(server.log)
        download.download(name, tmp_path, server.url + "/mirror")
        assert len(server.log) == before, "the second call sent requests"
    out = capsys.readouterr().out
    assert f"lesiongen pack --images {tmp_path}/images --metadata {tmp_path}/metadata --out {tmp_path}/shards" in out
    licence = (tmp_path / "LICENCE.txt").read_text()
    assert ("CC-0" if name == "isic-2016" else "CC-BY-NC 4.0") in licence and licence in out
    found = catalog.read_catalog(tmp_path / "images", tmp_path / "metadata")
    assert len(found.records) == {"isic-2016": 6, "isic-2018": 9, "ham10000": 6}[name] and not found.rejected
    assert all(r.dx for r in found.records) and not (tmp_path / ".incoming").exists()
    by_split = {s: sum(r.split == s for r in found.records) for s in ("train", "val", "test", "")}
    assert list(by_split.values()) == {"isic-2016": [4, 0, 2, 0], "isic-2018": [3, 3, 3, 0], "ham10000": [0, 0, 0, 6]}[name]
    assert not list(tmp_path.rglob("*superpixels*")) and not list(tmp_path.rglob("._*"))


def test_an_interrupted_transfer_goes_on_where_it_was(host, tmp_path):
    host.faults["/train.zip"] = ["cut", "cut"]
    download.download("toy", tmp_path, host.url)
    size = len(host.files["/train.zip"])
    assert ranges(host, "/train.zip") == ["", f"bytes={size // 2}-", f"bytes={size // 2 + (size - size // 2) // 2}-"]
    assert names(tmp_path / "images" / "train") == ["ISIC_0000000.jpg", "ISIC_0000001.jpg", "LICENSE.txt"]


def test_a_later_run_goes_on_too(host, tmp_path):
    host.faults["/train.zip"] = ["cut"] + ["500"] * 9
    with pytest.raises(UserError, match="HTTP 500"):
        download.download("toy", tmp_path, host.url)
    assert names(tmp_path / "metadata") == ["table.csv"]
    host.faults, host.log[:] = {}, []
    download.download("toy", tmp_path, host.url)
    assert ranges(host, "/train.zip") == [f"bytes={len(host.files['/train.zip']) // 2}-"] and not ranges(host, "/table.csv")


@pytest.mark.parametrize("if_range", [True, False], ids=["told", "noticed"])
def test_another_version_on_the_host_starts_over(host, tmp_path, monkeypatch, if_range):
    host.if_range = if_range
    unpublished(monkeypatch)
    host.faults["/train.zip"] = ["cut"] + ["500"] * 9
    with pytest.raises(UserError, match="HTTP 500"):
        download.download("toy", tmp_path, host.url)
    host.files["/train.zip"], host.etag, host.faults = pictures("Train_Data", 0, 2), '"2"', {}
    download.download("toy", tmp_path, host.url)
    assert len(names(tmp_path / "images" / "train")) == 3


def test_a_host_without_ranges_starts_over(host, tmp_path):
    host.ranges = False
    host.faults["/train.zip"] = ["cut"]
    download.download("toy", tmp_path, host.url)
    assert len(names(tmp_path / "images" / "train")) == 3 and len(ranges(host, "/train.zip")) == 2


def test_a_wrong_checksum_is_fetched_again_then_refused(host, tmp_path, capsys):
    host.faults["/train.zip"] = ["flip"]
    download.download("toy", tmp_path / "a", host.url)
    assert "md5 is" in capsys.readouterr().out and len(ranges(host, "/train.zip")) == 2
    host.faults["/train.zip"] = ["flip", "flip"]
    with pytest.raises(UserError, match="the published one is"):
        download.download("toy", tmp_path / "b", host.url)
    assert not (tmp_path / "b" / "images").exists()


def test_without_a_published_checksum_the_first_download_counts(host, tmp_path, monkeypatch):
    unpublished(monkeypatch)
    download.download("toy", tmp_path, host.url)
    record = json.loads((tmp_path / "download.json").read_text())["files"]["train.zip"]
    assert record["sha256"] == hashlib.sha256(host.files["/train.zip"]).hexdigest()
    shutil.rmtree(tmp_path / "images")
    download.download("toy", tmp_path, host.url)
    shutil.rmtree(tmp_path / "images")
    host.files["/train.zip"] = pictures("Train_Data", 0, 2)
    with pytest.raises(UserError, match="at the first download it was"):
        download.download("toy", tmp_path, host.url)


def test_the_second_address_is_asked_where_the_first_has_nothing(host, tmp_path, monkeypatch):
    files = tuple(replace(f, urls=(f"{host.url}/gone/{f.name}", f"{host.url}/{f.name}")) for f in SETS["toy"].files)
    monkeypatch.setitem(SETS, "toy", replace(SETS["toy"], files=files))
    download.download("toy", tmp_path)
    assert len(names(tmp_path / "images" / "train")) == 3
    assert all(
        url.startswith("https://") for s in ("isic-2016", "isic-2018", "ham10000") for f in SETS[s].files for url in f.urls
    )


def test_offline_is_one_paragraph_after_the_licence(host, tmp_path, capsys, monkeypatch):
    for prepare in (lambda: None, lambda: unpublished(monkeypatch)):
        prepare()
        with pytest.raises(UserError, match="If this machine has no network") as error:
            download.download("toy", tmp_path, "http://127.0.0.1:9")
        assert "\n" not in str(error.value) and (tmp_path / "LICENCE.txt").exists()
    assert "CC-0 of the toy" in capsys.readouterr().out


def test_files_brought_by_hand_need_no_network(host, tmp_path):
    (tmp_path / ".incoming").mkdir()
    for path, content in host.files.items():
        (tmp_path / ".incoming" / path[1:]).write_bytes(content)
    download.download("toy", tmp_path, "http://127.0.0.1:9")
    assert len(names(tmp_path / "images" / "train")) == 3


def test_a_full_disk_is_found_beforehand(host, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
    with pytest.raises(UserError, match="Make room"):
        download.download("toy", tmp_path, host.url)
    assert not host.gets()


def member(name: str, content: bytes, mode: int = stat.S_IFREG) -> bytes:
    info, out = zipfile.ZipInfo(name), io.BytesIO()
    info.external_attr = (mode | 0o777) << 16
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (zipped({"good.jpg": b"x", "../evil.jpg": b"x"}), "outside its folder"),
        (zipped({"good.jpg": b"x", "/tmp/evil.jpg": b"x"}), "outside its folder"),
        (zipped({"good.jpg": b"x", "a\\..\\evil.jpg": b"x"}), "outside its folder"),
        (zipped({"a/x.jpg": b"x", "b/x.jpg": b"y"}), "two files"),
        (member("a.jpg", b"/etc/passwd", stat.S_IFLNK), "link"),
        (member("a.jpg", bytes(70 << 20)), "would unpack to"),
        (b"no zip at all", "not a usable zip"),
        (zipped({"good.jpg": b"x" * 999}).replace(b"x" * 999, b"y" * 999), "not a usable zip"),
    ],
    ids=["up", "absolute", "windows", "twice", "link", "bomb", "junk", "crc"],
)
def test_hostile_and_broken_archives(tmp_path, content, words):
    out = tmp_path / "out"
    out.mkdir()
    (out / "x.zip").write_bytes(content)
    with pytest.raises(UserError, match=words):
        download.unpack(out / "x.zip", out)
    assert not [p for p in tmp_path.rglob("*.jpg") if not p.name.startswith(".")]


def test_unpacking_goes_on_and_mends(tmp_path):
    (tmp_path / "x.zip").write_bytes(pictures("d", 0, 3))
    assert download.unpack(tmp_path / "x.zip", tmp_path) == {"images/x": 4}
    first, second = tmp_path / "images/x/ISIC_0000000.jpg", tmp_path / "images/x/ISIC_0000001.jpg"
    inode = first.stat().st_ino
    second.write_bytes(b"half")
    download.unpack(tmp_path / "x.zip", tmp_path)
    assert first.stat().st_ino == inode and second.stat().st_size > 20_000


def test_wrong_names_and_places(host, tmp_path):
    with pytest.raises(UserError, match="isic-2016, isic-2018, ham10000"):
        download.download("isic-1066", tmp_path)
    with pytest.raises(UserError, match="not an http"):
        download.download("toy", tmp_path, "file:///etc")
    download.download("toy", tmp_path, host.url)
    with pytest.raises(UserError, match="holds toy"):
        download.download("ham10000", tmp_path, host.url)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        download.download("toy", tmp_path / "file" / "x", host.url)
