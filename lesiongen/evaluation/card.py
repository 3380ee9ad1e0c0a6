"""The README.md beside exported weights and samples: what they are, what they were made from, and under which licences.

The stages that train, the sample stage and `publish` write it. It states the strictest licence among the training images.
"""

from lesiongen.ingest.licences import canonical_name, strictest

KINDS = {
    "tokenizer": "Encodes dermoscopic images as grids of codes, and decodes them: a hierarchical VQ-VAE (arXiv:1906.00446).",
    "prior": "Generates grids of a tokenizer's codes for a given label: an autoregressive prior, which draws code by code.",
    "generator": "Generates labelled images of skin lesions: priors generate codes, a tokenizer decodes them.",
    "samples": "Synthetic images: priors generated the codes, a tokenizer decoded them. None of the images shows a patient.",
}


def card(kind: str, name: str, facts: dict[str, str], data: dict[str, dict[str, int]], metrics: dict[str, float]) -> str:
    """Writes a model card in Markdown.

    Args:
        kind: A key of KINDS.
        name: The title.
        facts: Key → value, listed below the title.
        data: Number of training images under each licence, of each attribution and of each source:
            {"licences": {name: images}, "attributions": …, "sources": …}.
        metrics: Held-out metrics; may be empty.

    Returns:
        The text.
    """
    lines = [f"# {name}", "", KINDS[kind], "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += ["## Training data and licences", "", f"Strictest licence among the training images: **{statement(data)}**.", ""]
    for key in ("licences", "attributions", "sources"):
        listed = "; ".join(f"{value or 'not stated'} ({number:,} images)" for value, number in data[key].items())
        lines.append(f"- {key}: {listed}")
    if metrics:
        lines += ["", "## Held-out metrics", "", "| metric | value |", "|---|---|"]
        lines += [f"| {key} | {value:.4g} |" for key, value in metrics.items()]
    lines += [
        "",
        "## Use",
        "",
        "For research only, not for diagnosis. A generator can copy its training images: read the copy rate",
    ]
    lines += ["in the report before you share generated images, and keep to the licences above.", ""]
    if kind == "samples":
        lines += [
            "Do not share the folder `private/`. It holds what is needed to compare the samples with the training images,"
        ]
        lines += ["and it may name training images or show copies of them.", ""]
    return "\n".join(lines)


def statement(data: dict[str, dict[str, int]]) -> str:
    """Returns the strictest licence among the training images, with its conditions in plain words."""
    worst = strictest(data["licences"])
    parts = canonical_name(worst).split("-")
    meanings = {"BY": "name the authors", "NC": "no commercial use", "ND": "no derived works", "SA": "share alike"}
    conditions = [meanings[part] for part in parts if part in meanings and parts[0] == "CC"]
    return f"{worst} ({', '.join(conditions)})" if conditions else worst
