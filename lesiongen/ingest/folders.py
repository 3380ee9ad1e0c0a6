"""Finds the photographs of a folder, among thumbnails, trash, copies, links and masks; or those inside an HDF5 file."""

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hpc.errors import UserError
from lesiongen.data import hdf5
from lesiongen.ingest.csv_text import plain

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
        notes: A line to print for each kind of file or folder that was left out.
        left_out: {"image", "reason"} of each image file that was left out; "image" is its path.
    """

    paths: dict[str, Path]
    notes: list[str]
    left_out: list[dict]


def find_images(folder: Path) -> ImageFiles:
    """Finds the image files below a folder. Links to folders are followed; each folder is read once.

    Args:
        folder: The folder, or an HDF5 file. HDF5 files in a folder are read if the folder holds no image files.

    Raises:
        UserError: The folder does not exist or cannot be read, holds no images, or two different images share an id.
    """
    if not _holds_images(folder):
        raise UserError(f"The images folder {folder} does not exist or is not a folder. Correct data.images.")
    found = _walk(folder)
    notes = [f"folders skipped: {_listed(found.skipped)}"] * bool(found.skipped)
    notes += [f"files of other kinds ignored: {_listed(found.others)}"] * bool(found.others)
    if found.files and found.hdf5:
        notes.append(f"{len(found.hdf5):,} HDF5 files beside image files left out")
    files = found.files or [image for path in sorted(found.hdf5) for image in hdf5.image_paths(path)]
    paths: dict[str, Path] = {}
    left_out: dict[Path, str] = {}
    for path in sorted(files):
        name = plain(path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name)
        if not name or not _is_text(str(path)):
            left_out[path] = "its name is empty, or it or a folder's name is not valid UTF-8; rename it"
        elif _ISIC_MASKS.search(name):
            left_out[path] = "a mask"
        elif name not in paths:
            paths[name] = path
        elif hdf5.read_bytes(paths[name]) == hdf5.read_bytes(path):
            left_out[path] = "a copy of another file, byte for byte"
        else:
            raise UserError(f"Two different images share the id '{name}': {paths[name]} and {path}. Rename one of them.")
    for name in [name for name in paths if (end := _MASKS_BESIDE.search(name)) and name[: end.start()] in paths]:
        left_out[paths.pop(name)] = "a mask"
    if not paths:
        raise UserError(f"The images folder {folder} holds no images ({', '.join((*IMAGE_SUFFIXES, *hdf5.SUFFIXES))}).")
    notes += [f"left out, {reason}: {number:,} files" for reason, number in Counter(left_out.values()).items()]
    entries = [{"image": ascii(str(path))[1:-1], "reason": reason} for path, reason in left_out.items()]
    return ImageFiles(paths, notes, entries)


def _listed(counts: Counter) -> str:
    return ", ".join(f"{name if _is_text(name) else ascii(name)} ({number:,})" for name, number in counts.items())


def _is_text(name: str) -> bool:
    """Returns whether a name can be written as UTF-8. Linux allows any bytes in names."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def count_images(folder: str | None) -> int:
    """Returns the number of image files below a folder or in an HDF5 file; 0 if there is none. Opens no image."""
    if not folder or not _holds_images(Path(folder)):
        return 0
    found = _walk(Path(folder))
    return len(found.files) or sum(len(hdf5.image_paths(path)) for path in found.hdf5)


def list_files(folder: Path) -> list[Path]:
    """Returns the files on the disk that `find_images` may read images from; [] if there is no such folder."""
    found = _walk(folder) if _holds_images(folder) else _Walk([], [], Counter(), Counter())
    return found.files or found.hdf5


def _holds_images(path: Path) -> bool:
    """Returns whether a path may be `data.images`: a folder or an HDF5 file."""
    return path.is_dir() or (hdf5.is_hdf5(path) and path.is_file())


@dataclass(frozen=True)
class _Walk:
    files: list[Path]
    hdf5: list[Path]
    skipped: Counter
    others: Counter


def _walk(folder: Path) -> _Walk:
    """Lists image files and HDF5 files. Counts the folders that are skipped, by name, and other files, by suffix."""

    def refuse(error: OSError) -> None:
        raise UserError(f"The images folder {error.filename} cannot be read: {error.strerror}.") from None

    if folder.is_file():
        return _Walk([], [folder], Counter(), Counter())
    files: list[Path] = []
    hdf5_files: list[Path] = []
    skipped, others = Counter(), Counter()
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
        for name in names:
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                others["hidden"] += 1
            elif suffix in IMAGE_SUFFIXES:
                files.append(Path(current, name))
            elif suffix in hdf5.SUFFIXES:
                hdf5_files.append(Path(current, name))
            else:
                others[suffix or "no suffix"] += 1
    return _Walk(files, hdf5_files, skipped, others)
