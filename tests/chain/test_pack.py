"""The pack stage writes the same bytes with any number of processes and after a kill. Appending moves no packed image."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image, ImageOps

from hpc.data import manifest
from hpc.errors import UserError
from hpc.run.rundir import read_stage_record
from launch.__main__ import main
from lesiongen import experiment
from lesiongen.data.packed import Packed
from lesiongen.ingest import phantom
from lesiongen.stages.pack import pack
from tests.conftest import DEMO


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Returns a folder with 84 lesions, two photographs each on average.

    half.csv lists every second photograph, so it has only some of the photographs of many lesions.
    """
    folder = tmp_path_factory.mktemp("drawn")
    phantom.write(folder, lesions_per_class=12, size=32, progress=False)
    rows = table(folder)
    with open(folder / "half.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows[::2])
    return folder


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metadata.csv").read_text().splitlines()))


def settings(drawn: Path, rows: str = "metadata.csv", **more):
    own = {"images": str(drawn / "images"), "metadata": str(drawn / rows), "size": 32, "val": 0.2, "test": 0.2}
    own |= {"shard_samples": 10, "max_rejected": 1.0} | more
    return experiment.make({"name": "x", "data": own}).data


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".tar", ".json", ".csv", ".safetensors")}


def pack_as_rank(topology, drawn: Path, out: Path) -> str:
    return pack(settings(drawn), out, topology)


def test_the_same_bytes_by_any_hands(drawn, tmp_path, pools):
    digests = {pack(settings(drawn), tmp_path / "a"), pack(settings(drawn, processes=2), tmp_path / "b")}
    digests |= set(pools(2).run(pack_as_rank, drawn, tmp_path / "c"))
    assert len(digests) == 1
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path / "c")


def test_a_killed_packing_goes_on(drawn, tmp_path):
    """SIGKILL ends packing after three shards. The next attempt must pack the others and leave these three as they are."""
    script = """
import sys, os, signal
from lesiongen.ingest import shard_work
from tests.chain.test_pack import settings, pack, Path
one, done = shard_work.pack_shard, []
def pack_shard(work_file):
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(one(work_file))
    return done[-1]
shard_work.pack_shard = pack_shard
pack(settings(Path(sys.argv[1])), Path(sys.argv[2]))
"""
    killed = subprocess.run([sys.executable, "-c", script, str(drawn), str(tmp_path / "x")], timeout=120, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "x" / manifest.NAME).exists()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "x").glob("*.tar")}
    assert len(times) == 3
    pack(settings(drawn), tmp_path / "x")
    assert all(p.stat().st_mtime_ns == mtime for p, mtime in times.items())
    pack(settings(drawn), tmp_path / "y")
    assert content(tmp_path / "x") == content(tmp_path / "y")


def test_appending_the_rest(drawn, tmp_path):
    pack(settings(drawn, "half.csv"), tmp_path / "s")
    before = content(tmp_path / "s")
    half = {r["image_id"]: r for r in Packed([tmp_path / "s"]).catalog()}
    pack(settings(drawn), tmp_path / "s", append=True)
    facts = manifest.read(tmp_path / "s")
    rows = {r["image_id"]: r for r in Packed([tmp_path / "s"]).catalog()}
    pack(settings(drawn), tmp_path / "whole")
    at_once = {r["image_id"]: r for r in Packed([tmp_path / "whole"]).catalog()}
    assert {k: r["split"] for k, r in rows.items()} == {k: r["split"] for k, r in at_once.items()}
    assert {k: rows[k] for k in half} == half
    assert all((tmp_path / "s" / n).read_bytes() == b for n, b in before.items() if n != manifest.NAME)
    groups: dict[str, set] = {}
    for row in rows.values():
        groups.setdefault(row["group"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in groups.values())
    whole = manifest.read(tmp_path / "whole")
    for key in ("counts", "groups", "mean", "std", "data_variance", "licences", "attributions", "classes", "vocabularies"):
        assert facts[key] == whole[key], key
    # Append again: no image is new.
    digest = pack(settings(drawn), tmp_path / "s", append=True)
    assert manifest.read(tmp_path / "s")["shards"] == facts["shards"]
    assert digest


def test_what_would_join_two_splits_is_refused(drawn, tmp_path):
    """A table assigns a new photograph to another split than the packed photographs of its lesion. Packing must reject it."""
    pack(settings(drawn, "half.csv"), tmp_path / "s")
    packed = {r["image_id"]: r for r in Packed([tmp_path / "s"]).catalog()}
    rows = [r for r in table(drawn) if r["image_id"] not in packed]
    where = {r["own_group"]: r["split"] for r in packed.values()}
    victim = next(r for r in rows if where.get(r["lesion_id"]) == "test")
    (tmp_path / "splits.csv").write_text(f"image,split\n{victim['image_id']},train\n")
    pack(settings(drawn, splits=str(tmp_path / "splits.csv")), tmp_path / "s", append=True)
    rejected = [json.loads(line) for line in (tmp_path / "s" / "rejected-1.jsonl").read_text().splitlines()]
    assert [r["image"] for r in rejected] == [victim["image_id"]]
    assert "is packed in test" in rejected[0]["reason"]


def test_others_read_the_shards(drawn, tmp_path):
    pack(settings(drawn), tmp_path / "s")
    facts = manifest.read(tmp_path / "s")
    for entry in facts["shards"]:
        path = str(tmp_path / "s" / entry["name"])
        samples = list(wds.WebDataset(path, shardshuffle=False).decode("pil"))
        assert len(samples) == entry["count"]
        assert all(s["jpg"].size == (32, 32) and s["json"]["group"] == s["json"]["lesion_id"] for s in samples)
        listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True).stdout.split()
        assert len(listed) == 2 * entry["count"]


def test_the_command_appends_with_the_sets_own_settings(drawn, tmp_path, capsys):
    out = tmp_path / "set" / "shards"
    given = ["--images", str(drawn / "images"), "--out", str(out)]
    more = ["data.val=0.2", "data.test=0.2", "data.max_rejected=1", "data.format=png"]
    assert main(["pack", *given, "--metadata", str(drawn / "half.csv"), "--size", "32", *more]) == 0
    assert main(["pack", *given, "--metadata", str(drawn / "metadata.csv"), "--append"]) == 0
    facts = manifest.read(out)
    assert sum(s["count"] for s in facts["shards"]) == len(list((drawn / "images").iterdir()))
    assert main(["verify", str(out)]) == 0
    assert main(["pack", *given, "--append", "data.size=64"]) == 2
    assert "size: 32 → 64" in capsys.readouterr().err
    assert main(["pack", "--images", str(drawn / "images"), "--out", str(tmp_path / "none"), "--append"]) == 2


def test_options_hold_for_a_config_too(drawn, tmp_path, capsys):
    given = [DEMO, f"runs={tmp_path}", "name=n", f"data.images={drawn / 'images'}", "data.val=0.2", "data.test=0.2"]
    given += ["data.max_rejected=1", "--metadata", str(drawn / "half.csv"), "--size", "32", "--near-duplicates"]
    assert main(["pack", *given, "--out", str(tmp_path / "x")]) == 2
    assert "--out goes with --images" in capsys.readouterr().err
    assert main(["pack", *given]) == 0
    settings = read_stage_record(tmp_path / "n" / "shards")["identity"]
    assert (settings["size"], settings["near_duplicates"]) == (32, True)
    assert "near duplicates" in capsys.readouterr().out


def test_nothing_finished_is_touched_by_a_bad_append(drawn, tmp_path):
    pack(settings(drawn, "half.csv"), tmp_path / "s")
    before = content(tmp_path / "s")
    broken = tmp_path / "broken"
    shutil.copytree(drawn, broken)
    for image in (broken / "images").iterdir():
        image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(UserError, match="cannot be used"):
        pack(settings(broken, max_rejected=0.1), tmp_path / "s", append=True)
    assert {k: v for k, v in content(tmp_path / "s").items() if k in before} == before
    assert all((tmp_path / "s" / e["name"]).exists() for e in manifest.read(tmp_path / "s")["shards"])


def test_near_duplicates_join_groups(tmp_path, capsys):
    """Some photographs come again under another id and lesion: mirrored, cropped, darker, recompressed. Also when appended."""
    phantom.write(tmp_path, lesions_per_class=8, size=96, progress=False)
    rows = table(tmp_path)
    for row in rows[:30:3]:
        with Image.open(tmp_path / "images" / f"{row['image_id']}.jpg") as image:
            again = ImageOps.mirror(image).crop((3, 2, 92, 91)).point(lambda v: int(v * 0.8))
            again.save(tmp_path / "images" / f"again_{row['image_id']}.jpg", quality=80)
    copies = [row | {"image_id": f"again_{row['image_id']}", "lesion_id": f"other_{row['lesion_id']}"} for row in rows[:30:3]]
    for name, part in (("metadata.csv", rows + copies), ("first.csv", rows)):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(part)
    own = {"size": 32, "near_duplicates": True}
    pack(settings(tmp_path, **own), tmp_path / "at_once")
    pack(settings(tmp_path, "first.csv", **own), tmp_path / "later")
    pack(settings(tmp_path, **own), tmp_path / "later", append=True)
    for folder in ("at_once", "later"):
        packed = {r["image_id"]: r for r in Packed([tmp_path / folder]).catalog()}
        joined = [packed[c["image_id"]]["group"] == packed[c["image_id"].removeprefix("again_")]["group"] for c in copies]
        assert sum(joined) >= 8, folder  # some drawings have too little detail to be recognised
        splits = {}
        for row in packed.values():
            assert splits.setdefault(row["group"], row["split"]) == row["split"]
    suffixed = (tmp_path / "later" / "near-duplicates-1.csv").read_text().splitlines()
    assert all("again_" in line for line in suffixed[1:])
    assert Image.open(tmp_path / "at_once" / "near-duplicates.png").width > 600
    assert "pairs of near duplicates" in capsys.readouterr().out
