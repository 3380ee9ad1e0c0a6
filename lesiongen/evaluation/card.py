"""The README.md beside whatever leaves the project: what it is, what it was made from, and under which licences."""

from lesiongen.ingest.licences import canonical, strictest

KINDS = {
    "tokenizer": "Turns dermoscopic images into grids of integer codes and back: a hierarchical VQ-VAE (arXiv:1906.00446).",
    "prior": "Writes grids of codes, one after another, under a label: an autoregressive prior over a tokenizer's codes.",
    "samples": "Synthetic images: drawn by priors, painted by a tokenizer's decoder. None of them shows a patient.",
}


def card(kind: str, name: str, facts: dict[str, str], data: dict[str, dict[str, int]], figures: dict[str, float]) -> str:
    """Markdown. data: images under each licence, of each attribution and source; figures: held-out ones, if any."""
    lines = [f"# {name}", "", KINDS[kind], "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += ["## Training data and licences", "", f"Strictest licence among the training images: **{statement(data)}**.", ""]
    for key in ("licences", "attributions", "sources"):
        listed = "; ".join(f"{what or 'not stated'} ({n:,} images)" for what, n in data[key].items())
        lines.append(f"- {key}: {listed}")
    if figures:
        lines += ["", "## Held-out figures", "", "| figure | value |", "|---|---|"]
        lines += [f"| {key} | {value:.4g} |" for key, value in figures.items()]
    lines += ["", "## Use", "", "For research. No basis for a diagnosis. A generator can copy what it was trained on: read"]
    lines += ["the report's copy rate before you share what it makes, and keep to the licences above.", ""]
    return "\n".join(lines)


def statement(data: dict[str, dict[str, int]]) -> str:
    """The strictest licence, with what it forbids in plain words."""
    worst = strictest(data["licences"])
    parts = canonical(worst).split("-")
    means = {"BY": "name the authors", "NC": "no commercial use", "ND": "no derived works", "SA": "share alike"}
    plain = [means[p] for p in parts if p in means and parts[0] == "CC"]
    return f"{worst} ({', '.join(plain)})" if plain else worst
