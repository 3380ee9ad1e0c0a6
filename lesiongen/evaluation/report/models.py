"""The section of the models: quality of the tokenizer, bits of the priors, and their learning curves."""

from lesiongen.evaluation.report import markup
from lesiongen.evaluation.report.markup import Html
from lesiongen.evaluation.report.readings import why_missing
from lesiongen.evaluation.report.words import decimals


def models(metrics: dict, pictures: dict[str, bytes], share: bool) -> Html:
    """Returns the section.

    Args:
        metrics: The content of metrics.json.
        pictures: PNG bytes: "reconstructions" (real images, and below each its reconstruction) and "curves".
        share: Whether to leave out real images.
    """
    parts = [*_tokenizer(metrics.get("tokenizer"), list(metrics.get("priors") or {}))]
    if share:
        text = "The picture of reconstructions shows real images. It is in the private copy of this report."
        parts.append(markup.paragraph(text))
    elif "reconstructions" in pictures:
        alt = "Two rows: eight real test images, and below each its reconstruction by the tokenizer"
        caption = "Test images (above) and their reconstructions (below). Samples cannot be sharper than these."
        parts.append(markup.chart(pictures["reconstructions"], alt, caption, wide=True))
    parts += _priors(metrics.get("priors"))
    parts.append(markup.heading("Learning curves"))
    if "curves" in pictures:
        alt = (
            "Panels of curves over training, one for each figure of the tokenizer and the priors: training and held-out images"
        )
        caption = "The horizontal axis counts the training images seen. "
        caption += "Where the held-out curve leaves the training curve, the model memorises."
        parts.append(markup.chart(pictures["curves"], alt, caption, wide=True))
    else:
        parts.append(markup.not_measured("The logs of training hold no curves"))
    return markup.section("models", "The tokenizer and the priors", *parts)


def _tokenizer(found: dict | None, levels: list[str]) -> list[Html]:
    title = markup.heading("Tokenizer")
    if reason := why_missing(found):
        return [title, markup.not_measured(reason)]
    names = ["PSNR", "SSIM", "NMSE", "Codebook", "Perplexity"]
    rows = [
        [
            "PSNR",
            decimals(found.get("psnr"), 2, " dB"),
            f"{decimals(found.get('floor_psnr'), 2, ' dB')} if all pixels have one colour",
        ],
        ["SSIM", decimals(found.get("ssim"), 3), "1 for equal images"],
        ["NMSE", decimals(found.get("nmse"), 4), "1 if all pixels have one colour"],
    ]
    if "psnr_before_polish" in found:
        rows[0][2] += f"; {decimals(found['psnr_before_polish'], 2, ' dB')} before the decoder was polished"
        rows[1][2] += f"; {decimals(found['ssim_before_polish'], 3)} before the decoder was polished"
    for level in (level for level in levels if f"usage/{level}" in found):
        compared = f"perplexity {decimals(found.get(f'perplexity/{level}'), 0)} of at most {found['entries']:,}"
        rows.append([f"Codebook of level {level}", f"{found[f'usage/{level}'] * 100:.0f} % used", compared])
    note = "The tokenizer turns an image into codes and back. It was judged on test images."
    table = markup.table("Quality of reconstructions", ["Figure", "Value", "For comparison"], rows)
    return [title, markup.paragraph(note), markup.terms(*names), table]


def _priors(found: dict | None) -> list[Html]:
    title = markup.heading("Priors")
    if reason := why_missing(found):
        return [title, markup.not_measured(reason)]
    keys = ("bits_per_token", "train_bits_per_token", "bigram_bits", "uniform_bits")
    rows = [[level, *(decimals(bits.get(key), 3) for key in keys)] for level, bits in found.items()]
    head = ["Level", "Held-out images", "Training images", "Bigram", "Uniform guess"]
    note = (
        "Priors invent the codes of a new image, level by level. If training images need far fewer bits, the prior memorises."
    )
    parts = [title, markup.paragraph(note), markup.terms("Bits per token", "Bigram")]
    return [*parts, markup.table("Bits per token", head, rows)]
