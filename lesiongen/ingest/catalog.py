"""From a folder of images and their metadata to records: one image each, and what is known of it."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc.errors import UserError
from lesiongen.data.facts import AGE_BANDS
from lesiongen.ingest import licences, sources
from lesiongen.ingest.sources import SUFFIXES, stem

# Pictures that come with challenge data and are no photographs: masks of lesions, superpixels, dermoscopic attributes.
MASKS = re.compile(r"_(segmentation|superpixels|attribute_[a-z_]+)$", re.IGNORECASE)
FOLDERS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, slots=True)
class Record:
    """One image and what is known of it; "" for what is not. dx "" means unlabelled.

    split: the one that the data come with, if any; group: images of one group never part"""

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
        """The lesion, else the patient, else the image itself."""
        return self.lesion or self.patient or self.image

    def facts(self) -> dict:
        """What is written beside the image in its shard."""
        named = asdict(self)
        del named["path"], named["split"]
        return {{"image": "image_id", "lesion": "lesion_id", "patient": "patient_id"}.get(k, k): v for k, v in named.items()}


@dataclass(frozen=True)
class Catalog:
    """pairs: images that the source says show one lesion; left_out: by the licences asked for, no fault of theirs."""

    records: list[Record]
    rejected: list[dict]  # {"image", "reason"}
    left_out: list[dict]
    pairs: list[tuple[str, str]]
    recognised: list[str]
    listed: int  # images or rows looked at


def read_catalog(
    images: Path,
    metadata: Path | None,
    columns: dict[str, str] | None = None,
    classes: Iterable[str] = (),
    allowed: Iterable[str] = (),
    splits: Path | None = None,
    rename: dict[str, str] | None = None,
) -> Catalog:
    """Matches rows and image files. Raises UserError for an unusable folder or table; single mismatches are rejections.

    allowed: licences, all by default; splits: a CSV of image and split, else folders train, val, test are obeyed;
    rename: label as found → label to use"""
    files = _image_files(images)
    given = _splits(splits) if splits else _folder_splits(images, files)
    if metadata is None:
        table = sources.Table(recognised=[f"{len(files):,} images without metadata"])
        dx = _folder_classes(images, files, bool(given) and not splits)
        table.rows = {image: {"image": image, "dx": dx[image], "source": images.name} for image in files}
    else:
        table = sources.read_table(metadata, columns or {})
    if splits and not given.keys() & table.rows.keys():
        raise UserError(f"{splits} names none of the images. Its first column must hold their ids, and 'split' their split.")
    classes = set(classes)
    records, rejected = [], [{"image": image, "reason": reason} for image, reason in table.odd]
    for image, row in table.rows.items():
        row["dx"] = (rename or {}).get(row["dx"], row["dx"])
        if image not in files:
            rejected.append({"image": image, "reason": "no image file for this row"})
        elif classes and row["dx"] and row["dx"] not in classes:
            rejected.append({"image": image, "reason": f"unknown label '{row['dx']}'"})
        else:
            known = {k: v for k, v in row.items() if k not in ("image", "age")}
            age = _age(row.get("age", ""))
            records.append(Record(image, str(files[image]), **known, age=age, split=given.get(image, "")))
    seen = table.rows.keys() | {image for image, _ in table.odd}
    rejected += [{"image": image, "reason": "no row in the metadata"} for image in files if image not in seen]
    listed = len(files.keys() | seen)
    left_out = []
    if wanted := {licences.canonical(name) for name in allowed}:
        fits = [licences.canonical(r.licence) in wanted for r in records]
        left_out = [
            {"image": r.image, "reason": f"licence '{r.licence or 'not stated'}' is not among data.licences"}
            for r, fit in zip(records, fits, strict=True)
            if not fit
        ]
        records = [r for r, fit in zip(records, fits, strict=True) if fit]
        if not records:
            there = sorted({entry["reason"].split("'")[1] for entry in left_out})
            raise UserError(f"No image has a licence among data.licences; those here: {', '.join(there)}.")
    return Catalog(records, rejected, left_out, table.pairs, table.recognised, listed)


def _image_files(images: Path) -> dict[str, Path]:
    if not images.is_dir():
        raise UserError(f"The images folder {images} does not exist or is no folder. Set data.images to it.")
    try:
        found = sorted(p for p in images.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    except OSError as error:
        raise UserError(f"The images folder {images} cannot be read: {error.strerror}.") from None
    files: dict[str, Path] = {}
    for path in found:
        if MASKS.search(path.stem):
            continue
        if path.stem in files:
            raise UserError(f"Two images share the id '{path.stem}': {files[path.stem]} and {path}. Rename one.")
        files[path.stem] = path
    if not files:
        raise UserError(f"The images folder {images} holds no images ({', '.join(SUFFIXES)}).")
    return files


def _folder_splits(images: Path, files: dict[str, Path]) -> dict[str, str]:
    """Splits of data that come in folders train, val, test, or as the ISIC challenges name theirs; none if not all do."""

    def split(path: Path) -> str:
        top = path.relative_to(images).parts[0].lower()
        named = re.search(r"_(training|validation|test)_(v\d+_)?(input|data)", top)
        return FOLDERS.get(named.group(1) if named else top, "")

    found = {image: split(path) for image, path in files.items()}
    return found if all(found.values()) and len(set(found.values())) > 1 else {}


def _folder_classes(images: Path, files: dict[str, Path], below_split: bool) -> dict[str, str]:
    """Without metadata, images sorted into folders are labelled by them."""
    depth = 1 if below_split else 0
    parts = {image: path.relative_to(images).parts[depth:-1] for image, path in files.items()}
    if len(set(parts.values())) > 1 and all(len(p) == 1 for p in parts.values()):
        return {image: p[0] for image, p in parts.items()}
    return dict.fromkeys(files, "lesion")


def _splits(path: Path) -> dict[str, str]:
    rows, header = sources.read_csv(path)
    if "split" not in header or len(header) < 2:
        raise UserError(f"{path} must have a column of image ids and one named 'split'; it has: {', '.join(header)}.")
    column = next((c for c in sources.IDS if c in header), next(c for c in header if c != "split"))
    found: dict[str, str] = {}
    for row in rows:
        name, split = stem(row.get(column) or ""), FOLDERS.get((row.get("split") or "").strip().lower(), "")
        if not split:
            raise UserError(f"{path}, line {row['line']}: the split is '{row.get('split')}', not train, val or test.")
        if found.setdefault(name, split) != split:
            raise UserError(f"{path} lists {name} twice, in {found[name]} and in {split}.")
    return found


def _age(text: str) -> float | None:
    """In years; None for what is none."""
    try:
        age = float(text)
    except ValueError:
        return None
    return age if 0 <= age < 150 else None


def vocabularies(records: list[Record], classes: list[str], before: dict[str, list[str]] | None = None) -> dict[str, list[str]]:
    """Values of each column that a prior may be conditioned on, in the order of their numbers, which never change."""
    before = before or {}
    found = {"label": classes, "age_band": list(AGE_BANDS)}
    for column in ("site", "sex", "licence"):
        old = before.get(column, [])
        found[column] = old + sorted({getattr(r, column) for r in records} - {"", *old})
    return found
