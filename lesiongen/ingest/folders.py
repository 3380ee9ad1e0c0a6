"""Finds the photographs of a folder, among thumbnails, trash, copies, links and masks."""

import filecmp
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hpc.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
# Folders of systems and programs, in lower case. Hidden folders, whose names begin with a dot, are skipped too.
SKIPPED_FOLDERS = {"@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
# Names of files that the ISIC challenges put beside the photographs: masks of lesions, superpixels, dermoscopic attributes.
_ISIC_MASKS = re.compile(r"_(segmentation|superpixels|attribute_[a-z_]+)$", re.IGNORECASE)
# Ends of names that are masks where a photograph of the name without the end is in the folder too. The second is PH2's.
_MASKS_BESIDE = re.compile(r"(_lesion|_r\d+_label\d+|_mask|_seg|_gt)$", re.IGNORECASE)


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a folder.

    Attributes:
        paths: Path of each image by the image's id.
        notes: A line to print for each kind of file that was left out.
    """

    paths: dict[str, Path]
    notes: list[str]


def find_images(folder: Path) -> ImageFiles:
    """Finds the image files below a folder. Links to folders are followed; each folder is read once.

    Raises:
        UserError: The folder does not exist or cannot be read, holds no images, or two different images share an id.
    """
    if not folder.is_dir():
        raise UserError(f"The images folder {folder} does not exist or is not a folder. Correct data.images.")
    found, left_out = _walk(folder), Counter()
    paths: dict[str, Path] = {}
    for path in sorted(found.files):
        name = unicodedata.normalize("NFC", path.stem)
        if _ISIC_MASKS.search(name):
            left_out["masks"] += 1
        elif name not in paths:
            paths[name] = path
        elif filecmp.cmp(paths[name], path, shallow=False):
            left_out["copies of another file, byte for byte"] += 1
        else:
            raise UserError(f"Two different images share the id '{name}': {paths[name]} and {path}. Rename one of them.")
    for name in [name for name in paths if (end := _MASKS_BESIDE.search(name)) and name[: end.start()] in paths]:
        del paths[name]
        left_out["masks"] += 1
    if not paths:
        raise UserError(f"The images folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    notes = [f"{number:,} {what} left out" for what, number in left_out.items()]
    notes += [f"folders skipped: {', '.join(f'{name} ({n})' for name, n in found.skipped.items())}"] * bool(found.skipped)
    return ImageFiles(paths, notes)


def count_images(folder: str | None) -> int:
    """Returns the number of image files below a folder; 0 if there is no such folder. Does not open the files."""
    return len(_walk(Path(folder)).files) if folder and Path(folder).is_dir() else 0


@dataclass(frozen=True)
class _Walk:
    files: list[Path]
    skipped: Counter


def _walk(folder: Path) -> _Walk:
    """Lists the files with an image's suffix, and counts the folders that are skipped, by name."""

    def refuse(error: OSError) -> None:
        raise UserError(f"The images folder {error.filename} cannot be read: {error.strerror}.") from None

    files: list[Path] = []
    skipped: Counter = Counter()
    seen: set[tuple[int, int]] = set()
    for current, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in seen:  # a second link to the folder, or a link to a folder above
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        unwanted = [name for name in folders if name.startswith(".") or name.lower() in SKIPPED_FOLDERS]
        skipped.update(unwanted)
        folders[:] = sorted(set(folders) - set(unwanted))
        files += [Path(current, n) for n in names if Path(n).suffix.lower() in IMAGE_SUFFIXES and not n.startswith(".")]
    return _Walk(files, skipped)
