"""Compares the licences of images: which has more conditions, and which of several is the strictest.

Names of licences come as free text from the tables of data sets. The strictest licence of the training images is printed
on model cards, samples and reports.
"""

import re
from collections.abc import Iterable


def canonical_name(name: str) -> str:
    """Returns one spelling of a licence, without its version: "cc by-nc 4.0" → "CC-BY-NC".

    A name that is neither a Creative Commons licence nor the public domain is returned without surrounding spaces.
    """
    words = re.findall(r"[A-Z]+|0", re.sub(r"\d+\.\d+", "", name.upper()))
    if words[:2] in (["CC", "0"], ["PUBLIC", "DOMAIN"]) or words[:1] == ["PDM"]:
        return "CC-0"
    parts = [w for w in ("BY", "NC", "ND", "SA") if w in words]
    return "-".join(["CC", *parts]) if "CC" in words and parts else name.strip()


def strictness(name: str) -> int:
    """Returns a number that is larger the more conditions a licence has.

    CC-0 has the smallest. Unknown licences have a larger one than every Creative Commons licence, and "", which means
    that no licence is stated, has the largest.
    """
    parts = canonical_name(name).split("-")
    if parts == ["CC", "0"]:
        return 0
    return 1 + ("SA" in parts) + 4 * ("NC" in parts) + 2 * ("ND" in parts) if parts[0] == "CC" else 100 + (not name)


def merge_counts(*abouts: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Merges the counts of several sets that may share images, by the larger count of each name.

    Args:
        abouts: For each set {"licences": {name: images}, …}, all with the same outer keys.

    Returns:
        Counts in the same form. Adding them up instead would count shared images twice.
    """
    merged = {key: dict(counts) for key, counts in abouts[0].items()}
    for about in abouts[1:]:
        for key, counts in merged.items():
            for name, number in about[key].items():
                counts[name] = max(number, counts.get(name, 0))
    return merged


def strictest(names: Iterable[str]) -> str:
    """Returns the licence with the most conditions, or a sentence to print where the licence of an image is not stated."""
    worst = max(names, key=strictness, default="")
    return worst or "not stated for some images; assume that they may not be passed on"
