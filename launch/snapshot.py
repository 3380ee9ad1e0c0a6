"""The code that the jobs of a run execute: a copy in the run directory, made when they are submitted.

A job may start days later, and a requeued job starts again. Both then run the code that was submitted, whatever has happened to
the clone since.
"""

import hashlib
import shutil
from pathlib import Path

from hpc.run.rundir import COMMIT_FILE, atomic_write, environment

SOURCE = Path(__file__).parents[1]
PACKAGES = ("hpc", "lesiongen", "launch", "configs")


def location(run_dir: Path) -> Path:
    """Returns the directory of this code's copy in a run. Its name is a digest of the code."""
    digest = hashlib.sha256()
    for path in _files():
        digest.update(str(path.relative_to(SOURCE)).encode() + b"\0" + path.read_bytes())
    return (Path(run_dir) / "jobs" / "code" / digest.hexdigest()[:12]).absolute()


def write(run_dir: Path) -> Path:
    """Copies this code into a run, unless the same code is there already. Returns the directory of the copy."""
    folder = location(run_dir)
    if not folder.exists():
        unfinished = folder.with_name(f".{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        for path in _files():
            copy = unfinished / path.relative_to(SOURCE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        atomic_write(unfinished / COMMIT_FILE, environment()["versions"].get("commit", "unknown").encode())
        unfinished.rename(folder)
    return folder


def _files() -> list[Path]:
    """Returns the files of the code, in a fixed order."""
    found = (path for package in PACKAGES for path in (SOURCE / package).rglob("*") if path.is_file())
    return sorted(path for path in found if "__pycache__" not in path.parts and path.suffix != ".pyc")
