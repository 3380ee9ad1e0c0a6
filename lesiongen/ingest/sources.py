"""Reads the CSV metadata of public skin-lesion data sets, recognised by their columns, into one table of our fields.

Known layouts: HAM10000 (Tschandl 2018), the ISIC challenges of 2016 to 2020, the export of the ISIC archive, and any table
with an id column of a common name. A challenge spreads the facts about an image over several files. Companion files in the
folder of the named table are therefore read too: they often hold the lesion's id, and without that id photographs of one
lesion would fall into different splits. `catalog.read_catalog` matches the resulting rows with image files.
"""

import csv
import io
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpc.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
FIELDS = ("image", "lesion", "patient", "dx", "age", "sex", "site", "licence", "attribution")
UNKNOWN = {"", "unknown", "unk", "nan", "na", "n/a", "none"}  # cells that state nothing, in lower case
VIDIR = "ViDIR Group, Department of Dermatology, Medical University of Vienna"
ISIC = "International Skin Imaging Collaboration"
ID_COLUMNS = ("image_id", "isic_id", "image", "image_name", "filename", "file_name", "file", "id")


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
        companion: Whether the file only adds facts to images whose diagnosis is in another file.
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


_DX_HAM10000 = {c: c.lower() for c in ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")}
_DX_2019 = {c: c.lower() for c in ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")}
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
LAYOUTS = (
    Layout("ISIC archive", ("isic_id",), _ARCHIVE_COLUMNS),
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
    Layout("ISIC 2019", ("image", "MEL", "SCC"), {"image": "image"}, _DX_2019, licence="CC-BY-NC", attribution=ISIC),
    Layout(
        "ISIC 2019 metadata",
        ("image", "age_approx", "lesion_id"),
        {"image": "image", "lesion": "lesion_id", "age": "age_approx", "sex": "sex", "site": "anatom_site_general"},
        companion=True,
    ),
    Layout("ISIC 2018", ("image", "MEL", "AKIEC"), {"image": "image"}, _DX_HAM10000, licence="CC-BY-NC", attribution=VIDIR),
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
_ISIC_2016 = Layout(
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
    "dx": ("dx", "diagnosis", "label", "class"),
    "age": ("age", "age_approx"),
    "sex": ("sex", "gender"),
    "site": ("site", "localization", "anatom_site_general"),
    "licence": ("copyright_license", "licence", "license"),
    "attribution": ("attribution",),
}


@dataclass
class Table:
    """The rows of all metadata files that were read, as our fields.

    Attributes:
        rows: For each image, in the order listed, its fields and "source".
        unusable: (image or line, reason) of each row that cannot be used.
        pairs: Images that a companion file says show the same lesion.
        recognised: A line to print for each file.
        source: Name of the last layout that rows were read with.
    """

    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    unusable: list[tuple[str, str]] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    recognised: list[str] = field(default_factory=list)
    source: str = ""


def read_table(metadata: Path, columns: dict[str, str]) -> Table:
    """Reads a CSV file and its companions in the same folder, or every CSV file of a folder.

    Args:
        metadata: The file or the folder.
        columns: Our field → column of the file, for a table of no known layout; else empty.

    Raises:
        UserError: A file cannot be read, has no known columns, or no images are listed.
    """
    if metadata.is_dir():
        paths = sorted(p for p in metadata.iterdir() if p.suffix.lower() in (".csv", ".tab") and not p.name.startswith("."))
        if not paths:
            raise UserError(f"The metadata folder {metadata} holds no CSV file.")
    else:
        paths = [metadata]
    # Tables that list images come first. Companions add to their rows, so they wait until all rows are read.
    table, companions = Table(), []
    for path in paths:
        rows, header = read_csv(path)
        layout = _layout_of_columns(path, header, columns) if columns else recognise(header)
        if layout is None and len(paths) > 1:
            table.recognised.append(f"{path.name}: no known columns, ignored")
        elif layout is None:
            raise UserError(
                f"{path} has no known id column ({', '.join(ID_COLUMNS)}); it has: {', '.join(header) or 'nothing'}. Map its "
                f"columns with data.columns, for example data.columns.image={header[0] if header else 'id'}."
            )
        elif layout.companion:
            companions.append((path, layout, rows))
        else:
            _read_rows(table, path, layout, rows)
    if not table.rows and not table.unusable:
        raise UserError(f"{metadata} lists no images. Set data.metadata to the table of images and their diagnoses.")
    if not metadata.is_dir() and not columns and table.source != "table":
        companions += _find_companions(metadata)
    for path, layout, rows in companions:
        _join_companion(table, path, layout, rows)
    return table


def recognise(header: list[str]) -> Layout | None:
    """Returns the first known layout whose required columns are in `header`.

    If no known layout fits, returns a layout named "table" of the columns with common names, or None if there is no column
    of image ids.
    """
    for layout in LAYOUTS:
        # A table with diagnoses lists images, even if it has all columns of a companion.
        if all(c in header for c in layout.required) and not (layout.companion and {"dx", "diagnosis"} & set(header)):
            if layout.columns.get("dx") not in (None, *header):
                # Newer exports of the ISIC archive give the diagnosis at up to three levels, 1 the coarsest.
                finest, *coarse = [d for d in ("diagnosis_3", "diagnosis_2", "diagnosis_1") if d in header] or [""]
                return replace(layout, columns=layout.columns | {"dx": finest}, coarse=tuple(coarse)) if finest else layout
            return layout
    if _lacks_header(header):
        return _ISIC_2016
    common = {ours: next((c for c in names if c in header), "") for ours, names in _COMMON_COLUMNS.items()}
    id_column = next((c for c in ID_COLUMNS if c in header), None)
    return Layout("table", (), {"image": id_column} | {k: v for k, v in common.items() if v}) if id_column else None


def _layout_of_columns(path: Path, header: list[str], columns: dict[str, str]) -> Layout:
    if any(k not in FIELDS for k in columns) or "image" not in columns:
        raise UserError(f"data.columns maps our fields ({', '.join(FIELDS)}) to your columns and must map 'image'.")
    if missing := [v for v in columns.values() if v not in header]:
        raise UserError(f"{path} has no column '{missing[0]}'; it has: {', '.join(header)}. Correct data.columns.")
    return Layout("columns", (), columns)


def _lacks_header(first_row: list[str]) -> bool:
    """Returns whether the first row of a file is already an image and its diagnosis, as in the files of ISIC 2016."""
    return len(first_row) == 2 and re.match(r"ISIC_\d{7}$", first_row[0]) is not None


def read_csv(path: Path) -> tuple[list[dict], list[str]]:
    """Reads a file separated by commas or tabs.

    Returns:
        The rows, each with its line number under "line" and its cells under the names of their columns; and the cells of
        the first row.

    Raises:
        UserError: The file cannot be read, or is not CSV in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        separator = "\t" if "\t" in first and "," not in first else ","
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    except OSError as error:
        raise UserError(f"The metadata {path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"The metadata {path} is not a CSV file in UTF-8: {error}.") from None
    header = [name.strip() for name in lines[0]] if lines else []
    names, body, start = (["image", "dx"], lines, 1) if _lacks_header(header) else (header, lines[1:], 2)
    rows = [{"line": n, **dict(zip(names, row, strict=False))} for n, row in enumerate(body, start) if row]
    return rows, header


def _read_rows(table: Table, path: Path, layout: Layout, rows: list[dict]) -> None:
    """Adds the rows of a file that lists images to the table."""
    for row in rows:
        fields = {f: (row.get(layout.columns.get(f)) or "").strip() for f in FIELDS}
        image = fields["image"] = image_id(fields["image"])
        diagnoses = [dx for column, dx in layout.one_hot.items() if _number(row.get(column)) > 0.5]
        if len(diagnoses) > 1:
            table.unusable.append((image, f"several diagnoses on line {row['line']}"))
            continue
        if layout.one_hot:
            fields["dx"] = diagnoses[0] if diagnoses else layout.default_dx
        fields["dx"] = layout.dx_names.get(fields["dx"], fields["dx"])
        for column in layout.coarse:
            if fields["dx"].lower() in UNKNOWN:
                fields["dx"] = (row.get(column) or "").strip()
        for name in ("dx", "lesion", "patient", "sex", "site"):
            fields[name] = "" if fields[name].lower() in UNKNOWN else fields[name]
        fields["licence"] = fields["licence"] or layout.licence
        fields["attribution"] = fields["attribution"] or layout.attribution
        if not image:
            table.unusable.append((f"line {row['line']}", "no image id"))
        elif image in table.rows:
            table.unusable.append((image, f"listed again on line {row['line']}"))
        else:
            table.rows[image] = fields | {"source": layout.name}
    table.source = layout.name
    table.recognised.append(f"{path.name}: {layout.name}, {len(rows):,} rows")


def _find_companions(metadata: Path) -> list[tuple[Path, Layout, list[dict]]]:
    """Returns path, layout and rows of each companion file in the folder of `metadata`."""
    companions = []
    for path in sorted(metadata.parent.glob("*.csv")):
        if path != metadata:
            try:
                rows, header = read_csv(path)
            except UserError:
                continue  # the user has not named this file, so it may be anything
            layout = recognise(header)
            if layout and layout.companion:
                companions.append((path, layout, rows))
    return companions


def _join_companion(table: Table, path: Path, layout: Layout, rows: list[dict]) -> None:
    """Fills the empty fields of the table's rows from a companion file, or adds the pairs that the file lists."""
    if not layout.columns:
        pairs = [(image_id(row["image_name_1"]), image_id(row["image_name_2"])) for row in rows]
        table.pairs += [(a, b) for a, b in pairs if a in table.rows and b in table.rows]
        joined = len(table.pairs)
    else:
        joined = 0
        for row in rows:
            fields = table.rows.get(image_id(row.get(layout.columns["image"]) or ""))
            if fields:
                joined += 1
                for name, column in layout.columns.items():
                    cell = (row.get(column) or "").strip()
                    if not fields[name] and cell.lower() not in UNKNOWN:
                        fields[name] = cell
    if joined:
        table.recognised.append(f"{path.name}: {layout.name}, {joined:,} rows joined")


def image_id(name: str) -> str:
    """Returns an image's id: its file name without folders and image suffix."""
    name = Path(name.strip()).name
    return Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name


def _number(cell: str | None) -> float:
    """Returns a cell as a number, 0 where it holds none."""
    try:
        return float(cell or 0)
    except ValueError:
        return 0.0
