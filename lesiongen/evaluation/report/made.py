"""The box "How this was made": everything that is needed to make the samples again, and under which licences they stand."""

from typing import Any

import yaml

from lesiongen.evaluation.report import markup
from lesiongen.evaluation.report.markup import Html, element, join
from lesiongen.evaluation.report.readings import why_missing

FIELDS = {
    "name": "Run",
    "date": "Date",
    "version": "Version of lesiongen",
    "commit": "Commit",
    "seed": "Seed",
    "number": "Samples",
    "guidance": "Guidance",
    "temperature": "Temperature",
    "top_k": "Top k",
    "top_p": "Top p",
    "gate": "Gate",
    "backbone": "Network of the main ruler",
    "backbone_digest": "Digest of its weights",
}
LISTS = {"sources": "Sources", "licences": "Licences", "attributions": "Attributions"}


def made(found: dict | None, data: dict | None, share: bool = False) -> Html:
    """Returns the section.

    Args:
        found: metrics["made"].
        data: metrics["data"], for licences and attributions.
        share: Whether the page is for others: settings that hold paths are left out.
    """
    parts: list[Html] = []
    if reason := why_missing(found):
        parts.append(markup.not_measured(reason))
    else:
        rows = [[title, _said(found[key])] for key, title in FIELDS.items() if key in found]
        parts.append(markup.table("Settings of the samples and of this report", ["Setting", "Value"], rows))
        parts.append(markup.paragraph("Command:"))
        command = found.get("command") or "not recorded"
        parts.append(_code(" ".join(map(_name, command.split())) if share else command, "Command"))
        digests = [[name, element("code", digest)] for name, digest in (found.get("digests") or {}).items()]
        if digests:
            parts.append(markup.table("Digests of what it was made from", ["Result", "Digest"], digests))
        config = found.get("config") or {}
        config = yaml.safe_dump(_without_paths(config) if share else config, sort_keys=False, allow_unicode=True)
        parts.append(markup.details("The whole config", _code(config, "Config")))
    parts += _licences(data or {})
    return markup.section("made", "How this was made", element("div", join(parts), class_="box"))


def _without_paths(value: Any) -> Any:
    """Returns a config in which each path is replaced by its last part, because folders may name clinics and people."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item) for item in value]
    return _name(value) if isinstance(value, str) else value


def _name(text: str) -> str:
    """Returns the last part of a path or an address, and any other text unchanged."""
    return text.rstrip("/").rsplit("/", 1)[-1]


def _code(text: str, name: str) -> Html:
    """Returns preformatted text that scrolls and can be reached by keyboard."""
    return element("pre", element("code", text), tabindex=0, role="group", aria_label=name)


def _said(value: Any) -> Html:
    """Returns a setting as text. A setting of each level is a dict or list."""
    if isinstance(value, dict):
        value = ", ".join(f"{key}: {item}" for key, item in value.items())
    names = {None: "off", "": "not known", True: "yes", False: "no"}
    known = names.get(value) if value is None or isinstance(value, bool | str) else None
    return element("span", str(value) if known is None else known)


def _licences(data: dict) -> list[Html]:
    """Returns the licences, attributions and sources of the training images, with their numbers of images."""
    parts = []
    for key, title in LISTS.items():
        if listed := data.get(key):
            rows = [[name or "not stated", f"{number:,}"] for name, number in listed.items()]
            parts.append(markup.table(f"{title} of the training images", [title[:-1], "Images"], rows))
    return parts
