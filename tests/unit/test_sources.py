"""Public data sets are recognised by their file names and columns, and tables of the same data set are joined."""

import pytest
from PIL import Image

from hpc.errors import UserError
from lesiongen.ingest import catalog, licences

ISIC_A, ISIC_B, ISIC_C = "ISIC_0000001", "ISIC_0000002", "ISIC_0000003"
LAYOUTS = {
    "HAM10000": (
        {"HAM10000_metadata": f"lesion_id,image_id,dx,age,sex,localization\nH1,{ISIC_A},nv,45,male,back\nH1,{ISIC_B},mel,,,\n"},
        [("nv", "H1", "CC-BY-NC"), ("mel", "H1", "CC-BY-NC")],
    ),
    "ISIC 2016": (
        {"ISBI2016_ISIC_Part3_Training_GroundTruth.csv": f"{ISIC_A},benign\n{ISIC_B},malignant\n"},
        [("benign", "", "CC-0"), ("malignant", "", "CC-0")],
    ),
    "ISIC 2016 test": (
        {"ISBI2016_ISIC_Part3_Test_GroundTruth.csv": f"{ISIC_A},0.0\n{ISIC_B},1.0\n"},
        [("benign", "", "CC-0"), ("malignant", "", "CC-0")],
    ),
    "ISIC 2017": (
        {
            "ISIC-2017_Training_Part3_GroundTruth.csv": "image_id,melanoma,seborrheic_keratosis\n"
            f"{ISIC_A},0.0,0.0\n{ISIC_B},1.0,0.0\n",
            "ISIC-2017_Training_Data_metadata.csv": "image_id,age_approximate,sex\n"
            f"{ISIC_A},55,female\n{ISIC_B},unknown,male\n",
        },
        [("nevus", "", "CC-0"), ("melanoma", "", "CC-0")],
    ),
    "ISIC 2018": (
        {
            "ISIC2018_Task3_Training_GroundTruth.csv": "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"
            f"{ISIC_A},0.0,1.0,0.0,0.0,0.0,0.0,0.0\n{ISIC_B},1.0,0.0,0.0,0.0,0.0,0.0,0.0\n",
            "ISIC2018_Task3_Training_LesionGroupings.csv": "image,lesion_id,diagnosis_confirm_type\n"
            f"{ISIC_A},HAM_1,histopathology\n{ISIC_B},HAM_1,consensus\n",
        },
        [("nv", "HAM_1", "CC-BY-NC"), ("mel", "HAM_1", "CC-BY-NC")],
    ),
    "ISIC 2019": (
        {
            "ISIC_2019_Training_GroundTruth.csv": "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\n"
            f"{ISIC_A},0.0,0.0,0.0,0.0,0.0,0.0,0.0,1.0,0.0\n{ISIC_B},0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,1.0\n",
            "ISIC_2019_Training_Metadata.csv": "image,age_approx,anatom_site_general,lesion_id,sex\n"
            f"{ISIC_A},55.0,anterior torso,BCN_1,female\n{ISIC_B},30.0,,,female\n",
        },
        [("scc", "BCN_1", "CC-BY-NC"), ("", "", "CC-BY-NC")],
    ),
    "ISIC 2020": (
        {
            "ISIC_2020_Training_GroundTruth.csv": "image_name,patient_id,sex,age_approx,anatom_site_general_challenge,"
            f"diagnosis,benign_malignant,target\n{ISIC_A},IP_1,male,45.0,head/neck,unknown,benign,0\n"
            f"{ISIC_B},IP_2,male,,torso,melanoma,malignant,1\n",
            "ISIC_2020_Training_Duplicates.csv": f"image_name_1,image_name_2\n{ISIC_A},{ISIC_B}\n",
        },
        [("benign", "", "CC-BY-NC"), ("melanoma", "", "CC-BY-NC")],
    ),
    "ISIC archive": (
        {"metadata.csv": f"isic_id,attribution,copyright_license,diagnosis\n{ISIC_A},A,CC-0,nevus\n{ISIC_B},A,CC-BY,\n"},
        [("nevus", "", "CC-0"), ("", "", "CC-BY")],
    ),
    "ISIC archive, in levels": (
        {
            "metadata.csv": "isic_id,attribution,copyright_license,diagnosis_1,diagnosis_2,diagnosis_3\n"
            f'{ISIC_A},A,CC-0,Malignant,Melanocytic,"Melanoma, NOS"\n{ISIC_B},A,CC-BY,Benign,,\n'
        },
        [("Melanoma, NOS", "", "CC-0"), ("Benign", "", "CC-BY")],
    ),
    "table": (
        {"mine.csv": f"file,label,patient\n{ISIC_A}.jpg,a,p1\n{ISIC_B}.jpg,b,p1\n"},
        [("a", "", ""), ("b", "", "")],
    ),
}


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with images/, which holds three photographs and two masks. Tests write tables beside images/."""
    for name in (ISIC_A, ISIC_B, ISIC_C, f"{ISIC_A}_segmentation", f"{ISIC_B}_superpixels"):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised(name, folder):
    files, expected = LAYOUTS[name]
    for file, text in files.items():
        (folder / file).write_text(text)
    first = folder / next(iter(files))
    found = catalog.read_catalog(folder / "images", first)
    assert [(r.dx, r.lesion, r.licence) for r in found.records] == expected
    assert name.removesuffix(" test").removesuffix(", in levels") in found.recognised[0]
    assert len(found.recognised) == len(files)
    # No table lists the third photograph. Masks do not count as photographs.
    assert found.rejected == [{"image": ISIC_C, "reason": "no row in the metadata"}]


def test_what_the_companions_say(folder):
    for file, text in LAYOUTS["ISIC 2017"][0].items():
        (folder / file).write_text(text)
    a, b = catalog.read_catalog(folder / "images", folder / "ISIC-2017_Training_Part3_GroundTruth.csv").records
    assert (a.age, a.sex, b.age, b.sex) == (55.0, "female", None, "male")
    for file, text in LAYOUTS["ISIC 2020"][0].items():
        (folder / file).write_text(text)
    assert catalog.read_catalog(folder / "images", folder / "ISIC_2020_Training_GroundTruth.csv").pairs == [(ISIC_A, ISIC_B)]


def test_a_folder_of_tables_is_read_whole(folder):
    for file, text in LAYOUTS["ISIC 2019"][0].items():
        (folder / "tables").mkdir(exist_ok=True)
        (folder / "tables" / file).write_text(text)
    (folder / "tables" / "other.csv").write_text("a,b\n1,2\n")
    found = catalog.read_catalog(folder / "images", folder / "tables")
    assert found.records[0].lesion == "BCN_1"
    assert any("ignored" in line for line in found.recognised)


def test_two_diagnoses_are_none(folder):
    row = f"{ISIC_A},1.0,1.0,0.0,0.0,0.0,0.0,0.0\n"
    (folder / "t.csv").write_text("image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n" + row)
    found = catalog.read_catalog(folder / "images", folder / "t.csv")
    assert {"image": ISIC_A, "reason": "several diagnoses on line 2"} in found.rejected


def test_folders_are_splits_and_classes(tmp_path):
    for split in ("train", "valid", "test"):
        for label in ("mel", "nv"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / split / label / f"{split}_{label}.png")
    found = catalog.read_catalog(tmp_path, None)
    assert {(r.split, r.dx) for r in found.records} == {(s, c) for s in ("train", "val", "test") for c in ("mel", "nv")}


def test_licences_filter_and_renaming(folder):
    (folder / "m.csv").write_text(LAYOUTS["ISIC archive"][0]["metadata.csv"])
    found = catalog.read_catalog(folder / "images", folder / "m.csv", allowed=["cc0"], rename={"nevus": "nv"})
    assert [(r.image, r.dx) for r in found.records] == [(ISIC_A, "nv")]
    assert [entry["image"] for entry in found.left_out if "licence" in entry["reason"]] == [ISIC_B]
    with pytest.raises(UserError, match="licences of the images: CC-0, CC-BY"):
        catalog.read_catalog(folder / "images", folder / "m.csv", allowed=["CC-BY-SA"])


def test_licences_compare():
    order = ["CC-0", "CC-BY 4.0", "cc by-sa", "CC-BY-NC", "CC BY-NC-SA 3.0", "CC-BY-NC-ND", "mine alone", ""]
    assert sorted(order, key=licences.strictness) == order
    assert licences.strictest(["CC-0", "CC-BY-NC", "CC-BY"]) == "CC-BY-NC"
    assert "not be passed on" in licences.strictest(["CC-0", ""])
    assert {licences.canonical_name(n) for n in ("CC0", "cc-0", "Public Domain", "CC0 1.0")} == {"CC-0"}


def test_what_a_tokenizer_and_codes_of_other_images_come_to():
    codes = {"licences": {"CC-0": 5}, "sources": {"ISIC": 5}}
    tokenizer = {"licences": {"CC-BY-NC": 7, "CC-0": 2}, "sources": {"HAM10000": 9}}
    both = licences.merge_counts(tokenizer, codes)
    assert both == {"licences": {"CC-BY-NC": 7, "CC-0": 5}, "sources": {"HAM10000": 9, "ISIC": 5}}
    assert codes["licences"] == {"CC-0": 5}


def test_splits_that_come_in_a_table(folder):
    (folder / "m.csv").write_text(LAYOUTS["ISIC archive"][0]["metadata.csv"])
    (folder / "s.csv").write_text(f"image,split\n{ISIC_A}.jpg,train\n{ISIC_B}.jpg,validation\n")
    found = catalog.read_catalog(folder / "images", folder / "m.csv", splits=folder / "s.csv")
    assert [r.split for r in found.records] == ["train", "val"]
    (folder / "s.csv").write_text(f"image,split\n{ISIC_A}.jpg,holdout\n")
    with pytest.raises(UserError, match="line 2: the split is 'holdout'"):
        catalog.read_catalog(folder / "images", folder / "m.csv", splits=folder / "s.csv")
