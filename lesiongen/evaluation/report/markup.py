"""Pieces of HTML: escaped text, sections, tables, pictures, definitions. All functions escape what is not already Html."""

import base64
import html
from collections.abc import Callable, Iterable, Sequence

from lesiongen.evaluation.intervals import Figure
from lesiongen.evaluation.report import words

SIGNS = {"good": ("✓", "Good"), "fair": ("!", "Fair"), "poor": ("✗", "Poor"), "none": ("–", "Not measured")}


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Text = str | Html | int


def escape(text: Text) -> Html:
    """Returns text in which HTML's special characters are escaped. Html stays as it is."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(str(text)).replace(" %", "\u00a0%"))  # no line ends before a percent sign


def join(parts: Iterable[Text], between: str = "\n") -> Html:
    """Joins pieces."""
    return Html(between.join(escape(part) for part in parts))


def element(tag: str, content: Text = "", **attributes: Text) -> Html:
    """Returns an element. Underscores in names of attributes become hyphens, and those at the end are dropped."""
    listed = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(v))}"' for key, v in attributes.items())
    return Html(f"<{tag}{listed}>{escape(content)}</{tag}>")


def section(key: str, title: str, *parts: Text) -> Html:
    """Returns a section with a heading of the second level. `key` is its anchor."""
    heading = element("h2", title, id=f"{key}-title")
    return element("section", join([heading, *parts]), id=key, aria_labelledby=f"{key}-title")


def heading(title: str) -> Html:
    """Returns a heading of the third level."""
    return element("h3", title)


def paragraph(text: Text, kind: str = "") -> Html:
    """Returns a paragraph; `kind` is its CSS class, such as "note"."""
    return element("p", text, class_=kind) if kind else element("p", text)


def not_measured(reason: str) -> Html:
    """Returns a paragraph for what was not measured."""
    return paragraph(join([sign("none"), f": {reason.rstrip('.')}."], ""), "missing")


def sign(mark: str) -> Html:
    """Returns a mark as a sign and a word, so that nothing is said by colour alone."""
    character, word = SIGNS[mark]
    return element("span", join([element("span", character, aria_hidden="true"), word], " "), class_=f"mark {mark}")


def terms(*names: str) -> Html:
    """Returns the explanations of terms, each a key of words.TERMS. The page explains a term where it first stands."""
    pairs = (join([element("dt", dfn(name)), element("dd", words.TERMS[name])], "") for name in names)
    return element("dl", join(element("div", pair) for pair in pairs))


def dfn(name: str) -> Html:
    """Returns a term as the place of its definition."""
    return element("dfn", name)


def figure_cell(figure: Figure | None, show: Callable[[float], str] = words.number) -> Html:
    """Returns a figure with its interval, for a cell of a table."""
    value, between = words.interval(figure, show)
    if not between:
        return element("span", value, class_="missing") if value == "not measured" else element("b", value)
    return join([element("b", value), element("small", between)], " ")


def table(caption: str, head: Sequence[Text], rows: Iterable[Sequence[Text]]) -> Html:
    """Returns a table in a region of its own, which scrolls sideways and can be reached by keyboard.

    Args:
        caption: The caption.
        head: Titles of the columns. The first is that of the rows.
        rows: The cells of each row. The first is the row's header.
    """
    titles = join((element("th", title, scope="col") for title in head), "")
    lines = []
    for first, *cells in rows:
        cells = [element("td", cell) for cell in cells]
        lines.append(element("tr", join([element("th", first, scope="row"), *cells], "")))
    parts = [element("caption", element("span", caption)), element("thead", element("tr", titles))]
    content = element("table", join([*parts, element("tbody", join(lines))]))
    return element("div", content, class_="scroll", role="group", tabindex=0, aria_label=f"Table: {caption}")


def image(content: bytes, alt: str, kind: str = "png") -> Html:
    """Returns an embedded picture. `alt` says what is seen."""
    data = base64.b64encode(content).decode()
    return Html(f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}">')


def chart(content: bytes, alt: str, caption: str, wide: bool = False) -> Html:
    """Returns a chart with a caption. A wide chart scrolls sideways on a narrow screen."""
    picture = image(content, alt)
    if wide:
        picture = element("div", picture, class_="scroll", role="group", tabindex=0, aria_label=f"Chart: {caption}")
    return element("figure", join([picture, element("figcaption", caption)]), class_="chart wide" if wide else "chart")


def side_by_side(parts: Iterable[Html]) -> Html:
    """Returns pieces in as many columns as fit."""
    return element("div", join(parts), class_="columns")


def details(title: str, content: Text) -> Html:
    """Returns a part that the reader opens. It is open in print."""
    return element("details", join([element("summary", title), content]))
