"""Matches a folder of images with its metadata: one `Record` for each image that can be used, a reason for each that cannot.

`packing.pack` splits the records and writes them into shards; `lesiongen preview` shows some of their images. Image files
are matched by name only. They are opened later, in packing.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc.errors import UserError
from lesiongen.data.facts import AGE_BANDS
from lesiongen.ingest import licences, sources
from lesiongen.ingest.csv_text import plain
from lesiongen.ingest.folders import find_images
from lesiongen.ingest.layouts import ID_COLUMNS, UNNAMED
from lesiongen.ingest.sources import Table, image_id

# Name of a split, as a folder or a CSV file spells it → split
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, slots=True)
class Record:
    """One image and the facts about it. "" and None mean unknown; an image with dx "" is unlabelled.

    Attributes:
        image: Id of the image.
        path: Image file.
        split: Split that the user's CSV file or folders give; "" if they give none.
        group: Group that `splits.assign` put the image in. All images of a group are in the same split.
    """

    image: str
    path: str
    lesion: str = ""
    patient: str = ""
    dx: str = ""
    age: float | None = None
    sex: str = ""
    site: str = ""
    licence: str = ""
    attribution: str = ""
    source: str = ""
    split: str = ""
    group: str = ""

    @property
    def own_group(self) -> str:
        """Group by the metadata alone: the id of the lesion, else of the patient, else of the image."""
        return self.lesion_group or self.patient_group or self.image

    @property
    def lesion_group(self) -> str:
        """Id of the lesion as a group, "" if it is unknown."""
        return _group_id("lesion", self.lesion, self.source)

    @property
    def patient_group(self) -> str:
        """Id of the patient as a group, "" if it is unknown."""
        return _group_id("patient", self.patient, self.source)

    def former_groups(self) -> dict[str, str]:
        """Returns the names that sets packed before may have for the groups of the lesion and the patient: now → before."""
        names = {self.lesion_group: self.lesion, self.patient_group: _group_id("patient", self.patient, "")}
        return {now: before for now, before in names.items() if now != before}

    def facts(self) -> dict:
        """Returns the facts that packing writes as JSON beside the image in its shard."""
        fields = asdict(self)
        del fields["path"], fields["split"]
        return {{"image": "image_id", "lesion": "lesion_id", "patient": "patient_id"}.get(k, k): v for k, v in fields.items()}


def _group_id(kind: str, number: str, source: str) -> str:
    """Returns the id of a lesion or patient as a group.

    A bare number carries its kind and its data set, so that lesion 7 is neither patient 7 nor lesion 7 of another data set.
    Tables of no known data set count as one: photographs of one lesion may be listed in several of them.
    """
    if not number.isdecimal():
        return number
    return f"{kind} {number}" if source in UNNAMED else f"{source} {kind} {number}"


@dataclass(frozen=True)
class Catalog:
    """What `read_catalog` found.

    Attributes:
        records: Images that can be used.
        rejected: {"image", "reason"} of images without a usable row, and of rows without an image.
        left_out: {"image", "reason"} of usable images whose licence is not among the allowed ones, and of masks and copies.
        pairs: Images that the metadata says show the same lesion.
        recognised: A line to print for each metadata file.
        listed: Number of distinct image ids among the files and the rows, and of rows that cannot be used.
        unread: "lesion", "patient" or "dx" → columns of the metadata that may hold it but were not read.
        notes: Lines to print of files and folders that were left out.
        tables: The metadata files that were read.
    """

    records: list[Record]
    rejected: list[dict]
    left_out: list[dict]
    pairs: list[tuple[str, str]]
    recognised: list[str]
    listed: int
    unread: dict[str, list[str]]
    notes: list[str]
    tables: list[Path]


def read_catalog(
    images: Path,
    metadata: Path | None,
    columns: dict[str, str] | None = None,
    classes: Iterable[str] = (),
    allowed: Iterable[str] = (),
    splits: Path | None = None,
    rename: dict[str, str] | None = None,
) -> Catalog:
    """Matches metadata rows with image files. A row or file without its counterpart is listed as rejected.

    Args:
        images: Folder, searched recursively.
        metadata: CSV file, or a folder of CSV files. None labels images by their folders.
        columns: Our field → column, for a CSV file of no known layout.
        classes: Labels to accept; all if empty.
        allowed: Licences to accept; all if empty.
        splits: CSV file of images and their splits. None reads the splits from the folders, see `_folder_splits`.
        rename: Label in the metadata → label to use.

    Raises:
        UserError: The folder or a CSV file cannot be used, or no image has an allowed licence.
    """
    found = find_images(images)
    files = found.paths
    supplied_splits = _read_splits(splits) if splits else _folder_splits(images, files)
    if metadata is None:
        table = _table_of_folders(images, files, bool(supplied_splits) and not splits)
    else:
        table = sources.read_table(metadata, columns or {})
    if splits and not supplied_splits.keys() & table.rows.keys():
        raise UserError(f"{splits} lists none of the images. It needs a column of image ids and a column 'split'.")
    records, rejected = _match(files, table, set(classes), supplied_splits, rename or {})
    listed_ids = table.rows.keys() | {image for image, _ in table.unusable}
    rejected += [{"image": image, "reason": "no row in the metadata"} for image in files if image not in listed_ids]
    records, left_out = _filter_licences(records, allowed)
    left_out += found.left_out
    number = len(files.keys() | table.rows.keys()) + len(table.unusable)
    return Catalog(records, rejected, left_out, table.pairs, table.recognised, number, table.unread, found.notes, table.paths)


def _match(
    files: dict[str, Path], table: Table, classes: set[str], supplied_splits: dict[str, str], rename: dict[str, str]
) -> tuple[list[Record], list[dict]]:
    """Returns the records of rows that have a file and an accepted label, and the rejected rows."""
    records, rejected = [], [{"image": image, "reason": reason} for image, reason in table.unusable]
    _match_other_case(files, table)
    for image, row in table.rows.items():
        row["dx"] = rename.get(row["dx"], row["dx"])
        if image not in files:
            rejected.append({"image": image, "reason": "no image file for this row"})
        elif classes and row["dx"] and row["dx"] not in classes:
            rejected.append({"image": image, "reason": f"unknown label '{row['dx']}'"})
        else:
            facts = {k: v for k, v in row.items() if k not in ("image", "age")}
            age = _age(row.get("age", ""))
            records.append(Record(image, str(files[image]), **facts, age=age, split=supplied_splits.get(image, "")))
    return records, rejected


def _match_other_case(files: dict[str, Path], table: Table) -> None:
    """Renames rows without a file to the file whose name differs in upper and lower case only, if there is one such file."""
    lower = Counter(name.lower() for name in files)
    by_lower = {name.lower(): name for name in files if lower[name.lower()] == 1}
    for image in [image for image in table.rows if image not in files]:
        name = by_lower.get(image.lower())
        if name and name not in table.rows:
            table.rows[name] = table.rows.pop(image) | {"image": name}


def _filter_licences(records: list[Record], allowed: Iterable[str]) -> tuple[list[Record], list[dict]]:
    """Returns the records with an allowed licence, and {"image", "reason"} of the others."""
    wanted = {licences.canonical_name(name) for name in allowed}
    if not wanted:
        return records, []
    fits = [licences.canonical_name(r.licence) in wanted for r in records]
    others = [r for r, fit in zip(records, fits, strict=True) if not fit]
    if len(others) == len(records):
        present = sorted({r.licence or "not stated" for r in others})
        raise UserError(f"No image has a licence among data.licences; licences of the images: {', '.join(present)}.")
    left_out = [
        {"image": r.image, "reason": f"licence '{r.licence or 'not stated'}' is not among data.licences"} for r in others
    ]
    return [r for r, fit in zip(records, fits, strict=True) if fit], left_out


def _folder_splits(images: Path, files: dict[str, Path]) -> dict[str, str]:
    """Returns the split of each image, read from the name of its top folder: train, val, test, or a name of an ISIC challenge.

    Returns {} unless every image is in such a folder and there are at least two splits.
    """

    def split(path: Path) -> str:
        top = path.relative_to(images).parts[0].lower()
        isic = re.search(r"_(training|validation|test)_(v\d+_)?(input|data)", top)
        return SPLIT_NAMES.get(isic.group(1) if isic else top, "")

    splits = {image: split(path) for image, path in files.items()}
    return splits if all(splits.values()) and len(set(splits.values())) > 1 else {}


def _table_of_folders(images: Path, files: dict[str, Path], below_split: bool) -> Table:
    """Returns a table of images without metadata, labelled by their folders.

    If the images are not sorted into several folders, one level deep, all of them get the label "lesion".

    Args:
        images: Folder of all images.
        files: Path of each image.
        below_split: Whether the class folders are inside folders of splits.
    """
    depth = 1 if below_split else 0
    parts = {image: path.relative_to(images).parts[depth:-1] for image, path in files.items()}
    if len(set(parts.values())) > 1 and all(len(p) == 1 for p in parts.values()):
        dx = {image: plain(p[0]) for image, p in parts.items()}
    else:
        dx = dict.fromkeys(files, "lesion")
    rows = {image: {"image": image, "dx": dx[image], "source": images.name} for image in files}
    return Table(rows, recognised=[f"{len(files):,} images without metadata"])


def _read_splits(path: Path) -> dict[str, str]:
    """Reads the split of each image from a CSV file."""
    rows, header = sources.read_csv(path)
    if "split" not in header or len(header) < 2:
        raise UserError(f"{path} needs a column of image ids and a column 'split'; it has: {', '.join(header)}.")
    column = next((c for c in ID_COLUMNS if c in header), next(c for c in header if c != "split"))
    splits: dict[str, str] = {}
    for row in rows:
        image, split = image_id(row.get(column) or ""), SPLIT_NAMES.get((row.get("split") or "").strip().lower(), "")
        if not split:
            raise UserError(f"{path}, line {row['line']}: the split is '{row.get('split')}', not train, val or test.")
        if splits.setdefault(image, split) != split:
            raise UserError(f"{path} lists {image} twice, in {splits[image]} and in {split}.")
    return splits


def _age(text: str) -> float | None:
    """Returns an age in years, or None if the text is not a number that is at least 0 and below 150."""
    try:
        age = float(text)
    except ValueError:
        return None
    return age if 0 <= age < 150 else None


def vocabularies(records: list[Record], classes: list[str], before: dict[str, list[str]] | None = None) -> dict[str, list[str]]:
    """Returns the vocabularies for the manifest: the values of label, age band, site, sex and licence (see data/facts.py).

    Args:
        records: The new images.
        classes: All labels, in the order of their indices.
        before: Vocabularies of the images that are packed already. Their values keep their indices; new values follow in
            alphabetical order.
    """
    before = before or {}
    values = {"label": classes, "age_band": list(AGE_BANDS)}
    for column in ("site", "sex", "licence"):
        old = before.get(column, [])
        values[column] = old + sorted({getattr(r, column) for r in records} - {"", *old})
    return values
