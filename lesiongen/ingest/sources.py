"""CodeRows of metadata from the CSV files of public skin-lesion data sets, recognised by their columns.

Known: HAM10000 (Tschandl 2018), the ISIC challenges of 2016 to 2020, the ISIC archive's export, and any table with an id
column of a usual name. A challenge spreads what is known of an image over several files: those that lie beside the one
named are read with it, since the lesion's id, without which splits leak, is often in another.
"""

import csv
import io
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpc.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
FIELDS = ("image", "lesion", "patient", "dx", "age", "sex", "site", "licence", "attribution")
UNKNOWN = {"", "unknown", "unk", "nan", "na", "n/a", "none"}
VIDIR = "ViDIR Group, Department of Dermatology, Medical University of Vienna"
ISIC = "International Skin Imaging Collaboration"
IDS = ("image_id", "isic_id", "image", "image_name", "filename", "file_name", "file", "id")


@dataclass(frozen=True)
class Layout:
    """needs: columns that tell it from others; columns: our field → theirs; one_hot: column → diagnosis."""

    name: str
    needs: tuple[str, ...]
    columns: dict[str, str]
    one_hot: dict[str, str] = field(default_factory=dict)
    default: str = ""  # diagnosis where no column of one_hot is set
    coarse: tuple[str, ...] = ()  # columns that tell at least benign from malignant where the diagnosis is unknown
    words: dict[str, str] = field(default_factory=dict)  # diagnosis as written → as meant
    companion: bool = False  # says more of images whose diagnosis stands elsewhere
    licence: str = ""
    attribution: str = ""


_HAM = {c: c.lower() for c in ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")}
_2019 = {c: c.lower() for c in ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")}
_ARCHIVE = {
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
    Layout("ISIC archive", ("isic_id",), _ARCHIVE),
    Layout(
        "HAM10000",
        ("lesion_id", "image_id", "dx"),
        _ARCHIVE | {"image": "image_id", "dx": "dx", "age": "age", "site": "localization"},
        licence="CC-BY-NC",
        attribution=VIDIR,
    ),
    Layout(
        "ISIC 2017",
        ("image_id", "melanoma", "seborrheic_keratosis"),
        {"image": "image_id"},
        {"melanoma": "melanoma", "seborrheic_keratosis": "seborrheic keratosis"},
        default="nevus",
        licence="CC-0",
        attribution=ISIC,
    ),
    Layout(
        "ISIC 2017 metadata",
        ("image_id", "age_approximate"),
        {"image": "image_id", "age": "age_approximate", "sex": "sex"},
        companion=True,
    ),
    Layout("ISIC 2019", ("image", "MEL", "SCC"), {"image": "image"}, _2019, licence="CC-BY-NC", attribution=ISIC),
    Layout(
        "ISIC 2019 metadata",
        ("image", "age_approx", "lesion_id"),
        {"image": "image", "lesion": "lesion_id", "age": "age_approx", "sex": "sex", "site": "anatom_site_general"},
        companion=True,
    ),
    Layout("ISIC 2018", ("image", "MEL", "AKIEC"), {"image": "image"}, _HAM, licence="CC-BY-NC", attribution=VIDIR),
    Layout(
        "ISIC 2018 lesion groupings",
        ("image", "lesion_id", "diagnosis_confirm_type"),
        {"image": "image", "lesion": "lesion_id"},
        companion=True,
    ),
    Layout(
        "ISIC 2020",
        ("image_name", "patient_id", "benign_malignant"),
        _ARCHIVE | {"image": "image_name", "site": "anatom_site_general_challenge"},
        coarse=("benign_malignant",),
        licence="CC-BY-NC",
        attribution=ISIC,
    ),
    Layout("ISIC 2020 duplicates", ("image_name_1", "image_name_2"), {}, companion=True),
)
# A file without a header, told by its first cell; its columns are named as it is read.
_2016 = Layout(
    "ISIC 2016",
    (),
    {"image": "image", "dx": "dx"},
    words={"0.0": "benign", "1.0": "malignant"},
    licence="CC-0",
    attribution=ISIC,
)
# The columns of a table that is none of these, under the names that people use.
_USUAL = {
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
    """rows: our fields by image, in the order listed; odd: (what, reason) of rows that cannot be used; pairs: images said
    to show one lesion; recognised: a line for each file."""

    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    odd: list[tuple[str, str]] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    recognised: list[str] = field(default_factory=list)
    source: str = ""


def read_table(metadata: Path, columns: dict[str, str]) -> Table:
    """Reads a CSV file, with its companions in the same folder, or every known one in a folder.

    columns: our field → theirs, for a table that is not known. Raises UserError where nothing can be read."""
    if metadata.is_dir():
        named = sorted(p for p in metadata.iterdir() if p.suffix.lower() in (".csv", ".tab") and not p.name.startswith("."))
        if not named:
            raise UserError(f"The metadata folder {metadata} holds no CSV file.")
    else:
        named = [metadata]
    table, companions = Table(), []
    for path in named:
        rows, header = read_csv(path)
        layout = _mapped(path, header, columns) if columns else recognise(header)
        if layout is None and len(named) > 1:
            table.recognised.append(f"{path.name}: no known columns, left aside")
        elif layout is None:
            raise UserError(
                f"{path} has no known id column ({', '.join(IDS)}); it has: {', '.join(header) or 'nothing'}. Say which is "
                f"which with data.columns, for example data.columns.image={header[0] if header else 'id'}."
            )
        elif layout.companion:
            companions.append((path, layout, rows))
        else:
            _take(table, path, layout, rows)
    if not table.rows and not table.odd:
        raise UserError(f"{metadata} lists no images with a diagnosis; name the table that does.")
    if not metadata.is_dir() and not columns and table.source != "table":
        companions += _beside(metadata)
    for path, layout, rows in companions:
        _join(table, path, layout, rows)
    return table


def recognise(header: list[str]) -> Layout | None:
    """The first layout whose columns are all there; a table with a usual id column; else None."""
    for layout in LAYOUTS:
        if all(c in header for c in layout.needs) and not (layout.companion and {"dx", "diagnosis"} & set(header)):
            if layout.columns.get("dx") not in (None, *header):
                # The ISIC archive now gives diagnoses in levels, coarse to fine.
                finest, *coarse = [d for d in ("diagnosis_3", "diagnosis_2", "diagnosis_1") if d in header] or [""]
                return replace(layout, columns=layout.columns | {"dx": finest}, coarse=tuple(coarse)) if finest else layout
            return layout
    if len(header) == 2 and re.match(r"ISIC_\d{7}$", header[0]):
        return _2016
    usual = {ours: next((c for c in theirs if c in header), "") for ours, theirs in _USUAL.items()}
    known = next((c for c in IDS if c in header), None)
    return Layout("table", (), {"image": known} | {k: v for k, v in usual.items() if v}) if known else None


def _mapped(path: Path, header: list[str], columns: dict[str, str]) -> Layout:
    if any(k not in FIELDS for k in columns) or "image" not in columns:
        raise UserError(f"data.columns maps our fields ({', '.join(FIELDS)}) to yours and must name 'image'.")
    if missing := [v for v in columns.values() if v not in header]:
        raise UserError(f"{path} has no column '{missing[0]}'; it has: {', '.join(header)}. Mend data.columns.")
    return Layout("columns", (), columns)


def read_csv(path: Path) -> tuple[list[dict], list[str]]:
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
    headless = len(header) == 2 and re.match(r"ISIC_\d{7}$", header[0])  # as ISIC 2016's
    names, body, start = (["image", "dx"], lines, 1) if headless else (header, lines[1:], 2)
    rows = [{"line": n, **dict(zip(names, row, strict=False))} for n, row in enumerate(body, start) if row]
    return rows, header


def _take(table: Table, path: Path, layout: Layout, rows: list[dict]) -> None:
    for row in rows:
        value = {f: (row.get(layout.columns.get(f, "\0")) or "").strip() for f in FIELDS}
        image = value["image"] = stem(value["image"])
        if layout.one_hot:
            hits = [dx for column, dx in layout.one_hot.items() if _number(row.get(column)) > 0.5]
            value["dx"] = hits[0] if len(hits) == 1 else layout.default if not hits else ""
            if len(hits) > 1:
                table.odd.append((image, f"several diagnoses on line {row['line']}"))
                continue
        value["dx"] = layout.words.get(value["dx"], value["dx"])
        for column in layout.coarse:
            if value["dx"].lower() in UNKNOWN:
                value["dx"] = (row.get(column) or "").strip()
        for name in ("dx", "lesion", "patient", "sex", "site"):
            value[name] = "" if value[name].lower() in UNKNOWN else value[name]
        value["licence"] = value["licence"] or layout.licence
        value["attribution"] = value["attribution"] or layout.attribution
        if not image:
            table.odd.append((f"line {row['line']}", "no image id"))
        elif image in table.rows:
            table.odd.append((image, f"listed again on line {row['line']}"))
        else:
            table.rows[image] = value | {"source": layout.name}
    table.source = layout.name
    table.recognised.append(f"{path.name}: {layout.name}, {len(rows):,} rows")


def _beside(metadata: Path) -> list[tuple[Path, Layout, list[dict]]]:
    found = []
    for path in sorted(metadata.parent.glob("*.csv")):
        if path != metadata:
            try:
                rows, header = read_csv(path)
            except UserError:
                continue  # nobody asked for it
            layout = recognise(header)
            if layout and layout.companion:
                found.append((path, layout, rows))
    return found


def _join(table: Table, path: Path, layout: Layout, rows: list[dict]) -> None:
    """Fills in what the main table does not say."""
    if not layout.columns:
        pairs = [(stem(row["image_name_1"]), stem(row["image_name_2"])) for row in rows]
        table.pairs += [(a, b) for a, b in pairs if a in table.rows and b in table.rows]
        used = len(table.pairs)
    else:
        used = 0
        for row in rows:
            mine = table.rows.get(stem(row.get(layout.columns["image"]) or ""))
            if mine:
                used += 1
                for ours, theirs in layout.columns.items():
                    value = (row.get(theirs) or "").strip()
                    if not mine[ours] and value.lower() not in UNKNOWN:
                        mine[ours] = value
    if used:
        table.recognised.append(f"{path.name}: {layout.name}, {used:,} rows joined")


def stem(name: str) -> str:
    """An image's id: the name of its file without folders and suffix."""
    name = Path(name.strip()).name
    return Path(name).stem if Path(name).suffix.lower() in SUFFIXES else name


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0
