"""The metadata files of public skin-lesion data sets, recognised by their columns. Names of columns are in column_key() form.

sources.py reads a file by its layout. docs/data.md has a table of the data sets.
"""

import re
from dataclasses import dataclass, field, replace

FIELDS = ("image", "lesion", "patient", "dx", "age", "sex", "site", "licence", "attribution")
VIDIR = "ViDIR Group, Department of Dermatology, Medical University of Vienna"
ISIC = "International Skin Imaging Collaboration"
UNNAMED = ("", "table", "columns")  # names of layouts that are no data set's
ID_COLUMNS = ("image_id", "isic_id", "image", "image_name", "filename", "file_name", "file", "img_id", "id")


@dataclass(frozen=True)
class Layout:
    """How the files of one data set are recognised and read.

    Attributes:
        name: Name of the data set, recorded as each image's source.
        required: Columns that a file of this layout has.
        columns: Our field → column of the file.
        one_hot: Column → diagnosis, for files with a column of 0 and 1 for each diagnosis.
        default_dx: Diagnosis of a row in which no column of `one_hot` is 1.
        coarse: Columns to read a coarser diagnosis from, such as benign or malignant, where the exact one is unknown.
        dx_names: Diagnosis as written in the file → name to use.
        companion: Whether the file only adds facts to images whose diagnosis or id is in another file.
        licence: Licence of rows that state none.
        attribution: Attribution of rows that state none.
    """

    name: str
    required: tuple[str, ...]
    columns: dict[str, str]
    one_hot: dict[str, str] = field(default_factory=dict)
    default_dx: str = ""
    coarse: tuple[str, ...] = ()
    dx_names: dict[str, str] = field(default_factory=dict)
    companion: bool = False
    licence: str = ""
    attribution: str = ""


def _one_hot(names: str) -> dict[str, str]:
    return {name: name for name in names.split()}


_ARCHIVE_COLUMNS = {
    "image": "isic_id",
    "lesion": "lesion_id",
    "patient": "patient_id",
    "dx": "diagnosis",
    "age": "age_approx",
    "sex": "sex",
    "site": "anatom_site_general",
    "licence": "copyright_license",
    "attribution": "attribution",
}
_MILK10K = "akiec bcc ben_oth bkl df inf mal_oth mel nv sccka vasc"
LAYOUTS = (
    Layout(
        "SLICE-3D 2024",
        ("isic_id", "target", "iddx_1"),
        _ARCHIVE_COLUMNS | {"dx": "iddx_3"},
        coarse=("iddx_2", "iddx_1"),
        licence="CC-BY-NC",
        attribution=ISIC,
    ),
    Layout(
        "MILK10k",
        ("lesion_id", "isic_id", "image_type", "skin_tone_class"),
        _ARCHIVE_COLUMNS | {"dx": "", "site": "site"},
        licence="CC-BY-NC",
    ),
    Layout(
        "MILK10k ground truth", ("lesion_id", *_MILK10K.split()), {"lesion": "lesion_id"}, _one_hot(_MILK10K), companion=True
    ),
    Layout("ISIC archive", ("isic_id",), _ARCHIVE_COLUMNS),
    Layout(
        "BCN20000",
        ("bcn_filename", "diagnosis"),
        _ARCHIVE_COLUMNS | {"image": "bcn_filename"},
        licence="CC-BY-NC",
        attribution="Department of Dermatology, Hospital Clínic de Barcelona",
    ),
    Layout(
        "PAD-UFES-20",
        ("img_id", "diagnostic", "lesion_id", "patient_id"),
        _ARCHIVE_COLUMNS | {"image": "img_id", "dx": "diagnostic", "age": "age", "sex": "gender", "site": "region"},
        licence="CC-BY",
        attribution="Federal University of Espírito Santo (PAD-UFES-20)",
    ),
    Layout(
        "Derm7pt",
        ("derm", "clinic", "diagnosis", "case_num"),
        {"image": "derm", "lesion": "case_num", "dx": "diagnosis", "sex": "sex", "site": "location"},
    ),
    Layout("Fitzpatrick17k", ("md5hash", "fitzpatrick_scale", "label"), {"image": "md5hash", "dx": "label"}),
    Layout("DDI", ("ddi_file", "disease"), {"image": "ddi_file", "dx": "disease"}, coarse=("malignant",)),
    Layout(
        "HAM10000",
        ("lesion_id", "image_id", "dx"),
        _ARCHIVE_COLUMNS | {"image": "image_id", "dx": "dx", "age": "age", "site": "localization"},
        licence="CC-BY-NC",
        attribution=VIDIR,
    ),
    Layout(
        "ISIC 2017",
        ("image_id", "melanoma", "seborrheic_keratosis"),
        {"image": "image_id"},
        {"melanoma": "melanoma", "seborrheic_keratosis": "seborrheic keratosis"},
        default_dx="nevus",
        licence="CC-0",
        attribution=ISIC,
    ),
    Layout(
        "ISIC 2017 metadata",
        ("image_id", "age_approximate"),
        {"image": "image_id", "age": "age_approximate", "sex": "sex"},
        companion=True,
    ),
    Layout(
        "ISIC 2019",
        ("image", "mel", "scc"),
        {"image": "image"},
        _one_hot("mel nv bcc ak bkl df vasc scc"),
        licence="CC-BY-NC",
        attribution=ISIC,
    ),
    Layout(
        "ISIC 2019 metadata",
        ("image", "age_approx", "lesion_id"),
        {"image": "image", "lesion": "lesion_id", "age": "age_approx", "sex": "sex", "site": "anatom_site_general"},
        companion=True,
    ),
    Layout(
        "ISIC 2018",
        ("image", "mel", "akiec"),
        {"image": "image"},
        _one_hot("mel nv bcc akiec bkl df vasc"),
        licence="CC-BY-NC",
        attribution=VIDIR,
    ),
    Layout(
        "ISIC 2018 lesion groupings",
        ("image", "lesion_id", "diagnosis_confirm_type"),
        {"image": "image", "lesion": "lesion_id"},
        companion=True,
    ),
    Layout(
        "ISIC 2020",
        ("image_name", "patient_id", "benign_malignant"),
        _ARCHIVE_COLUMNS | {"image": "image_name", "site": "anatom_site_general_challenge"},
        coarse=("benign_malignant",),
        licence="CC-BY-NC",
        attribution=ISIC,
    ),
    Layout("ISIC 2020 duplicates", ("image_name_1", "image_name_2"), {}, companion=True),
)
# ISIC 2016's files have no header: they are recognised by their first cell, and read_csv names their columns.
ISIC_2016 = Layout(
    "ISIC 2016",
    (),
    {"image": "image", "dx": "dx"},
    dx_names={"0.0": "benign", "1.0": "malignant"},
    licence="CC-0",
    attribution=ISIC,
)
# Common column names of each field, for tables of none of these layouts. The first that a table has is read.
_COMMON_COLUMNS = {
    "lesion": ("lesion_id", "lesion"),
    "patient": ("patient_id", "patient", "subject_id", "subject"),
    "dx": ("dx", "diagnosis", "diagnostic", "disease", "label", "class"),
    "age": ("age", "age_approx"),
    "sex": ("sex", "gender"),
    "site": ("site", "localization", "anatom_site_general"),
    "licence": ("copyright_license", "licence", "license"),
    "attribution": ("attribution",),
}
# What a column's name looks like that may hold a field under another name.
_LOOKS_LIKE = {
    "lesion": re.compile(r"lesion|mole|naevus_id|nevus_id|case"),
    "patient": re.compile(r"patient|subject|person|participant|\bpid\b|mrn"),
    "dx": re.compile(r"dx|diagnos|label|class|target|malignan|disease|condition|histo|patholog"),
}


def recognise(header: list[str]) -> Layout | None:
    """Returns the first known layout whose required columns are in a table.

    If no known layout fits, returns a layout named "table" of the columns with common names, or None if there is no column
    of image ids.

    Args:
        header: The table's columns, in column_key() form.
    """
    for layout in LAYOUTS:
        # A table with diagnoses lists images, even if it has all columns of a companion.
        if all(c in header for c in layout.required) and not (layout.companion and {"dx", "diagnosis"} & set(header)):
            if layout.columns.get("dx") not in (None, "", *header):
                # Newer exports of the ISIC archive give the diagnosis at up to five levels, 1 the coarsest. Levels 4 and 5
                # name single findings.
                finest, *coarse = [d for d in ("diagnosis_3", "diagnosis_2", "diagnosis_1") if d in header] or [""]
                return replace(layout, columns=layout.columns | {"dx": finest}, coarse=tuple(coarse)) if finest else layout
            return layout
    if lacks_header(header):
        return ISIC_2016
    id_column = next((c for c in ID_COLUMNS if c in header), None)
    return Layout("table", (), {"image": id_column} | common_columns(header)) if id_column else None


def common_columns(header: list[str]) -> dict[str, str]:
    """Returns our field → column for the columns with common names."""
    found = {ours: next((c for c in names if c in header), "") for ours, names in _COMMON_COLUMNS.items()}
    return {ours: column for ours, column in found.items() if column}


def lookalikes(layout: Layout, header: list[str]) -> dict[str, list[str]]:
    """Returns the columns that may hold a field that the layout does not read: lesion, patient or dx → columns."""
    missing = [name for name in ("lesion", "patient") if layout.columns.get(name, "") not in header]
    if not layout.one_hot and not {layout.columns.get("dx"), *layout.coarse} & set(header):
        missing.append("dx")
    read = {*layout.columns.values(), *layout.one_hot, *layout.coarse}
    found = {name: [c for c in header if c not in read and _LOOKS_LIKE[name].search(c)] for name in missing}
    return {name: columns for name, columns in found.items() if columns}


def lacks_header(first_row: list[str]) -> bool:
    """Returns whether the first row of a file is already an image and its diagnosis, as in the files of ISIC 2016."""
    return len(first_row) == 2 and re.match(r"isic_\d{7}$", first_row[0], re.IGNORECASE) is not None
