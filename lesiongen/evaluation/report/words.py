"""Words of the report: diagnoses spelled out, terms explained, and numbers with their intervals as text."""

from collections.abc import Callable

from lesiongen.evaluation.intervals import Figure

DIAGNOSES = {
    "ack": "actinic keratosis",
    "ak": "actinic keratosis",
    "akiec": "actinic keratosis / intraepithelial carcinoma",
    "bcc": "basal cell carcinoma",
    "ben_oth": "other benign proliferation",
    "bkl": "benign keratosis",
    "df": "dermatofibroma",
    "inf": "inflammatory or infectious condition",
    "mal_oth": "other malignant proliferation",
    "mel": "melanoma",
    "nev": "melanocytic naevus",
    "nv": "melanocytic naevus",
    "scc": "squamous cell carcinoma",
    "sccka": "squamous cell carcinoma / keratoacanthoma",
    "sek": "seborrhoeic keratosis",
    "vasc": "vascular lesion",
}
TERMS = {
    "95 % interval": "the range in which the true value lies in 95 of 100 such measurements; a wide range means few images.",
    "KID": "kernel inception distance: how far two sets of images are apart in features of a network; lower is better, about 0 "
    "for two sets of one kind. Shown × 1000.",
    "Fréchet distance": "another distance of two sets of images, as in FID; lower is better, and it grows when images are few.",
    "Precision": "the share of the judged images that lie where real images lie; 0 to 1, higher is better.",
    "Recall": "the share of real images that lie where the judged images lie: low if kinds of lesions are missing; 0 to 1.",
    "Density": "how densely real images surround the judged images; about 1 for real images. Values above 1 may be noise.",
    "Coverage": "the share of real images that have a judged image close by; 0 to 1, higher is better.",
    "Balanced accuracy": "the mean over the classes of the share of images that are labelled right, so that rare classes count "
    "as much as common ones.",
    "Chance": "the balanced accuracy of guessing.",
    "Flips": "the share of held-out images whose reconstruction gets another label from the classifier than the image itself. "
    "A polished decoder is not told the image's label for it.",
    "Spread": "the mean distance of two images of a class in features of the main ruler. The ratio compares with real images.",
    "AUPRC": "area under the precision-recall curve: how well a class is found among all images; 0 to 1, higher is better.",
    "Copy": "a sample that is closer to a training image than 99 % of the held-out images are, relative to unseen images.",
    "AUC": "area under the curve: the chance that a training image scores higher than an image the model never saw; 0.5 is "
    "guessing, 1 is certainty.",
    "TPR at 1 % FPR": "the share of training images that are found if 1 % of the others are wrongly accused; 1 % is guessing.",
    "PSNR": "peak signal-to-noise ratio: how small the errors of the pixels are, in decibels; higher is better. "
    "A polished decoder is told the image's label for it.",
    "SSIM": "structural similarity of an image and its reconstruction; 1 for equal images.",
    "NMSE": "squared error over the variance of the data; 0 for equal images, 1 if all pixels have one colour.",
    "Codebook": "the list of patterns from which the tokenizer builds images.",
    "Perplexity": "how many codes are used if each counts by its frequency.",
    "Bits per token": "how many bits a prior needs for one code of an image; lower is better.",
    "Bits per image": "how many bits the priors need for all codes of an image; more bits mean a less expected image.",
    "Bigram": "a simple model that guesses each code from its left neighbour.",
    "ITA": "individual typology angle, a measure of skin tone from the pixels of an image; dermoscopy shows it badly.",
}
PAIRS = {
    "floor": ("Real vs real", "real training images against real held-out images: the floor, the best that can be expected"),
    "tokenizer": (
        "Reconstructions vs real",
        "reconstructions of training images against held-out images: the tokenizer's part",
    ),
    "prior": ("Samples vs reconstructions", "samples against reconstructions of held-out images: the prior's part"),
    "both": ("Samples vs real", "samples against real held-out images: both parts together"),
}
ARMS = {
    "synthetic": "Samples alone",
    "real": "Real images",
    "augmented": "Real images, augmented",
    "mixed": "Real images and samples",
}
SOURCES = {"real": "Real", "reconstructions": "Reconstructions", "samples": "Samples"}
FACTS = {"site": "body site", "sex": "sex", "age_band": "age", "skin_tone": "skin tone (ITA)"}


def diagnosis(name: str) -> str:
    """Returns a class as a clinician says it, with its abbreviation: "melanoma (mel)". Unknown names stay as they are."""
    known = DIAGNOSES.get(name.lower().replace(" ", "_"))
    return f"{known} ({name})" if known else name or "no label"


def kind_name(kind: str) -> str:
    """Returns a kind of copy in words: "codes top" → "codes of level top"."""
    first, _, level = kind.partition(" ")
    return f"{first} of level {level}" if level else first


def joined(names: list[str]) -> str:
    """Returns "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def percent(value: float) -> str:
    """Returns a share in percent, with one digit after the point where it is small."""
    text = f"{value * 100:.0f} %" if abs(value) >= 0.0995 or value == 0 else f"{value * 100:.1f} %"
    return text.replace("-", "−")


def decimals(value: float | None, digits: int, unit: str = "") -> str:
    """Returns a number with a fixed number of digits after the point. None is "not measured"."""
    return "not measured" if value is None else f"{value:,.{digits}f}{unit}".replace("-", "−")


def points(value: float) -> str:
    """Returns a difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f} points".replace("-", "−")


def number(value: float) -> str:
    """Returns a number with three significant digits, and thousands separated."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}".replace("-", "−")


def between_words(low: str, high: str) -> str:
    """Returns "low to high", with a unit that both have only once."""
    return f"{without_unit(low, high)} to {high}"


def without_unit(low: str, high: str) -> str:
    """Returns the text of a number without its unit if `high` has the same."""
    value, _, unit = low.partition(" ")
    return value if unit == high.partition(" ")[2] else low


def interval(figure: Figure | None, show: Callable[[float], str] = number) -> tuple[str, str]:
    """Returns a figure's value and its interval as text. What is None becomes "not measured" and "".

    Args:
        figure: The figure.
        show: `number`, `percent`, or another function of a float.
    """
    if figure is None or figure.get("value") is None:
        return "not measured", ""
    between = ""
    if figure.get("low") is not None and figure.get("high") is not None:
        between = between_words(show(figure["low"]), show(figure["high"]))
    return show(figure["value"]), between


def is_known(name: str) -> bool:
    """Returns whether a class is a diagnosis that the report can spell out."""
    return name.lower().replace(" ", "_") in DIAGNOSES
