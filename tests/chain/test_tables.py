"""Folders and tables as people have them: what is read, what is left out and said, and what stops packing."""

import csv
import io
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpc.data import manifest
from hpc.errors import UserError
from lesiongen.data.config import DataConfig
from lesiongen.data.packed import Packed
from lesiongen.ingest import layouts, sources
from lesiongen.ingest.csv_text import column_key
from lesiongen.ingest.folders import find_images
from lesiongen.ingest.packing import pack
from lesiongen.ingest.splits import split_of  # noqa: F401 — the drawn ids below fall into all three splits

NUMBER = 48
DIAGNOSES = ("mel", "nv", "bcc")


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def row(i: int) -> dict:
    """Two images of each lesion, two lesions of each patient."""
    return {
        "image": f"IMG_{i:04d}",
        "lesion": f"LESION_{i // 2:03d}",
        "patient": f"P_{i // 4:03d}",
        "dx": DIAGNOSES[i // 2 % 3],
    }


@pytest.fixture
def images(tmp_path) -> Path:
    for i in range(NUMBER):
        draw(tmp_path / "images" / f"IMG_{i:04d}.png", i)
    return tmp_path / "images"


def table(names: dict[str, str], more: dict[str, str] | None = None, separator: str = ",", end: str = "\r\n", form=str) -> str:
    """Returns a table. names: our field → its column; more: column → the value of every row; form: applied to image names."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator=end)
    writer.writerow([*names.values(), *(more or {})])
    for i in range(NUMBER):
        cells = {ours: value if ours != "image" else form(value) for ours, value in row(i).items() if ours in names}
        writer.writerow([*(cells[ours] for ours in names), *(more or {}).values()])
    return out.getvalue()


HAM = {"lesion": "lesion_id", "image": "image_id", "dx": "dx"}


def packed(images: Path, metadata: Path | None, folder: Path, **settings) -> list[dict]:
    """Packs, and returns the facts of all images."""
    pack(DataConfig(str(images), metadata and str(metadata), size=16, val=0.25, test=0.25, **settings), folder)
    found = Packed([folder])
    assert sum(sum(c.values()) for c in found.counts.values()) <= NUMBER
    lines = []
    for path in folder.glob("*.tar"):
        import tarfile

        with tarfile.open(path) as tar:
            split = path.name.partition("-")[0]
            lines += [
                json.loads(tar.extractfile(m).read()) | {"split": split} for m in tar.getmembers() if m.name.endswith(".json")
            ]
    return lines


def complete(lines: list[dict]) -> bool:
    """Whether all images have their label and lesion, and no lesion lies in two splits."""
    splits: dict[str, set] = {}
    for line in lines:
        splits.setdefault(line["lesion_id"], set()).add(line["split"])
    labelled = all(line["dx"].lower() in DIAGNOSES and line["lesion_id"] for line in lines)
    return len(lines) == NUMBER and labelled and all(len(found) == 1 for found in splits.values())


SPELLINGS = {
    "plain": table(HAM).encode(),
    "semicolon": table(HAM, separator=";").encode(),
    "bars": table(HAM, separator="|").encode(),
    "tabs": table(HAM, separator="\t").encode(),
    "BOM": table(HAM).encode("utf-8-sig"),
    "UTF-16 of Excel": table(HAM, separator="\t").encode("utf-16"),
    "Windows' encoding": table(HAM, {"note": "Müller"}).encode("cp1252"),
    "old Mac": table(HAM, end="\r").encode(),
    "sep= line": b"sep=;\r\n" + table(HAM, separator=";").encode(),
    "capitals and spaces": table({"lesion": " Lesion ID", "image": "Image-Id ", "dx": "DX"}).encode(),
    "quoted": table({"lesion": '"lesion_id"', "image": "image_id", "dx": "dx"}).encode(),
    "file names": table(HAM, form=lambda name: f"{name}.JPG").encode(),
    "paths": table(HAM, form=lambda name: f"some/where/{name}.png").encode(),
    "backslashes": table(HAM, form=lambda name: f"images\\{name}.png").encode(),
    "other case": table(HAM, form=str.lower).encode(),
    "separator in a quoted name": table(HAM | {"patient": "a;b;c;d"}).encode(),
    "empty lines": table(HAM).replace("\r\n", "\r\n\r\n").encode(),
}


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        *((spelling, "table.csv") for spelling in SPELLINGS),
        ("tabs", "table.tab"),
        ("semicolon", "table"),
        ("plain", "table.txt"),
    ],
)
def test_a_table_is_read_however_it_was_saved(images, tmp_path, spelling, name):
    path = tmp_path / "meta" / name
    path.parent.mkdir()
    path.write_bytes(SPELLINGS[spelling])
    assert complete(packed(images, path, tmp_path / "shards"))


@pytest.mark.parametrize(("in_table", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_are_one_letter_or_two(tmp_path, in_table, on_disk):
    for i in range(NUMBER):
        draw(tmp_path / "images" / (unicodedata.normalize(on_disk, f"lésion_{i:04d}") + ".png"), i)
    form = lambda name: unicodedata.normalize(in_table, name.replace("IMG", "lésion"))  # noqa: E731
    (tmp_path / "meta.csv").write_text(table(HAM, form=form), encoding="utf-8")
    assert complete(packed(tmp_path / "images", tmp_path / "meta.csv", tmp_path / "shards"))


def test_a_workbook_is_named(images, tmp_path):
    (tmp_path / "meta.xlsx").write_bytes(b"PK\x03\x04rest")
    with pytest.raises(UserError, match=r"is an Excel workbook\. Save it as CSV"):
        packed(images, tmp_path / "meta.xlsx", tmp_path / "shards")


# Data set → (names of its columns for our fields, other columns of its published header).
HEADERS = {
    "SLICE-3D 2024": (
        {"image": "isic_id", "lesion": "lesion_id", "patient": "patient_id", "dx": "iddx_3"},
        {"target": "0", "age_approx": "40", "sex": "male", "iddx_full": "x", "iddx_1": "Benign", "iddx_2": "", "tbp_lv_A": "1"},
    ),
    "BCN20000": (
        {"image": "bcn_filename", "lesion": "lesion_id", "dx": "diagnosis"},
        {"age_approx": "55", "anatom_site_general": "anterior torso", "sex": "male", "capture_date": "2010", "split": "train"},
    ),
    "PAD-UFES-20": (
        {"patient": "patient_id", "lesion": "lesion_id", "dx": "diagnostic", "image": "img_id"},
        {"smoke": "False", "age": "55", "gender": "FEMALE", "region": "NECK", "biopsed": "True", "skin_cancer_history": "True"},
    ),
    "Derm7pt": (
        {"lesion": "case_num", "dx": "diagnosis", "image": "derm"},
        {"seven_point_score": "2", "location": "abdomen", "sex": "female", "clinic": "NEL/x.jpg", "case_id": ""},
    ),
    "Fitzpatrick17k": (
        {"image": "md5hash", "dx": "label"},
        {"fitzpatrick_scale": "3", "nine_partition_label": "x", "url": "y"},
    ),
    "DDI": ({"image": "DDI_file", "dx": "disease"}, {"": "0", "DDI_ID": "1", "skin_tone": "56", "malignant": "True"}),
    "HAM10000": (HAM, {"dx_type": "histo", "age": "80", "sex": "male", "localization": "scalp"}),
    "ISIC archive": (
        {"image": "isic_id", "lesion": "lesion_id", "dx": "diagnosis_3"},
        {"diagnosis_1": "Benign", "diagnosis_2": "", "diagnosis_4": "", "diagnosis_5": "", "copyright_license": "CC-0"},
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_published_header_is_recognised(images, tmp_path, name, capsys):
    columns, more = HEADERS[name]
    (tmp_path / "meta.csv").write_text(table(columns, more), encoding="utf-8")
    lines = packed(images, tmp_path / "meta.csv", tmp_path / "shards", max_rejected=0.0)
    assert f"meta.csv: {name}, {NUMBER} rows" in capsys.readouterr().out
    assert len(lines) == NUMBER and all(line["dx"] in DIAGNOSES for line in lines)
    assert all(bool(line["lesion_id"]) == ("lesion" in columns) for line in lines)
    assert all(bool(line["patient_id"]) == ("patient" in columns) for line in lines)
    assert not any(line["sex"] in ("FEMALE", "MALE") for line in lines)


def test_no_patient_and_no_lesion_is_in_two_splits(images, tmp_path):
    (tmp_path / "meta.csv").write_text(table(HAM | {"patient": "patient_id"}))
    for group_by, divided in (("patient", False), ("lesion", True)):
        lines = packed(images, tmp_path / "meta.csv", tmp_path / group_by, group_by=group_by)
        assert complete(lines)
        splits: dict[str, set] = {}
        for line in lines:
            splits.setdefault(line["patient_id"], set()).add(line["split"])
        assert any(len(found) > 1 for found in splits.values()) == divided


def test_lesions_patients_and_groups_are_counted(images, tmp_path, capsys):
    (tmp_path / "meta.csv").write_text(table(HAM | {"patient": "patient_id"}))
    packed(images, tmp_path / "meta.csv", tmp_path / "s")
    said = capsys.readouterr().out
    found = manifest.read(tmp_path / "s")
    for kind, number in (("lesions", NUMBER // 2), ("patients", NUMBER // 4), ("groups", NUMBER // 4)):
        assert sum(found[kind].values()) == number
        row = next(line.split() for line in said.splitlines() if line.startswith(kind))
        assert [int(cell) for cell in row[1:]] == [found[kind][name] for name in ("train", "val", "test")]
    assert "wanted / got: train 50.0%" in said
    (images_row,) = Packed([tmp_path / "s"]).sets
    assert images_row == {"sources": ["HAM10000"], "images": NUMBER, "lesions": 24, "patients": 12, "groups": 12}


def test_milk10k_joins_diagnoses_by_lesion(images, tmp_path):
    names = {"lesion": "lesion_id", "image": "isic_id"}
    more = {"image_type": "dermoscopic", "skin_tone_class": "3", "age_approx": "40", "sex": "male", "site": "trunk"}
    (tmp_path / "MILK10k_Training_Metadata.csv").write_text(table(names, more))
    classes = [name.upper() for name in layouts._MILK10K.split()]
    lines = [["lesion_id", *classes]]
    for i in range(0, NUMBER, 2):
        lines.append([row(i)["lesion"], *(str(float(name.lower() == row(i)["dx"])) for name in classes)])
    (tmp_path / "MILK10k_Training_GroundTruth.csv").write_text("\n".join(",".join(line) for line in lines))
    assert complete(packed(images, tmp_path / "MILK10k_Training_Metadata.csv", tmp_path / "shards"))


def test_companions_lie_beside_and_above(images, tmp_path):
    """ISIC 2018 as its zips unpack: the groupings are one folder up."""
    folder = tmp_path / "ISIC2018_Task3_Training_GroundTruth"
    folder.mkdir()
    one_hot = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"
    for i in range(NUMBER):
        dx = row(i)["dx"]
        one_hot += (
            ",".join([row(i)["image"], *(str(float(d == dx)) for d in ("mel", "nv", "bcc", "akiec", "bkl", "df", "vasc"))])
            + "\n"
        )
    (folder / "truth.csv").write_text(one_hot)
    groupings = table({"image": "image", "lesion": "lesion_id"}, {"diagnosis_confirm_type": "x"})
    (tmp_path / "groupings.csv").write_text(groupings)
    assert complete(packed(images, folder / "truth.csv", tmp_path / "shards"))
    (tmp_path / "groupings.csv").rename(folder / "groupings.csv")
    assert complete(packed(images, folder / "truth.csv", tmp_path / "shards2"))


def test_named_columns_add_to_the_usual_ones(images, tmp_path):
    """A table of no known layout: the user names the columns that have unusual names; lesion_id is read all the same."""
    (tmp_path / "meta.csv").write_text(table({"image": "photo", "lesion": "lesion_id", "dx": "finding"}))
    assert complete(packed(images, tmp_path / "meta.csv", tmp_path / "shards", columns={"image": "photo", "dx": "finding"}))
    with pytest.raises(UserError, match="has no column 'nowhere'; it has: photo, lesion_id, finding"):
        packed(images, tmp_path / "meta.csv", tmp_path / "s2", columns={"image": "photo", "dx": "nowhere"})


def test_an_unread_group_stops_unless_allowed(images, tmp_path, capsys):
    (tmp_path / "meta.csv").write_text(table({"image": "image_id", "lesion": "Mole_No", "dx": "dx"}))
    with pytest.raises(
        UserError, match=r"mole_no of meta\.csv looks like one: set data\.columns\.lesion=mole_no, or data\.ungrouped"
    ):
        packed(images, tmp_path / "meta.csv", tmp_path / "shards")
    assert "WARNING: mole_no of meta.csv may hold a lesion's id and is not read" in capsys.readouterr().out
    assert complete(packed(images, tmp_path / "meta.csv", tmp_path / "s2", columns={"lesion": "mole_no"}))
    assert len(packed(images, tmp_path / "meta.csv", tmp_path / "s3", ungrouped=True)) == NUMBER


def test_an_unread_patient_beside_lesions_is_warned_of(images, tmp_path, capsys):
    (tmp_path / "meta.csv").write_text(table(HAM | {"patient": "Patient Number"}))
    assert complete(packed(images, tmp_path / "meta.csv", tmp_path / "shards"))
    assert "WARNING: patient_number of meta.csv may hold a patient's id" in capsys.readouterr().out


def test_images_without_a_class_are_counted_and_what_is_unknown_is_not_shown(images, tmp_path, capsys):
    rows = table({"image": "image_id", "dx": "dx"}).splitlines()
    rows[1:6] = [row.rpartition(",")[0] + "," for row in rows[1:6]]
    (tmp_path / "meta.csv").write_text("\n".join(rows))
    packed(images, tmp_path / "meta.csv", tmp_path / "shards")
    said = capsys.readouterr().out
    number = manifest.read(tmp_path / "shards")["counts"]["train"][""]
    assert 0 < number <= 5
    assert f"\n{number} training images have no class. Tokenizer and priors" in said and "\n(unlabelled)" in said
    assert "\ngroups" in said and "\nlesions" not in said and "\npatients" not in said
    (tmp_path / "meta.csv").write_text(table({"image": "image_id", "dx": "dx"}))
    packed(images, tmp_path / "meta.csv", tmp_path / "labelled")
    assert "have no class" not in capsys.readouterr().out


def test_labels_that_are_all_lost_stop(images, tmp_path):
    (tmp_path / "meta.csv").write_text(table({"image": "image_id", "lesion": "lesion_id", "dx": "histology result"}))
    with pytest.raises(
        UserError, match=r"None of the 48 images has a label.*data\.columns\.dx=histology_result, or set data\.unlab"
    ):
        packed(images, tmp_path / "meta.csv", tmp_path / "shards")
    lines = packed(images, tmp_path / "meta.csv", tmp_path / "s2", unlabelled=True)
    assert len(lines) == NUMBER and not any(line["dx"] for line in lines)


def whole_patients(lines: list[dict]) -> bool:
    """Whether no patient lies in two splits."""
    return len({(line["patient_id"], line["split"]) for line in lines}) == len({line["patient_id"] for line in lines})


def test_pad_ufes_20_with_columns_named_by_the_user(images, tmp_path):
    columns, more = HEADERS["PAD-UFES-20"]
    (tmp_path / "meta.csv").write_text(table(columns, more))
    lines = packed(
        images, tmp_path / "meta.csv", tmp_path / "s", columns={"image": "img_id", "dx": "diagnostic"}, max_rejected=0.0
    )
    assert complete(lines) and whole_patients(lines)


def test_slice3d_where_few_tiles_have_a_lesion(images, tmp_path):
    """SLICE-3D fills lesion_id for some tiles only. The others are grouped by their patient, and labels are of level 3."""
    columns, more = HEADERS["SLICE-3D 2024"]
    text = table(columns, more)
    for i in range(0, NUMBER, 2):
        text = text.replace(f"LESION_{i // 2:03d}", "", 1)
    (tmp_path / "train-metadata.csv").write_text(text)
    lines = packed(images, tmp_path / "train-metadata.csv", tmp_path / "s", max_rejected=0.0)
    assert len(lines) == NUMBER and whole_patients(lines) and {line["dx"] for line in lines} == set(DIAGNOSES)
    assert sum(bool(line["lesion_id"]) for line in lines) == NUMBER // 2


def test_ham10000_of_kaggle_where_each_folder_comes_twice(images, tmp_path, capsys):
    for part in (1, 2):
        folders = [tmp_path / "kaggle" / f"{name}_images_part_{part}" for name in ("HAM10000", "ham10000")]
        for folder in folders:
            folder.mkdir(parents=True)
            for i in range(NUMBER // 2 * (part - 1), NUMBER // 2 * part):
                (folder / f"IMG_{i:04d}.png").write_bytes((images / f"IMG_{i:04d}.png").read_bytes())
    (tmp_path / "kaggle" / "HAM10000_metadata.csv").write_text(table(HAM))
    (tmp_path / "kaggle" / "hmnist_8_8_L.csv").write_text("pixel0000,pixel0001,label\n1,2,3\n")
    metadata = tmp_path / "kaggle" / "HAM10000_metadata.csv"
    assert complete(packed(tmp_path / "kaggle", metadata, tmp_path / "s", max_rejected=0.0))
    said = capsys.readouterr().out
    assert f"left out, a copy of another file, byte for byte: {NUMBER} files" in said
    assert len((tmp_path / "s" / "left_out.jsonl").read_text().splitlines()) == NUMBER


def test_ph2_as_it_unpacks(tmp_path):
    """Each photograph has a mask and a mask of each region beside it; the table lists the photographs."""
    lines = ["Image Name,Clinical Diagnosis"]
    for i in range(NUMBER):
        name, folder = f"IMD{i:03d}", tmp_path / "PH2 Dataset images" / f"IMD{i:03d}"
        draw(folder / f"{name}_Dermoscopic_Image" / f"{name}.bmp", i)
        draw(folder / f"{name}_lesion" / f"{name}_lesion.bmp", 1000 + i)
        draw(folder / f"{name}_roi" / f"{name}_R1_Label1.bmp", 2000 + i)
        lines.append(f"{name},{DIAGNOSES[i % 3]}")
    (tmp_path / "PH2.csv").write_text("\n".join(lines))
    settings = {"columns": {"dx": "Clinical Diagnosis"}, "max_rejected": 0.0}
    found = packed(tmp_path / "PH2 Dataset images", tmp_path / "PH2.csv", tmp_path / "s", **settings)
    assert {line["image_id"]: line["dx"] for line in found} == {f"IMD{i:03d}": DIAGNOSES[i % 3] for i in range(NUMBER)}


# --- folders ---


def test_thumbnails_trash_and_hidden_folders_are_skipped_and_counted(images):
    for name in ("@eaDir/IMG_0000.png", "__MACOSX", ".thumbnails", "#recycle/old", "sub/.ipynb_checkpoints"):
        draw(images / name / "SYNO_THUMB.png", 7)
        draw(images / name / "IMG_0001.png", 8)
    found = find_images(images)
    assert len(found.paths) == NUMBER
    assert any("folders skipped: " in note and "@eaDir (1)" in note and "__MACOSX (1)" in note for note in found.notes)


def test_identical_copies_count_once_and_different_ones_stop(images, tmp_path):
    for i in range(3):
        (images / "again").mkdir(exist_ok=True)
        (images / "again" / f"IMG_{i:04d}.png").write_bytes((images / f"IMG_{i:04d}.png").read_bytes())
    found = find_images(images)
    assert len(found.paths) == NUMBER and "left out, a copy of another file, byte for byte: 3 files" in found.notes
    assert len(found.left_out) == 3
    draw(images / "again" / "IMG_0000.png", 99)
    with pytest.raises(UserError, match="Two different images share the id 'IMG_0000'"):
        find_images(images)


def test_links_to_folders_are_followed_once(images, tmp_path):
    (tmp_path / "photos").mkdir()
    os.symlink(images, tmp_path / "photos" / "a")
    os.symlink(images, tmp_path / "photos" / "b")
    os.symlink(tmp_path / "photos", images / "loop")
    assert len(find_images(tmp_path / "photos").paths) == NUMBER
    assert len(find_images(images).paths) == NUMBER


def test_masks_beside_photographs_are_left_out(tmp_path):
    """PH2: IMD003.bmp with IMD003_lesion.bmp and IMD003_R1_Label1.bmp. A photograph that is called x_lesion stays."""
    for name in ("IMD003/photo/IMD003", "IMD003/mask/IMD003_lesion", "IMD003/roi/IMD003_R1_Label1", "other_lesion"):
        draw(tmp_path / "ph2" / f"{name}.bmp", len(name))
    found = find_images(tmp_path / "ph2")
    assert set(found.paths) == {"IMD003", "other_lesion"} and "left out, a mask: 2 files" in found.notes


def test_files_of_other_kinds_and_odd_names_are_counted(images):
    for name in ("a.heic", "b.HEIC", "notes.txt", "README", ".hidden.png", "._IMG_0001.png"):
        (images / name).write_bytes(b"x")
    (images / os.fsdecode(b"odd\xff.png")).write_bytes(b"x")
    found = find_images(images)
    assert len(found.paths) == NUMBER
    ignored = next(note for note in found.notes if note.startswith("files of other kinds ignored: "))
    assert all(kind in ignored for kind in (".heic (2)", ".txt (1)", "no suffix (1)", "hidden (2)"))
    (entry,) = found.left_out
    assert entry["image"].endswith("odd\\udcff.png") and "not valid UTF-8" in entry["reason"]


def test_an_unreadable_folder_is_named(images, monkeypatch):
    real = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    (images / "locked").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"locked cannot be read: Permission denied"):
        find_images(images)


def test_column_keys():
    assert [column_key(n) for n in ("Lesion ID", "lesion-id ", '"LESION_ID"', "lesion  id")] == ["lesion_id"] * 4


def test_every_layout_is_recognised_by_its_own_columns():
    for layout in layouts.LAYOUTS:
        header = [*layout.required, *(c for c in layout.columns.values() if c)]
        assert layouts.recognise(header).name == layout.name, layout.name
        assert all(c == column_key(c) for c in (*header, *layout.one_hot, *layout.coarse))
    assert sources.image_id("a\\b\\ISIC_1.JPG") == "ISIC_1"
