"""Sheets of pictures: rows of pictures of one size, with the label of each row."""

import io
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

TILE, GAP = 96, 2  # pixels: least side of a picture on a sheet, white space after it


def sheet(rows: Sequence[tuple[str, Iterable[Image.Image]]]) -> bytes:
    """Draws a sheet.

    Args:
        rows: The label and the pictures of each row. All pictures have the same size; they are enlarged to TILE pixels or more.

    Returns:
        The sheet as PNG.
    """
    rows = [(label, list(pictures)) for label, pictures in rows]
    width = rows[0][1][0].width
    side = width * -(-TILE // width)
    font = ImageFont.load_default(14)
    titles = [label or "no label" for label, _ in rows]
    left = 8 + round(max(map(font.getlength, titles)))
    columns = max(len(pictures) for _, pictures in rows)
    drawn = Image.new("RGB", (left + columns * (side + GAP), len(rows) * (side + GAP)), "white")
    pen = ImageDraw.Draw(drawn)
    for row, (title, (_, pictures)) in enumerate(zip(titles, rows, strict=True)):
        top = row * (side + GAP)
        pen.text((4, top + side // 2), title, "black", font, anchor="lm")
        for column, picture in enumerate(pictures):
            drawn.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (left + column * (side + GAP), top))
    content = io.BytesIO()
    drawn.save(content, "PNG")
    return content.getvalue()
