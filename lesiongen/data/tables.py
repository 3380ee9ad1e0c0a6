"""The tables that this project writes: CSV files in UTF-8 with a header. lesiongen/ingest/csv_text.py reads those of users."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from hpc.run.rundir import atomic_write


def csv_text(header: Iterable[str], rows: Iterable[Iterable]) -> str:
    """Returns a table as text."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([list(header), *rows])
    return text.getvalue()


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Writes a table atomically."""
    atomic_write(path, csv_text(header, rows).encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a table that this project wrote."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
