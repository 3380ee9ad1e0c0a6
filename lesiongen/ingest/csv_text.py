"""Reads tables as people save them: commas, semicolons, tabs or bars; UTF-8, UTF-16 or Windows' encoding; any line ends.

Column names are compared in the form of column_key(), so that "Lesion ID", "lesion_id" and "LESION-ID" are one name.
"""

import codecs
import csv
import io
import re
import unicodedata
from pathlib import Path

from hpc.errors import UserError

SEPARATORS = ",;\t|"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def column_key(name: str) -> str:
    """Returns the form of a column's name that is compared: lower case, without spaces around, "_" for spaces and hyphens."""
    return re.sub(r"[\s\-]+", "_", unicodedata.normalize("NFC", name).strip().strip('"').lower())


def plain(text: str) -> str:
    """Returns a text in the form that ids and facts are compared in: one code for each letter, no control characters."""
    return re.sub(r"[\x00-\x1f\x7f]+", " ", unicodedata.normalize("NFC", text)).strip()


def read_cells(path: Path) -> list[list[str]]:
    """Reads the cells of a table, line by line; empty lines are left out but counted as [].

    Raises:
        UserError: The file cannot be read, or is not a text table.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"The metadata {path} cannot be read: {error.strerror}.") from None
    if content[:4] == b"PK\x03\x04" or content[:8] == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1":
        raise UserError(f"The metadata {path} is an Excel workbook. Save it as CSV (File, Save As, CSV UTF-8).")
    text = _decode(path, content).replace("\r\n", "\n").replace("\r", "\n")
    first, _, rest = text.partition("\n")
    if declared := re.fullmatch(r'"?sep=(.)"?', first.strip()):  # Excel writes the separator into a line of its own
        first, text = rest.partition("\n")[0], rest
    unquoted = re.sub(r'"[^"]*"', "", first)
    separator = declared.group(1) if declared else max(SEPARATORS, key=unquoted.count)
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    except csv.Error as error:
        raise UserError(f"The metadata {path} is not a CSV file: {error}.") from None


def _decode(path: Path, content: bytes) -> str:
    """Returns the text of a file: UTF-16 if a byte-order mark says so, else UTF-8, else the encoding of Western Windows."""
    try:
        text = content.decode("utf-16" if content.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    first = text.partition("\n")[0]
    if "\0" in text or (first.strip() and not re.search(r"[A-Za-z]", first)):
        raise UserError(f"The metadata {path} is not a CSV file in UTF-8. Save it as CSV UTF-8.")
    return text
