"""Image files inside an HDF5 file, as Kaggle distributes SLICE-3D: one dataset of encoded bytes for each image id.

The path of such an image is the path of the HDF5 file with the id below it: `train-image.hdf5/ISIC_0015670`. images.read()
reads these paths like files. Only the record that is asked for is read. Each process opens the HDF5 file itself.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

from hpc.errors import UserError

SUFFIXES = (".hdf5", ".h5")


def is_hdf5(path: Path) -> bool:
    """Returns whether a path has the suffix of an HDF5 file."""
    return path.suffix.lower() in SUFFIXES


def image_paths(path: Path) -> list[Path]:
    """Returns the path of each image inside an HDF5 file.

    Raises:
        UserError: The file cannot be read, or h5py is not installed.
    """
    try:
        file = _open(path)
        return [path / name for name in file]
    except OSError as error:
        raise UserError(f"The images file {path} cannot be read as HDF5: {error}.") from None


def read_bytes(path: Path) -> bytes:
    """Reads the bytes of an image file, on the disk or inside an HDF5 file.

    Raises:
        OSError: The image cannot be read.
    """
    if not is_hdf5(path.parent) or not path.parent.is_file():
        return path.read_bytes()
    try:
        value = _open(path.parent)[path.name][()]
        return value.tobytes() if hasattr(value, "tobytes") else bytes(value)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise OSError(f"not a readable record of {path.parent.name} ({error})") from None


@lru_cache(maxsize=4)
def _open(path: Path) -> Any:
    """Opens an HDF5 file; it stays open until the process ends, because opening takes longer than reading a record."""
    try:
        import h5py
    except ImportError:
        raise UserError(
            f"Reading {path.name} needs h5py. Install it: pip install 'lesiongen[hdf5]', or pip install h5py."
        ) from None
    return h5py.File(path, "r", locking=False)
