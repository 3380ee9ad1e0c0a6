"""From a folder of images and a metadata CSV to records, groups and splits."""

import csv
import hashlib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc.errors import UserError

SPLITS = ("train", "val", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

AGE_BANDS = ("0-19", "20-39", "40-59", "60-79", "80+")

# Columns of known sources: our field → theirs. Recognised by their id column.
SOURCES = {
    "ham10000": {
        "image": "image_id",
        "lesion": "lesion_id",
        "patient": "patient_id",
        "dx": "dx",
        "age": "age",
        "sex": "sex",
        "site": "localization",
        "licence": "copyright_license",
        "attribution": "attribution",
    },
    "isic": {
        "image": "isic_id",
        "lesion": "lesion_id",
        "patient": "patient_id",
        "dx": "diagnosis",
        "age": "age_approx",
        "sex": "sex",
        "site": "anatom_site_general",
        "licence": "copyright_license",
        "attribution": "attribution",
    },
}
NEEDED = {"ham10000": ("image_id", "dx"), "isic": ("isic_id",)}
FIELDS = tuple(SOURCES["ham10000"])


@dataclass(frozen=True)
class Record:
    """One image and what is known of it; "" for what is not. dx "" means unlabelled."""

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

    @property
    def group(self) -> str:
        """Images of one group never part: the lesion, else the patient, else the image itself."""
        return self.lesion or self.patient or self.image

    def facts(self) -> dict:
        """What is written beside the image in its shard."""
        named = asdict(self)
        del named["path"]
        return {{"image": "image_id", "lesion": "lesion_id", "patient": "patient_id"}.get(k, k): v for k, v in named.items()}


@dataclass(frozen=True)
class Catalog:
    records: list[Record]
    rejected: list[dict]  # {"image", "reason"}
    source: str
    listed: int  # images or rows looked at


def split_of(group: str, val: float, test: float) -> str:
    """Split by a hash of the group's id against thresholds: adding images never moves one that is there."""
    u = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return "test" if u < test else "val" if u < test + val else "train"


def read(images: Path, metadata: Path | None, columns: dict[str, str], classes: tuple[str, ...]) -> Catalog:
    """Matches rows and image files. Raises UserError for an unusable folder or CSV; single mismatches are rejections."""
    files = _image_files(images)
    if metadata is None:
        records = [Record(image=stem, path=str(path), dx="lesion", source=images.name) for stem, path in files.items()]
        return Catalog(records, [], "folder", len(files))
    rows, source, names = _rows(metadata, columns)
    records, rejected, seen = [], [], set()
    for number, row in enumerate(rows, start=2):
        value = {ours: (row.get(theirs) or "").strip() for ours, theirs in names.items()}
        image = Path(value["image"]).stem if Path(value["image"]).suffix.lower() in SUFFIXES else value["image"]
        if not image:
            rejected.append({"image": f"line {number}", "reason": "no image id"})
        elif image in seen:
            rejected.append({"image": image, "reason": f"listed again on line {number}"})
        elif image not in files:
            rejected.append({"image": image, "reason": "no image file for this row"})
        elif classes and value["dx"] and value["dx"] not in classes:
            rejected.append({"image": image, "reason": f"unknown label '{value['dx']}'"})
        else:
            rest = {k: v for k, v in value.items() if k not in ("image", "age")}
            records.append(Record(image, str(files[image]), **rest, age=_number(value["age"]), source=source))
        seen.add(image)
    rejected += [{"image": stem, "reason": "no row in the metadata"} for stem in files if stem not in seen]
    return Catalog(records, rejected, source, len(files.keys() | seen))


def _image_files(images: Path) -> dict[str, Path]:
    if not images.is_dir():
        raise UserError(f"The images folder {images} does not exist or is no folder. Set data.images to it.")
    try:
        found = sorted(p for p in images.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    except OSError as error:
        raise UserError(f"The images folder {images} cannot be read: {error.strerror}.") from None
    if not found:
        raise UserError(f"The images folder {images} holds no images ({', '.join(SUFFIXES)}).")
    files: dict[str, Path] = {}
    for path in found:
        if path.stem in files:
            raise UserError(f"Two images share the id '{path.stem}': {files[path.stem]} and {path}. Rename one.")
        files[path.stem] = path
    return files


def _rows(metadata: Path, columns: dict[str, str]) -> tuple[list[dict], str, dict[str, str]]:
    try:
        with open(metadata, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, header = list(reader), reader.fieldnames or []
    except OSError as error:
        raise UserError(f"The metadata {metadata} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"The metadata {metadata} is not a CSV file in UTF-8: {error}.") from None
    if columns:
        unknown = [k for k in columns if k not in FIELDS]
        if unknown or "image" not in columns:
            raise UserError(f"data.columns maps our fields ({', '.join(FIELDS)}) to yours and must name 'image'.")
        missing = [v for v in columns.values() if v not in header]
        if missing:
            raise UserError(f"{metadata} has no column '{missing[0]}'; it has: {', '.join(header)}. Mend data.columns.")
        return rows, "columns", {f: columns.get(f, "\0") for f in FIELDS}
    for source, names in SOURCES.items():
        if all(column in header for column in NEEDED[source]):
            # The ISIC archive now gives diagnoses in levels, coarse to fine.
            fallback = next((d for d in ("diagnosis_3", "diagnosis_2", "diagnosis_1") if d in header), names["dx"])
            return rows, source, names if names["dx"] in header else names | {"dx": fallback}
    raise UserError(
        f"{metadata} has no known id column (image_id and dx as in HAM10000, or isic_id as in the ISIC archive); it has: "
        f"{', '.join(header) or 'nothing'}. Say which is which with data.columns, for example "
        f"data.columns.image={header[0] if header else 'id'}."
    )


def _number(text: str) -> float | None:
    """An age in years; None for what is none."""
    try:
        age = float(text)
    except ValueError:
        return None
    return age if 0 <= age < 150 else None


def assign(records: list[Record], val: float, test: float) -> dict[str, list[Record]]:
    """Records of each split in hash order, so that any run of them is a fair draw. Raises UserError for an empty split."""
    splits: dict[str, list[Record]] = {name: [] for name in SPLITS}
    for record in records:
        splits[split_of(record.group, val, test)].append(record)
    wanted = {"train": 1.0, "val": val, "test": test}
    for name, members in splits.items():
        if wanted[name] > 0 and not members:
            raise UserError(
                f"The {name} split would be empty: {len({r.group for r in records})} lesions are too few for "
                f"data.val={val} and data.test={test}. Add images or raise the fraction."
            )
    return {
        name: sorted(members, key=lambda r: hashlib.sha256(r.image.encode()).digest())
        for name, members in splits.items()
        if members
    }


def class_counts(splits: dict[str, list[Record]], classes: list[str]) -> dict[str, dict[str, int]]:
    counts = {name: Counter(r.dx for r in members) for name, members in splits.items()}
    return {name: {c: count.get(c, 0) for c in [*classes, ""] if c or count.get("")} for name, count in counts.items()}


def vocabularies(records: list[Record], classes: list[str]) -> dict[str, list[str]]:
    """Values of each column that a prior may be conditioned on, in the order of their numbers."""
    found = {c: sorted({getattr(r, c) for r in records} - {""}) for c in ("site", "sex", "licence")}
    return {"label": classes, "age_band": list(AGE_BANDS), **found}


def thin_classes(splits: dict[str, list[Record]], classes: list[str], least: int = 5) -> list[str]:
    """Warnings for classes with fewer than `least` held-out groups: figures for them mean little."""
    warnings = []
    for name in ("val", "test"):
        for label in classes:
            groups = {r.group for r in splits.get(name, []) if r.dx == label}
            if name in splits and len(groups) < least:
                warnings.append(f"class '{label}' has only {len(groups)} lesions in {name}")
    return warnings
