"""One page that says what a run is worth: figures beside their floors, pictures, curves. Opens from disk, alone.

Pictures are PNG bytes; everything is embedded. What stands on the page comes from metrics.json, so that the two agree.
"""

import base64
import html
import io
import time

import torch
from PIL import Image

from lesiongen.data import images
from lesiongen.evaluation.card import statement

PLOTS = (  # picture, title, what to look for
    ("distances", "Distance to the training data", "Samples should lie where held-out images lie, not left of them."),
    ("confusion", "What the classifier sees in samples", "CodeRows: the class asked for; columns: the class seen."),
)
BELOW = (
    (
        "reconstructions",
        "Reconstructions",
        "Test images (above) and what the tokenizer keeps of them (below): no sample can be sharper than these.",
    ),
    (
        "curves",
        "Learning curves",
        "Over samples seen. Where held-out parts from training, the model learns its training images by heart.",
    ),
)
TRAIN, HELD_OUT, FLOOR = "#2a6fbb", "#d9701a", "#8a8f98"
# Training codes are shown twice: as training meets them, with dropout and augmentation, and as held-out ones are met.
LOOKS = ((TRAIN, "training", "-"), (HELD_OUT, "held-out", ".-"), (FLOOR, "bigram", "--"), (TRAIN, "training, plain", ".:"))
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


def page(
    name: str,
    metrics: dict,
    shown: dict[str, bytes],
    sheets: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]],
    distances: list[float],
) -> str:
    """The whole page. shown: neighbours, reconstructions, curves, confusion, distances, as far as there are any;
    sheets: per class a strip of samples and one of training images, uint8 [C, H, W]; distances: of the neighbours."""
    data = metrics["data"]
    counts = {split: sum(of.values()) for split, of in data["counts"].items()}
    sources = ", ".join(s or "unknown source" for s in data["sources"])
    listed = ", ".join(f"{n:,} {split}" for split, n in counts.items())
    facts = [
        f"{time.strftime('%d %B %Y')} · {sum(data['generated'].values()):,} samples of {data['size']} px",
        f"Real data: {sources}; {listed} images of {sum(data['lesions'].values()):,} lesions",
        f"Strictest licence of the data: {statement(data)}. This page shows real training images: "
        "pass it on only as far as that allows.",
    ]
    out = [f"<h1>{esc(name)} <span class='tag'>SYNTHETIC IMAGES</span></h1>"]
    out += ["<p class='note'>", "<br>".join(map(esc, facts)), "</p><div class='verdict'>"]
    out += [f"<div><span class='dot {mark}'></span>{esc(said)}</div>" for mark, said in verdict(metrics)]
    out += ["</div><h2>Samples beside real images</h2><div class='sheet'>"]
    out += ["<b></b><b>Synthetic</b><b>Real (training split)</b>"]
    for label, strips in sheets.items():
        out += [f"<b>{esc(label or 'all')}</b>", *(f"<div>{_strip(s)}</div>" for s in strips)]
    out += ["</div>", _titled("Figures"), _table(metrics)]
    if "neighbours" in shown:
        below = metrics["copies"]["threshold"]
        note = "The samples nearest to the training data (above), each with its nearest training image (below), turned "
        note += f"as it fits best. Above them their distance at 32 × 32 px: below {below:.3f} it counts as a copy."
        cells = [f"<span{' class=near' if d < below else ''}>{d:.3f}</span>" for d in distances]
        out += [_titled("Is anything copied?", note)]
        out += [f"<div style='max-width:{150 * len(cells)}px'>"]
        out += [f"<div class='caption' style='grid-template-columns:repeat({len(cells)},1fr)'>", *cells, "</div>"]
        out += [_picture(shown["neighbours"], "nearest neighbours"), "</div>"]
    out += ["<div class='pair'>"]
    for key, title, note in PLOTS:
        if key in shown:
            out += ["<div>", _titled(title, note), _picture(shown[key], title, look=""), "</div>"]
    out += ["</div>"]
    for key, title, note in BELOW:
        if key in shown:
            out += [_titled(title, note), _picture(shown[key], title)]
    out += [_titled("Data"), _data(data, metrics["fidelity"].get("recall", {}))]
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{esc(name)}</title>"
    body = "\n".join(out)
    return f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n"


def verdict(metrics: dict) -> list[tuple[str, str]]:
    """(mark, sentence) each: good, fair, poor, or none where nothing can be said."""
    out, fidelity, diversity, found = [], metrics["fidelity"], metrics["diversity"], metrics["copies"]
    if "lesiongen phantom" in metrics["data"]["attributions"]:
        out += [("none", "The data are drawings made for demonstration: these figures say nothing about real lesions.")]
    mark = holds(fidelity)
    if fidelity["ratio"] is None:
        out += [("none", f"Whether labels show in the samples cannot be measured: {fidelity['reason']}.")]
    else:
        seen = {"good": "as plain as on real ones", "fair": "weaker than on real ones", "poor": "hardly to be seen"}
        seen["none"] = "not judged, for this classifier hardly tells real images apart either"
        said = f"A classifier trained on real images finds the intended class in {fidelity['samples']:.0%} of the "
        said += f"samples, in {fidelity['real']:.0%} of real held-out images and in {fidelity['chance']:.0%} by chance"
        out += [(mark, f"{said}: labels are {seen[mark]}.")]
    if diversity["ratio"] is not None and mark in ("good", "fair"):
        ratio = diversity["ratio"]
        level = 0 if ratio >= 0.9 else 1 if ratio >= 0.7 else 2
        said = ("as varied as real ones", "somewhat less varied than real ones", "much alike")[level]
        mark = ("good", "fair", "poor")[level]
        out += [(mark, f"Within a class samples are {said} ({ratio:.0%} of the real spread).")]
    elif diversity["ratio"] is not None:
        out += [("none", "Their variety does not count while labels do not hold.")]
    said = f"{found['copies']} of {found['number']:,} samples count as copies of training images (95 % interval of the "
    said += f"rate: {found['low']:.1%} to {found['high']:.1%}; unrelated real images: 1 %)"
    if found["least_distance"] < 0.5 * found["held_out"]["least_distance"]:
        out += [("poor", f"{said}, and the nearest is far nearer than any unrelated image: look at the pairs below.")]
    elif found["low"] > 0.01:
        out += [("poor", f"{said}: more than chance. Look at the pairs below before passing samples on.")]
    elif found["high"] <= 0.02:
        out += [("good", f"{said}: no more than chance.")]
    else:
        out += [("fair", f"{said}: too few samples to be sure, draw 1,000 or more.")]
    for level, bits in metrics["priors"].items():
        gap = bits["bits_per_token"] - bits["train_bits_per_token"]
        if bits["bits_per_token"] >= bits["bigram_bits"]:
            out += [("poor", f"The prior for {level} is no better than a bigram: train it longer.")]
        elif gap > 0.1 * bits["bits_per_token"]:
            said = f"The prior for {level} knows its training images better than others, by {gap:.2f} bits a token"
            out += [("fair", f"{said}: it learns by heart.")]
    return out


def holds(fidelity: dict) -> str:
    """Mark of fidelity: share of the classifier's skill above chance on real images that is left on samples."""
    if fidelity["ratio"] is None or fidelity["real"] < fidelity["chance"] + 0.1:
        return "none"
    skill = (fidelity["samples"] - fidelity["chance"]) / (fidelity["real"] - fidelity["chance"])
    return "good" if skill >= 0.9 else "fair" if skill >= 0.6 else "poor"


def _table(metrics: dict) -> str:
    tokenizer, fidelity, diversity, found = (metrics[k] for k in ("tokenizer", "fidelity", "diversity", "copies"))

    out: list[str] = ["<table><tr><th>Figure</th><th>Value</th><th>Beside it</th><th>Meaning</th></tr>"]

    def part(title: str) -> None:
        out.append(f"<tr class='part'><td colspan='4'>{esc(title)}</td></tr>")

    def row(what: str, value: str, beside: str, meaning: str) -> None:
        cells = f"<td>{esc(what)}</td><td class='v'>{esc(value)}</td><td>{esc(beside)}</td><td>{esc(meaning)}</td>"
        out.append(f"<tr>{cells}</tr>")

    part("Tokenizer: what images lose on the way into codes and back, test split")
    flat = f"{tokenizer['floor_psnr']:.2f} dB with one colour for all"
    row("PSNR", f"{tokenizer['psnr']:.2f} dB", flat, "higher is closer")
    row("SSIM", f"{tokenizer['ssim']:.3f}", "1 if equal", "likeness of structure")
    row("NMSE", f"{tokenizer['nmse']:.4f}", "1 with one colour for all", "squared error over the data's variance")
    for level in metrics["priors"]:
        used, p = tokenizer[f"usage/{level}"], tokenizer[f"perplexity/{level}"]
        beside = f"perplexity {p:.0f} of at most {tokenizer['entries']}"
        row(f"Codebook of {level}", f"{used:.0%} used", beside, "codes that do work")
    part("Priors: how well codes are foretold, validation split; bits per token, lower is better")
    for level, bits in metrics["priors"].items():
        beside = f"bigram {bits['bigram_bits']:.3f}, uniform {bits['uniform_bits']:.3f}"
        meaning = f"{bits['train_bits_per_token']:.3f} on training codes; a large gap is learning by heart"
        row(level, f"{bits['bits_per_token']:.3f}", beside, meaning)
    part("Samples")
    if fidelity["ratio"] is None:
        row("Fidelity", "not measured", "", fidelity["reason"])
    else:
        beside = f"real {fidelity['real']:.1%}, reconstructed {fidelity['reconstructions']:.1%}, "
        beside += f"chance {fidelity['chance']:.1%}"
        row("Fidelity", f"{fidelity['samples']:.1%}", beside, "balanced accuracy of a classifier on samples' labels")
    if diversity["ratio"] is None:
        row("Diversity", "not measured", "", diversity["reason"])
    else:
        beside = f"1 is that of real held-out images ({diversity['real']:.2f}; samples {diversity['samples']:.2f})"
        row("Diversity", f"{diversity['ratio']:.2f}", beside, "spread within a class; counts only where fidelity holds")
    beside = f"{found['held_out']['rate']:.1%} of held-out images, by definition about 1 %"
    meaning = f"{found['copies']} of {found['number']:,}; 95 % interval {found['low']:.2%} to {found['high']:.2%}"
    row("Copy rate", f"{found['rate']:.2%}", beside, meaning)
    for what, meaning in (("median", "far smaller is too near"), ("least", "the pair to look at first")):
        key = f"{what}_distance"
        beside = f"{found['held_out'][key]:.4f} of held-out images"
        row(f"Distance, {what}", f"{found[key]:.4f}", beside, f"to the nearest training image; {meaning}")
    return "".join(out) + "</table>"


def _data(data: dict, recall: dict) -> str:
    """recall: {class: {"samples", "real"}}, as far as it was measured."""
    splits, made = list(data["counts"]), data["generated"]
    names = dict.fromkeys([c for counts in data["counts"].values() for c in counts] + list(made))
    titles = ["Images of", *splits, "generated", "samples recognised", "real recognised"]
    out = ["<table><tr>", *(f"<th>{esc(t)}</th>" for t in titles), "</tr>"]
    for name in names:
        cells = [f"{data['counts'][s].get(name, 0):,}" for s in splits] + [f"{made.get(name, 0):,}"]
        cells += [f"{recall[name][what]:.0%}" if name in recall else "–" for what in ("samples", "real")]
        out += [f"<tr><td>{esc(name or 'no label')}</td>", *(f"<td>{c}</td>" for c in cells), "</tr>"]
    lesions = [f"<td>{data['lesions'].get(s, 0):,}</td>" for s in splits]
    out += ["<tr><td>lesions</td>", *lesions, "<td></td><td></td><td></td></tr></table>"]
    listed = "; ".join(f"{name or 'not stated'}: {n:,}" for name, n in data["licences"].items())
    thanks = "; ".join(name for name in list(data["attributions"])[:10] if name)
    said = f"No lesion is in two splits. {data['rejected']:,} images or rows were rejected. Licences: {listed}."
    said += f" Attribution: {thanks}." if thanks else ""
    return "".join(out) + f"<p class='note'>{esc(said)}</p>"


def esc(text: object) -> str:
    return html.escape(str(text))


def _titled(title: str, note: str = "") -> str:
    return f"<h2>{esc(title)}</h2>" + (f"<p class='note'>{esc(note)}</p>" if note else "")


def _picture(content: bytes, alt: str, kind: str = "png", look: str = "wide") -> str:
    data = base64.b64encode(content).decode()
    return f"<img class='{look}' alt='{esc(alt)}' src='data:image/{kind};base64,{data}'>"


def _strip(strip_CHW: torch.Tensor | None) -> str:
    """As JPEG: a page of photographs in PNG is too large to send."""
    if strip_CHW is None:
        return "<span class='note'>none</span>"
    picture = Image.open(io.BytesIO(images.png(strip_CHW)))
    return _picture(images.encode(picture, "jpg", 90), "images of one class", "jpeg")


def _figure(width: float, height: float, rows: int = 1, columns: int = 1):
    from matplotlib.figure import Figure  # no pyplot: no windows, no global state

    figure = Figure((width, height), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def curves(stages: dict[str, list[dict]]) -> bytes | None:
    """Training beside held-out, classes in thin lines, one panel each, from the lines of each stage's metrics.jsonl. None
    without any."""
    panels = [("tokenizer", "PSNR in dB", "train/psnr", "val/psnr")]
    panels += [("tokenizer", "mean squared error, images in [-1, 1]", "train/reconstruction", "val/mse")]
    keys = sorted({k for row in stages.get("tokenizer", []) for k in row})
    for what, title in (("usage", "share of codes used"), ("perplexity", "perplexity of codes")):
        levels = sorted({k.split("/")[2] for k in keys if f"/{what}/" in k})
        panels += [("tokenizer", f"{title}: {v}", f"train/{what}/{v}", f"val/{what}/{v}") for v in levels]
    for name in stages:
        if name.startswith("prior-"):
            title = f"bits per token: {name.removeprefix('prior-')}"
            shown = ("train/bits_per_token", "val/bits_per_token", "val/bigram_bits", "val/train_bits_per_token")
            panels += [(name, title, *shown)]
    panels = [p for p in panels if any(p[2] in row or p[3] in row for row in stages.get(p[0], []))]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _figure(11 if columns == 3 else 5.2 * columns, (2.7 if columns > 1 else 3.6) * rows, rows, columns)
    for axis, (stage, title, *lines) in zip(axes, panels, strict=False):
        shown = [(key, *look, 1.4) for key, look in zip(lines, LOOKS, strict=False)]
        classes = sorted({key for row in stages[stage] for key in row if key.startswith(f"{lines[1]}/")})
        shown += [(key, f"C{i % 10}", key.rpartition("/")[2], ".-", 0.6) for i, key in enumerate(classes)]
        for key, colour, label, style, width in shown:
            points = [(row["samples"], row[key]) for row in stages[stage] if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=width, markersize=4 * width)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=6 if classes else 8, frameon=False, ncols=2 if classes else 1)
        axis.tick_params(labelsize=8)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return _png(figure)


def confusion(fidelity: dict, classes: list[str]) -> bytes | None:
    """Shares of the classes seen in the samples of each class."""
    if fidelity["ratio"] is None:
        return None
    asked = [i for i, row in enumerate(fidelity["confusion"]) if sum(row)]
    share = [[n / sum(fidelity["confusion"][i]) for n in fidelity["confusion"][i]] for i in asked]
    figure, (axis,) = _figure(5.2, 1.6 + 0.42 * len(asked))
    axis.grid(False)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(share):
        for x, value in enumerate(row):
            if value >= 0.005 and len(classes) <= 12:
                axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8, color="w" if value > 0.5 else "k")
    axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(asked)), [classes[i] for i in asked], fontsize=8)
    return _png(figure)


def histogram(samples: list[float], held_out: list[float], threshold: float) -> bytes:
    """Distances of samples and held-out images to their nearest training image, and where copies begin."""
    figure, (axis,) = _figure(5.2, 3.6)
    top = sorted(samples + held_out)[int(0.995 * (len(samples) + len(held_out) - 1))]
    bins = [top * i / 40 for i in range(41)]
    for values, label, colour in ((held_out, "held-out images", HELD_OUT), (samples, "samples", TRAIN)):
        weights = [100 / len(values)] * len(values)
        axis.hist([min(v, top) for v in values], bins, weights=weights, alpha=0.55, color=colour, label=label)
    axis.axvline(threshold, color="#d0413b", linestyle="--", linewidth=1.2, label="copies lie left of this")
    axis.set_xlabel("distance to the nearest training image", fontsize=9)
    axis.set_ylabel("share in %", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8, frameon=False)
    return _png(figure)
