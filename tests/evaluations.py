"""A complete metrics.json of schema 2, and pictures of drawn lesions, for tests of the report. The numbers are made up."""

import copy

import torch

from lesiongen.data import images
from lesiongen.evaluation import plots
from lesiongen.evaluation.report import NearestPair, Strips, charts
from lesiongen.ingest import phantom

LABELS = {"akiec": 330, "bcc": 510, "bkl": 1100, "df": 115, "mel": 1110, "nv": 6700, "vasc": 140}  # images of HAM10000


def fig(value: float, low: float, high: float) -> dict:
    """Returns a figure."""
    return {"value": value, "low": low, "high": high}


def near(value: float, part: float = 0.1) -> dict:
    """Returns a figure whose interval is a share of its value to both sides."""
    return fig(value, value * (1 - part), value * (1 + part))


def complete() -> dict:
    """Returns metrics of a good, clean run with every part, on HAM10000's classes."""
    return {
        "schema": 2,
        "made": made(),
        "tokenizer": tokenizer(),
        "priors": {
            "top": {"bits_per_token": 4.9, "train_bits_per_token": 4.8, "bigram_bits": 5.9, "uniform_bits": 8.0},
            "bottom": {"bits_per_token": 5.6, "train_bits_per_token": 5.5, "bigram_bits": 6.8, "uniform_bits": 8.0},
        },
        "likeness": likeness(),
        "classifier": classifier(),
        "diversity": {
            "all": {"real": near(9.1), "reconstructions": near(8.9), "samples": near(8.8), "ratio": fig(0.97, 0.93, 1.01)},
            "classes": {name: {"real": near(9), "samples": near(8.7), "ratio": fig(0.97, 0.88, 1.07)} for name in LABELS},
            "reason": None,
        },
        "utility": utility(),
        "privacy": privacy(),
        "gate": gate(),
        "fairness": fairness(),
        "data": data(),
    }


def made() -> dict:
    return {
        "name": "ham10000",
        "date": "2026-01-31T09:30:00",
        "commit": "0123abcd" * 5,
        "version": "0.1.0",
        "command": "lesiongen evaluate configs/ham10000-cpu.yaml data.images=ham10000/images data.metadata=ham10000/metadata",
        "seed": 0,
        "guidance": {"top": 2.0, "bottom": 1.0},
        "temperature": 1.0,
        "top_k": None,
        "top_p": 0.95,
        "number": 1008,
        "gate": True,
        "config": {"name": "ham10000", "data": {"size": 64, "images": "ham10000/images"}, "levels": ["top", "bottom"]},
        "digests": {name: f"{i}f" * 32 for i, name in enumerate(("shards", "tokenizer", "codes", "prior-top", "samples"))},
        "backbone": "imagenet: EfficientNet-Lite0",
        "backbone_digest": "57934424" * 8,
    }


def tokenizer() -> dict:
    found = {"psnr": 27.31, "ssim": 0.823, "nmse": 0.0131, "floor_psnr": 15.2, "entries": 512}
    for level, used, perplexity in (("top", 0.97, 301.0), ("bottom", 0.99, 352.0)):
        found |= {
            f"usage/{level}": used,
            f"perplexity/{level}": perplexity,
            f"usage/{level}/mel": used,
            f"collapsed/{level}": 0.0,
        }
    return found


def likeness() -> dict:
    kids = {
        "floor": fig(0.4, 0.1, 0.9),
        "tokenizer": fig(0.9, 0.7, 1.1),
        "prior": fig(0.4, 0.3, 0.5),
        "both": fig(1.2, 0.9, 1.6),
    }
    factors = {"floor": 1.0, "tokenizer": 0.96, "prior": 0.97, "both": 0.93}

    def pairs(scale: float) -> dict:
        found = {}
        for pair, factor in factors.items():
            shares = {key: near(0.86 * factor, 0.03) for key in ("precision", "recall", "coverage")}
            distances = {"kid": {k: v * scale for k, v in kids[pair].items()}, "frechet": near(12 * scale / factor)}
            found[pair] = distances | shares | {"density": fig(1.03 * factor, 0.94, 1.09), "number": 1000}
        return found

    about = "features of a network trained on photographs of everyday things (ImageNet)"
    classes = {name: pairs(1.3) for name in ("bkl", "mel", "nv")}
    rulers = {"imagenet": {"about": about, "all": pairs(1.0), "classes": classes}}
    rulers["lesions"] = {"about": "features of a classifier trained on lesions alone", "all": pairs(0.7), "classes": {}}
    return {"number": 1000, "mix": {name: 143 for name in LABELS}, "rulers": rulers}


def classifier() -> dict:
    names, confusion = list(LABELS), []
    for i in range(7):
        row = [2] * 7
        row[i] = 120
        row[5] += 12
        confusion.append(row)
    sources = {"real": 0.80, "reconstructions": 0.78, "samples": 0.79}
    recall = {name: {source: near(value, 0.04) | {"number": 144} for source, value in sources.items()} for name in names}
    return {
        "about": "A network of ImageNet was trained further on the training images (128 px)",
        "chance": 1 / 7,
        "reason": None,
        "balanced_accuracy": {source: fig(value, value - 0.02, value + 0.02) for source, value in sources.items()},
        "recall": recall,
        "confusion": confusion,
        "classes": names,
        "flips": fig(0.07, 0.06, 0.085),
    }


def utility() -> dict:
    sizes = [10, 30, 100]

    def entry(value: float, number: int) -> dict:
        classes = {name: {"recall": near(value), "auprc": near(value - 0.06)} for name in LABELS}
        return {"balanced_accuracy": near(value, 0.04), "auprc": near(value - 0.05, 0.05), "classes": classes, "images": number}

    starts = {"real": 0.5, "augmented": 0.53, "mixed": 0.6}
    arms = {"synthetic": {"all": entry(0.70, 1008)}}
    for arm, start in starts.items():
        arms[arm] = {str(size): entry(start + 0.08 * i, 7 * size) for i, size in enumerate(sizes)}
    gains = {str(size): {"balanced_accuracy": fig(0.05, 0.02, 0.08), "auprc": fig(0.04, 0.01, 0.07)} for size in sizes}
    return {
        "method": "probe",
        "seeds": 5,
        "test": {"images": 1021, "lesions": 747} | dict(LABELS),
        "sizes": sizes,
        "arms": arms,
        "gain": gains,
        "gain_over_real": copy.deepcopy(gains),
        "chance": 1 / 7,
    }


def privacy() -> dict:
    kinds = {}
    for kind, scale in (("pixels", 0.05), ("features", 4.0), ("codes top", 0.6), ("codes bottom", 0.8)):
        kinds[kind] = {
            "threshold": scale,
            "rate": fig(0.006, 0.003, 0.013),
            "copies": 6,
            "number": 1008,
            "held_out_rate": fig(0.01, 0.006, 0.015),
            "median": 2.1 * scale,
            "least": 0.7 * scale,
            "held_out_median": 2.0 * scale,
            "held_out_least": 0.75 * scale,
        }
    any_kind = {"copies": 19, "number": 1008, "rate": fig(0.019, 0.012, 0.029), "held_out_rate": fig(0.03, 0.023, 0.039)}
    names = [f"{kind} {level}" for kind in ("likelihood", "contrast", "reference") for level in ("top", "bottom", "all")]
    return {
        "copies": {"views": 63_040, "draws": 8, "held_out": 2000, "kinds": kinds, "any": any_kind},
        "membership": {
            "members": 1000,
            "non_members": 1000,
            "how": "Both sides are test-like: the same augmentation draws, one image of each lesion",
            "scores": {name: {"auc": fig(0.51, 0.48, 0.54), "tpr_at_1_fpr": fig(0.012, 0.004, 0.025)} for name in names},
        },
        "extraction": {
            "prompt": 64,
            "completed": 192,
            "level": "top",
            "members": 500,
            "non_members": 500,
            "accuracy": {"members": fig(0.31, 0.30, 0.32), "non_members": fig(0.305, 0.295, 0.315)},
            "gain": fig(0.005, -0.009, 0.019),
            "auc": fig(0.51, 0.47, 0.55),
            "exact": {"members": 0, "non_members": 0},
        },
    }


def gate() -> dict:
    before = {"copies": {kind: fig(0.008, 0.004, 0.015) for kind in ("pixels", "features")}, "balanced_accuracy": near(0.78)}
    after = {"copies": {kind: fig(0.0, 0.0, 0.004) for kind in ("pixels", "features")}, "balanced_accuracy": near(0.79)}
    return {
        "rules": {"nearest": 0.01, "unlikely": 0.01},
        "candidates": 1033,
        "rejected": 25,
        "reasons": {"too near in pixels": 8, "too near in features": 8, "unlikely": 9},
        "replaced": 25,
        "given_up": 0,
        "before": before,
        "after": after,
    }


def fairness() -> dict:
    def group(share: float, samples: float | None = 0.1) -> dict:
        sides = {"train": share, "held_out": share, "samples": samples}
        return sides | {"psnr": near(27, 0.01), "recall": near(0.79, 0.05), "bits": near(5.2, 0.02)}

    return {
        "slices": {
            "site": {"back": group(0.22), "lower extremity": group(0.21), "unknown": group(0.02, None)},
            "sex": {"female": group(0.45, 0.44), "male": group(0.54, 0.55)},
            "age_band": {"0-29": group(0.08), "30-59": group(0.55), "60-": group(0.37)},
            "skin_tone": {"light": group(0.81), "tan": group(0.02) | {"recall": None}},
        },
        "note": "Skin tone is estimated from the pixels around the lesion, which dermoscopy shows badly (arXiv:2602.10265).",
    }


def data() -> dict:
    return {
        "size": 64,
        "channels": 3,
        "counts": {
            split: {name: int(number * share) for name, number in LABELS.items()}
            for split, share in (("train", 0.8), ("val", 0.1), ("test", 0.1))
        },
        "lesions": {"train": 5976, "val": 747, "test": 747},
        "groups": {"train": 5976, "val": 747, "test": 747},
        "sets": [],
        "rejected": 3,
        "generated": {name: 144 for name in LABELS},
        "licences": {"CC-BY-NC": 8005},
        "attributions": {"ViDIR Group, Department of Dermatology, Medical University of Vienna": 8005},
        "sources": {"HAM10000": 8005},
        "lesions_in_two_splits": 0,
    }


def drawn(label: str, lesion: int, size: int = 96) -> torch.Tensor:
    """Returns a drawn lesion, uint8 [3, size, size]."""
    return torch.from_numpy(phantom.draw(label, lesion, 0, size).copy()).permute(2, 0, 1)


def shown() -> tuple[dict[str, bytes], Strips, list[NearestPair]]:
    """Returns the pictures, strips and pairs of a page. Lesions from number 100 on stand for real images."""
    rng = torch.Generator().manual_seed(0)
    pictures = {}
    for kind, about in privacy()["copies"]["kinds"].items():
        both = [about["threshold"] * (1.2 + torch.rand(n, generator=rng) * 1.9) for n in (1008, 2000)]
        pictures[f"distances {kind}"] = charts.histogram(*(side.tolist() for side in both), about["threshold"])
    strips: Strips = {}
    for label in LABELS:
        sides = [torch.stack([drawn(label, first + i) for i in range(8)]) for first in (0, 100)]
        strips[label] = (images.tile_images(sides[0], 8), images.tile_images(sides[1], 8))
    strips["df"] = (strips["df"][0], None)
    real = torch.stack([drawn(label, 100) for label in (*LABELS, "nv")])
    pictures["reconstructions"] = images.encode_png(images.tile_images(torch.cat([real, real // 2 + 60]), 8))
    rows = [
        {
            "samples": 1000 * i,
            "train/psnr": 20 + i,
            "val/psnr": 19.5 + i,
            "train/bits_per_token": 7 - i / 9,
            "val/bits_per_token": 7 - i / 10,
        }
        for i in range(9)
    ]
    pictures["curves"] = plots.curves({"tokenizer": rows, "prior-top": rows, "prior-bottom": rows})
    distances = {"pixels": 0.04, "features": 4.4, "codes top": 0.61}
    pairs = [
        NearestPair(drawn("nv", i), drawn("nv", 100 + i), {k: v * (1 + i / 20) for k, v in distances.items()}) for i in range(8)
    ]
    return pictures, strips, pairs
