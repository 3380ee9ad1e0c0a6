"""Reads the CSV metadata of public skin-lesion data sets, recognised by their columns, into one table of our fields.

Known layouts: HAM10000 (Tschandl 2018), the ISIC challenges of 2016 to 2020, the export of the ISIC archive, and any table
with an id column of a common name. A challenge spreads the facts about an image over several files. Companion files in the
folder of the named table are therefore read too: they often hold the lesion's id, and without that id photographs of one
lesion would fall into different splits. `catalog.read_catalog` matches the resulting rows with image files.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from hpc.errors import UserError
from lesiongen.ingest.csv_text import column_key, plain, read_cells
from lesiongen.ingest.folders import IMAGE_SUFFIXES
from lesiongen.ingest.layouts import FIELDS, ID_COLUMNS, Layout, common_columns, lacks_header, lookalikes, recognise

TABLE_SUFFIXES = (".csv", ".tab", ".tsv", ".txt")
UNKNOWN = {"", "unknown", "unk", "nan", "na", "n/a", "none"}  # cells that state nothing, in lower case


@dataclass
class Table:
    """The rows of all metadata files that were read, as our fields.

    Attributes:
        rows: For each image, in the order listed, its fields and "source".
        unusable: (image or line, reason) of each row that cannot be used.
        pairs: Images that a companion file says show the same lesion.
        recognised: A line to print for each file.
        source: Name of the last layout that rows were read with.
        unread: "lesion", "patient" or "dx" → columns that may hold it, of files where no column was read for it.
        paths: The files, companions included.
    """

    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    unusable: list[tuple[str, str]] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    recognised: list[str] = field(default_factory=list)
    source: str = ""
    unread: dict[str, list[str]] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)


def read_table(metadata: Path, columns: dict[str, str]) -> Table:
    """Reads a CSV file and its companions in the same folder, or every CSV file of a folder.

    Args:
        metadata: The file or the folder.
        columns: Our field → column of the file. These go before the columns that are recognised.

    Raises:
        UserError: A file cannot be read, has no known columns, or no images are listed.
    """
    paths = list_tables(metadata, [metadata])
    if not paths:
        raise UserError(f"The metadata folder {metadata} holds no CSV file.")
    # Tables that list images come first. Companions add to their rows, so they wait until all rows are read.
    table, companions = Table(), []
    for path in paths:
        rows, header = read_csv(path)
        layout = _layout_of_columns(path, header, columns, alone=len(paths) == 1)
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
            for name, found in lookalikes(layout, header).items():
                table.unread.setdefault(name, []).extend(f"{column} of {path.name}" for column in found)
    if not table.rows and not table.unusable:
        raise UserError(f"{metadata} lists no images. Set data.metadata to the table of images and their diagnoses.")
    if not metadata.is_dir():
        companions += _find_companions(metadata, table.source)
    for path, layout, rows in companions:
        _join_companion(table, path, layout, rows)
    table.paths = list(dict.fromkeys([*paths, *(path for path, _, _ in companions)]))
    return table


def list_tables(metadata: Path, files: list[Path]) -> list[Path]:
    """Returns the tables in `metadata` if it is a folder, else `files`."""
    if not metadata.is_dir():
        return files
    return sorted(p for p in metadata.iterdir() if p.suffix.lower() in TABLE_SUFFIXES and not p.name.startswith("."))


def _layout_of_columns(path: Path, header: list[str], columns: dict[str, str], alone: bool) -> Layout | None:
    """Returns the layout of a file: as recognised, with the columns that the user names in place of others.

    Args:
        path: The file.
        header: Its columns, in column_key() form.
        columns: Our field → column, from data.columns.
        alone: Whether it is the only file, so that it must have the columns.
    """
    if any(k not in FIELDS for k in columns):
        raise UserError(f"data.columns maps our fields ({', '.join(FIELDS)}) to your columns.")
    found, named = recognise(header), {ours: column_key(column) for ours, column in columns.items()}
    missing = [columns[ours] for ours, column in named.items() if column not in header]
    if missing and alone:
        raise UserError(f"{path} has no column '{missing[0]}'; it has: {', '.join(header)}. Correct data.columns.")
    if not named or missing:
        return found
    base = found or (Layout("columns", (), common_columns(header)) if "image" in named else None)
    if base is None:
        return None
    return replace(base, columns=base.columns | named, one_hot={} if "dx" in named else base.one_hot, companion=False)


def read_csv(path: Path) -> tuple[list[dict], list[str]]:
    """Reads a table.

    Returns:
        The rows, each with its line number under "line" and its cells under the names of their columns; and the names of the
        columns. Names are in column_key() form; the first of two columns of one name is read.

    Raises:
        UserError: The file cannot be read, or is not a table of text.
    """
    lines = read_cells(path)
    header = [column_key(name) for name in lines[0]] if lines else []
    names, body, start = (["image", "dx"], lines, 1) if lacks_header(header) else (header, lines[1:], 2)
    rows = [{"line": n, **dict(reversed(list(zip(names, row, strict=False))))} for n, row in enumerate(body, start) if any(row)]
    return rows, header


def _read_rows(table: Table, path: Path, layout: Layout, rows: list[dict]) -> None:
    """Adds the rows of a file that lists images to the table."""
    for row in rows:
        fields = {f: plain(row.get(layout.columns.get(f)) or "") for f in FIELDS}
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
                fields["dx"] = plain(row.get(column) or "")
        for name in ("dx", "lesion", "patient", "sex", "site"):
            fields[name] = "" if fields[name].lower() in UNKNOWN else fields[name]
        fields["sex"] = fields["sex"].lower()
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


def _find_companions(metadata: Path, source: str) -> list[tuple[Path, Layout, list[dict]]]:
    """Returns path, layout and rows of each companion file beside `metadata` and in the folder above.

    The ISIC challenges unpack some tables into folders of their own. In the folder above, only companions of the same data set
    count: layouts whose name begins with `source`.
    """
    folder = metadata.resolve().parent
    paths = {path.resolve() for pattern in ("*.csv", "../*.csv") for path in folder.glob(pattern)}
    companions = []
    for path in sorted(paths - {metadata.resolve()}):
        try:
            rows, header = read_csv(path)
        except UserError:
            continue  # the user has not named this file, so it may be anything
        layout = recognise(header)
        near = path.parent == folder
        if layout and layout.companion and (near or layout.name.startswith(source)):
            companions.append((path, layout, rows))
    return companions


def _join_companion(table: Table, path: Path, layout: Layout, rows: list[dict]) -> None:
    """Fills the empty fields of the table's rows from a companion file, or adds the pairs that the file lists."""
    if not layout.columns:
        pairs = [(image_id(row["image_name_1"]), image_id(row["image_name_2"])) for row in rows]
        table.pairs += [(a, b) for a, b in pairs if a in table.rows and b in table.rows]
        joined = len(table.pairs)
    elif "image" not in layout.columns:
        joined = _join_by_lesion(table, layout, rows)
    else:
        joined = 0
        for row in rows:
            fields = table.rows.get(image_id(row.get(layout.columns["image"]) or ""))
            if fields:
                joined += 1
                for name, column in layout.columns.items():
                    cell = plain(row.get(column) or "")
                    if not fields[name] and cell.lower() not in UNKNOWN:
                        fields[name] = cell
    if joined:
        table.recognised.append(f"{path.name}: {layout.name}, {joined:,} rows joined")


def _join_by_lesion(table: Table, layout: Layout, rows: list[dict]) -> int:
    """Gives the images of each lesion the diagnosis that a companion file states for the lesion. Returns the rows joined."""
    images: dict[str, list[dict]] = {}
    for fields in table.rows.values():
        images.setdefault(fields["lesion"], []).append(fields)
    joined = 0
    for row in rows:
        diagnoses = [dx for column, dx in layout.one_hot.items() if _number(row.get(column)) > 0.5]
        members = images.get(plain(row.get(layout.columns["lesion"]) or ""), [])
        joined += bool(members)
        for fields in members:
            fields["dx"] = fields["dx"] or (diagnoses[0] if len(diagnoses) == 1 else "")
    if joined:
        table.unread.pop("dx", None)
    return joined


def image_id(name: str) -> str:
    """Returns an image's id: its file name without folders and image suffix. Windows' paths have backslashes."""
    name = Path(plain(name).replace("\\", "/")).name
    return (Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name).strip()


def _number(cell: str | None) -> float:
    """Returns a cell as a number, 0 where it holds none."""
    try:
        return float(cell or 0)
    except ValueError:
        return 0.0
