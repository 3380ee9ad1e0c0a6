"""The section that shows samples, beside real images unless the page is to be shared."""

import io

import torch
from PIL import Image

from lesiongen.data import images
from lesiongen.evaluation.report import markup, words
from lesiongen.evaluation.report.markup import Html, element, join

Strips = dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]  # class → strip of samples, strip of training images


def samples(strips: Strips, share: bool) -> Html:
    """Returns the section.

    Args:
        strips: For each class a strip of samples and one of training images, uint8 [C, H, W] with W a multiple of the images'
            width, or None. The class "" stands for all.
        share: Whether to leave out real images.
    """
    note = "Each row shows the first samples of a diagnosis. They are not selected."
    note += " Real images are in the private copy of this report." if share else " Beside them are real training images."
    groups = []
    for label, (synthetic, real) in strips.items():
        name = words.diagnosis(label) if label else "all samples"
        pictures = [_row("Synthetic", synthetic, f"Synthetic images: {name}")]
        if not share:
            pictures.append(_row("Real (training images)", real, f"Real training images: {name}"))
        title = name[:1].upper() + name[1:] if label and words.is_known(label) else name
        groups.append(element("div", join([markup.heading(title), markup.side_by_side(pictures)]), class_="group"))
    title = "Samples" if share else "Samples beside real images"
    return markup.section("samples", title, markup.paragraph(note, "note"), *groups)


def _row(title: str, strip_CHW: torch.Tensor | None, alt: str) -> Html:
    """Returns a strip as a figure of two pictures, which stand below one another on a narrow screen."""
    caption = element("figcaption", title)
    if strip_CHW is None:
        return element("figure", join([caption, markup.paragraph("none", "missing")]), class_="strip")
    width = strip_CHW.shape[-1]
    halves = strip_CHW.split(-(-width // 2), -1) if width >= 4 * strip_CHW.shape[-2] else (strip_CHW,)
    parts = ("", ", continued")
    pictures = [markup.image(_jpeg(half), alt + part, "jpeg") for half, part in zip(halves, parts, strict=False)]
    return element("figure", join([caption, element("div", join(pictures, ""), class_="halves")]), class_="strip")


def _jpeg(strip_CHW: torch.Tensor) -> bytes:
    """Encodes a strip as JPEG, because a page of photographs in PNG would be too large to send."""
    return images.encode(Image.open(io.BytesIO(images.encode_png(strip_CHW))), "jpg", 90)
