"""Licences of images: which of two asks for more, and which of many binds whoever passes them on."""

import re
from collections.abc import Iterable


def canonical(name: str) -> str:
    """One spelling of a licence, without its version: "cc by-nc 4.0" → "CC-BY-NC"; "" stays ""."""
    words = re.findall(r"[A-Z]+|0", re.sub(r"\d+\.\d+", "", name.upper()))
    if words[:2] in (["CC", "0"], ["PUBLIC", "DOMAIN"]) or words[:1] == ["PDM"]:
        return "CC-0"
    parts = [w for w in ("BY", "NC", "ND", "SA") if w in words]
    return "-".join(["CC", *parts]) if "CC" in words and parts else name.strip()


def conditions(name: str) -> int:
    """How much a licence asks for; one that is unknown asks for more than any Creative Commons one, none for the most."""
    parts = canonical(name).split("-")
    if parts == ["CC", "0"]:
        return 0
    return 1 + ("SA" in parts) + 4 * ("NC" in parts) + 2 * ("ND" in parts) if parts[0] == "CC" else 100 + (not name)


def together(*abouts: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """{"licences": {name: images}, …} of what came from several sets that may share images: the larger count of each."""
    found = {key: dict(counts) for key, counts in abouts[0].items()}
    for about in abouts[1:]:
        for key, counts in found.items():
            for name, number in about[key].items():
                counts[name] = max(number, counts.get(name, 0))
    return found


def strictest(names: Iterable[str]) -> str:
    """The licence among `names` with the most conditions, as it may be shown."""
    worst = max(names, key=conditions, default="")
    return worst or "not stated for some images; take it that they may not be passed on"
