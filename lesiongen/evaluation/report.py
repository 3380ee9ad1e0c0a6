"""The HTML report of a run: verdict, samples beside real images, table of metrics, pictures, plots, and the data.

The page is one file that opens from disk: pictures are embedded, and nothing is loaded from elsewhere. All numbers come from
metrics.json, so that the two agree. The evaluate stage writes the page.
"""

import base64
import html
import io
import time

import torch
from PIL import Image

from lesiongen.data import images
from lesiongen.evaluation.card import statement
from lesiongen.evaluation.verdict import verdict

Strips = dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]  # class → strip of samples, strip of training images

PLOTS = (  # picture, title, note; side by side
    (
        "distances",
        "Distance to the training data",
        "Samples should be as far from the training images as held-out images are. Samples further left may be copies.",
    ),
    (
        "confusion",
        "Classes that the classifier sees in samples",
        "Rows: the class that was requested. Columns: the class that the classifier predicts.",
    ),
)
WIDE = (  # picture, title, note; below one another
    (
        "reconstructions",
        "Reconstructions",
        "Test images (above) and their reconstructions by the tokenizer (below). Samples cannot be sharper than these.",
    ),
    (
        "curves",
        "Learning curves",
        "The horizontal axis counts training samples. Where the held-out curve departs from the training curve, "
        "the model memorises its training images.",
    ),
)
MEMBERS = ("lesions", "patients", "groups")
STYLE = """
body{font:16px/1.5 system-ui,"Segoe UI",Roboto,sans-serif;color:#1f2430;background:#fff;max-width:1120px;
 margin:2em auto;padding:0 1.2em}
h1{margin:0;font-size:1.9em} h2{margin:2em 0 .4em;font-size:1.3em;border-bottom:1px solid #d9dde3}
.tag{background:#7a1f5c;color:#fff;border-radius:4px;padding:.15em .5em;font-size:.75rem;letter-spacing:.06em;
 vertical-align:middle}
.note{color:#5a6270;font-size:.92em} img{max-width:100%;display:block} img.wide{width:100%}
.verdict{background:#f4f6f9;border-left:5px solid #2a6fbb;padding:.7em 1.1em;margin:1.2em 0}
.verdict div{padding:.15em 0 .15em 1.4em;text-indent:-1.15em}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.45em;text-indent:0}
.good{background:#2e9e5b} .fair{background:#e0a81c} .poor{background:#d0413b} .none{background:#c3c8d0}
table{border-collapse:collapse;width:100%;font-size:.95em}
th,td{text-align:left;padding:.35em .7em;border-bottom:1px solid #e4e7ec;vertical-align:top} th{background:#f4f6f9}
td.v{font-weight:600;white-space:nowrap} tr.part td{background:#fafbfc;font-weight:600;color:#5a6270}
.sheet{display:grid;grid-template-columns:auto 1fr 1fr;gap:2px 12px;align-items:center}
.caption{display:grid;text-align:center;font-size:.9em} .caption .near{color:#d0413b;font-weight:600}
.pair{display:grid;gap:2em;grid-template-columns:repeat(auto-fit,minmax(380px,1fr))}
"""


def page(name: str, metrics: dict, pictures: dict[str, bytes], strips: Strips, distances: list[float]) -> str:
    """Builds the page.

    Args:
        name: Name of the run.
        metrics: The content of metrics.json.
        pictures: PNG bytes by name: neighbours, reconstructions, curves, confusion, distances. Sections without a picture are
            left out.
        strips: For each class a strip of samples and one of training images, uint8 [C, H, W], or None.
        distances: The distance of each pair in the picture of neighbours.

    Returns:
        The HTML.
    """
    parts = _header(name, metrics)
    parts += _samples(strips)
    parts += [_titled("Metrics"), _table(metrics)]
    if "neighbours" in pictures:
        parts += _neighbours(pictures["neighbours"], distances, metrics["copies"]["threshold"])
    parts += ["<div class='pair'>"]
    for key, title, note in PLOTS:
        if key in pictures:
            parts += ["<div>", _titled(title, note), _picture(pictures[key], title, look=""), "</div>"]
    parts += ["</div>"]
    for key, title, note in WIDE:
        if key in pictures:
            parts += [_titled(title, note), _picture(pictures[key], title)]
    parts += [_titled("Data"), _data(metrics["data"], metrics["fidelity"].get("recall", {}))]
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{_escape(name)}</title>"
    body = "\n".join(parts)
    return f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n"


def _header(name: str, metrics: dict) -> list[str]:
    """Returns the title, the lines about the data, and the verdict."""
    data = metrics["data"]
    sources = ", ".join(source or "unknown source" for source in data["sources"])
    listed = ", ".join(f"{sum(counts.values()):,} {split}" for split, counts in data["counts"].items())
    members = ", ".join(f"{sum(data[kind].values()):,} {kind}" for kind in MEMBERS if kind in data)
    facts = [
        f"{time.strftime('%d %B %Y')} · {sum(data['generated'].values()):,} samples of {data['size']} px",
        f"Real data: {sources}; {listed} images of {members}",
        f"Strictest licence of the data: {statement(data)}. This page shows real training images: "
        "share it only as this licence allows.",
    ]
    parts = [f"<h1>{_escape(name)} <span class='tag'>SYNTHETIC IMAGES</span></h1>"]
    parts += ["<p class='note'>", "<br>".join(map(_escape, facts)), "</p><div class='verdict'>"]
    parts += [f"<div><span class='dot {mark}'></span>{_escape(sentence)}</div>" for mark, sentence in verdict(metrics)]
    return [*parts, "</div>"]


def _samples(strips: Strips) -> list[str]:
    """Returns the samples and real images of each class, side by side."""
    parts = ["<h2>Samples beside real images</h2><div class='sheet'>"]
    parts += ["<b></b><b>Synthetic</b><b>Real (training split)</b>"]
    for label, pair in strips.items():
        parts += [f"<b>{_escape(label or 'all')}</b>", *(f"<div>{_strip(strip)}</div>" for strip in pair)]
    return [*parts, "</div>"]


def _neighbours(picture: bytes, distances: list[float], threshold: float) -> list[str]:
    """Returns the samples that are nearest to the training data, with their distances."""
    note = (
        "The samples that are nearest to the training data (above), each with its nearest training image (below), rotated or "
        "flipped to match. The numbers are their distances at 32 × 32 px. A sample whose distance is below "
        f"{threshold:.3f} counts as a copy."
    )
    cells = [f"<span{' class=near' if d < threshold else ''}>{d:.3f}</span>" for d in distances]
    return [
        _titled("Is anything copied?", note),
        f"<div style='max-width:{150 * len(cells)}px'>",
        f"<div class='caption' style='grid-template-columns:repeat({len(cells)},1fr)'>",
        *cells,
        "</div>",
        _picture(picture, "nearest neighbours"),
        "</div>",
    ]


def _table(metrics: dict) -> str:
    """Returns the table of metrics."""
    parts = ["<table><tr><th>Metric</th><th>Value</th><th>For comparison</th><th>Meaning</th></tr>"]
    parts += _tokenizer_rows(metrics["tokenizer"], list(metrics["priors"]))
    parts += _prior_rows(metrics["priors"])
    parts += [_part("Samples"), _fidelity_row(metrics["fidelity"]), _diversity_row(metrics["diversity"])]
    parts += _copy_rows(metrics["copies"])
    return "".join(parts) + "</table>"


def _part(title: str) -> str:
    """Returns a heading within the table."""
    return f"<tr class='part'><td colspan='4'>{_escape(title)}</td></tr>"


def _row(metric: str, value: str, comparison: str, meaning: str) -> str:
    cells = f"<td>{_escape(metric)}</td><td class='v'>{_escape(value)}</td><td>{_escape(comparison)}</td>"
    return f"<tr>{cells}<td>{_escape(meaning)}</td></tr>"


def _tokenizer_rows(tokenizer: dict, levels: list[str]) -> list[str]:
    flat = f"{tokenizer['floor_psnr']:.2f} dB if all pixels have one colour"
    rows = [
        _part("Tokenizer: quality of reconstructions, test split"),
        _row("PSNR", f"{tokenizer['psnr']:.2f} dB", flat, "higher is better"),
        _row("SSIM", f"{tokenizer['ssim']:.3f}", "1 for equal images", "structural similarity; higher is better"),
        _row(
            "NMSE",
            f"{tokenizer['nmse']:.4f}",
            "1 if all pixels have one colour",
            "squared error over the variance of the data; lower is better",
        ),
    ]
    for level in levels:
        used, perplexity = tokenizer[f"usage/{level}"], tokenizer[f"perplexity/{level}"]
        comparison = f"perplexity {perplexity:.0f} of at most {tokenizer['entries']}"
        rows.append(_row(f"Codebook of {level}", f"{used:.0%} used", comparison, "share of the codes that the test images use"))
    return rows


def _prior_rows(priors: dict[str, dict]) -> list[str]:
    rows = [_part("Priors: bits per token, validation split; lower is better")]
    for level, bits in priors.items():
        comparison = f"bigram {bits['bigram_bits']:.3f}, uniform {bits['uniform_bits']:.3f}"
        meaning = f"{bits['train_bits_per_token']:.3f} on training codes; if that is much lower, the model memorises"
        rows.append(_row(level, f"{bits['bits_per_token']:.3f}", comparison, meaning))
    return rows


def _fidelity_row(fidelity: dict) -> str:
    if fidelity["ratio"] is None:
        return _row("Fidelity", "not measured", "", fidelity["reason"])
    comparison = (
        f"real {fidelity['real']:.1%}, reconstructed {fidelity['reconstructions']:.1%}, chance {fidelity['chance']:.1%}"
    )
    meaning = "balanced accuracy of a classifier on the samples' labels"
    return _row("Fidelity", f"{fidelity['samples']:.1%}", comparison, meaning)


def _diversity_row(diversity: dict) -> str:
    if diversity["ratio"] is None:
        return _row("Diversity", "not measured", "", diversity["reason"])
    comparison = f"1 for real held-out images (spread {diversity['real']:.2f}; samples {diversity['samples']:.2f})"
    meaning = "spread within a class; means little if fidelity is poor"
    return _row("Diversity", f"{diversity['ratio']:.2f}", comparison, meaning)


def _copy_rows(copies: dict) -> list[str]:
    held_out = copies["held_out"]
    comparison = f"{held_out['rate']:.1%} of held-out images, by definition about 1 %"
    meaning = f"{copies['copies']} of {copies['number']:,}; 95 % interval {copies['low']:.2%} to {copies['high']:.2%}"
    rows = [_row("Copy rate", f"{copies['rate']:.2%}", comparison, meaning)]
    for key, title, remark in (
        ("median_distance", "Distance, median", "if much smaller than for held-out images, samples are too near"),
        ("least_distance", "Distance, smallest", "look at this pair first"),
    ):
        comparison = f"{held_out[key]:.4f} for held-out images"
        rows.append(_row(title, f"{copies[key]:.4f}", comparison, f"to the nearest training image; {remark}"))
    return rows


def _data(data: dict, recall: dict) -> str:
    """Returns the table of the data, with a row for each class.

    Args:
        data: The metrics of the data.
        recall: {class: {"samples": recall, "real": recall}}, for the classes on which it was measured.
    """
    splits, generated = list(data["counts"]), data["generated"]
    names = dict.fromkeys([name for counts in data["counts"].values() for name in counts] + list(generated))
    titles = ["Images by class", *splits, "generated", "samples recognised", "real recognised"]
    parts = ["<table><tr>", *(f"<th>{_escape(title)}</th>" for title in titles), "</tr>"]
    for name in names:
        cells = [f"{data['counts'][split].get(name, 0):,}" for split in splits] + [f"{generated.get(name, 0):,}"]
        cells += [f"{recall[name][source]:.0%}" if name in recall else "–" for source in ("samples", "real")]
        parts += [f"<tr><td>{_escape(name or 'no label')}</td>", *(f"<td>{cell}</td>" for cell in cells), "</tr>"]
    for kind in (kind for kind in MEMBERS if kind in data):
        cells = [f"<td>{data[kind].get(split, 0):,}</td>" for split in splits]
        parts += [f"<tr><td>{kind}</td>", *cells, "<td></td><td></td><td></td></tr>"]
    parts += ["</table>", *(_set(number, found) for number, found in enumerate(data["sets"], 1) if len(data["sets"]) > 1)]
    licences = "; ".join(f"{name or 'not stated'}: {number:,}" for name, number in data["licences"].items())
    attributions = "; ".join(name for name in list(data["attributions"])[:10] if name)
    note = "Lesions and patients: those with an id in the metadata. Groups: images that may not be in different splits. "
    note += f"No group is in two splits. {data['rejected']:,} images or rows of metadata were rejected. Licences: {licences}."
    note += f" Attribution: {attributions}." if attributions else ""
    return "".join(parts) + f"<p class='note'>{_escape(note)}</p>"


def _set(number: int, found: dict) -> str:
    """Returns a line about one of several packed sets."""
    counts = ", ".join(f"{found[kind]:,} {kind}" for kind in ("images", *MEMBERS) if kind in found)
    return f"<p class='note'>Set {number} ({_escape(', '.join(found['sources']) or 'unknown source')}): {counts}</p>"


def _escape(text: object) -> str:
    """Returns a value as text in which HTML's special characters are escaped."""
    return html.escape(str(text))


def _titled(title: str, note: str = "") -> str:
    return f"<h2>{_escape(title)}</h2>" + (f"<p class='note'>{_escape(note)}</p>" if note else "")


def _picture(content: bytes, alt: str, kind: str = "png", look: str = "wide") -> str:
    """Returns an embedded picture. `look` is its CSS class."""
    data = base64.b64encode(content).decode()
    return f"<img class='{look}' alt='{_escape(alt)}' src='data:image/{kind};base64,{data}'>"


def _strip(strip_CHW: torch.Tensor | None) -> str:
    """Returns a strip of images as JPEG, because a page of photographs in PNG would be too large to send."""
    if strip_CHW is None:
        return "<span class='note'>none</span>"
    picture = Image.open(io.BytesIO(images.encode_png(strip_CHW)))
    return _picture(images.encode(picture, "jpg", 90), "images of one class", "jpeg")
