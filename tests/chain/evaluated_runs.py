"""Small finished runs for the tests of the evaluate stage, copies of them, and a check of the schema of metrics.json."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import torch

from hpc.dist import Topology
from launch.__main__ import main
from lesiongen import experiment
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.stages import stages
from lesiongen.stages.base import execute
from tests.conftest import DEMO, tiny

# Enough test lesions and samples that every part is measured; everything is trained as briefly as possible.
SETTINGS = {
    "data.val": 0.15,
    "data.test": 0.4,
    "tokenizer.train.samples": 160,
    "tokenizer.train.save_every": 160,
    "sample.number": 28,
    "sample.batch": 14,
    "evaluate.classifier_samples": 320,
    "evaluate.fine_tuning_samples": 32,
    "evaluate.utility.sizes": "[5]",
} | {f"priors.{level}.train.{key}": 64 for level in ("top", "bottom") for key in ("samples", "eval_every", "save_every")}

FIGURE = {"value", "low", "high"}
PAIRS = {"floor", "tokenizer", "prior", "both"}
DISTANCES = {"kid", "frechet", "precision", "recall", "density", "coverage"}
SOURCES = {"real", "reconstructions", "samples"}


def overrides(images: Path, runs: Path, **changes) -> list[str]:
    """Returns the overrides of a small run."""
    return tiny(images, runs, **(SETTINGS | changes))


def finished(images: Path, runs: Path, **changes) -> Path:
    """Makes a run with all stages. Returns its directory."""
    assert main(["run", DEMO, *overrides(images, runs, **changes)]) == 0
    return runs / "tiny"


def copy_of(run: Path, folder: Path, cache: bool = True) -> Path:
    """Copies a run, with or without the cache of features, but without its report. Returns the copy's directory."""
    left_out = ["report", "mlflow*"] + ([] if cache else ["features"])
    return shutil.copytree(run, folder / "runs" / "tiny", ignore=shutil.ignore_patterns(*left_out))


def evaluate(run: Path, *changes: str) -> None:
    """Evaluates a run with its own config and these overrides, as a rank does, without MLflow. A started report continues."""
    config = experiment.load(run / "config.yaml", [f"runs={run.parent}", *changes])
    execute(config, stages(config)["report"], Topology())


def metrics_of(run: Path) -> dict:
    """Reads metrics.json of a run, which must be strict JSON."""
    return json.loads((run / "report" / "metrics.json").read_text(), parse_constant=_refuse)


def figures_of(run: Path) -> dict:
    """Returns all metrics of a run but how they were made."""
    return {key: part for key, part in metrics_of(run).items() if key != "made"}


def _refuse(constant: str) -> None:
    raise AssertionError(f"metrics.json holds {constant}")


def cache_of(run: Path) -> dict[str, int]:
    """Returns the times of change of the cache files of a run, by name."""
    return {str(p.relative_to(run)): p.stat().st_mtime_ns for p in run.rglob("features/*") if p.is_file()}


def real_rows(run: Path) -> list[bytes]:
    """Returns the middle row of pixels of each real image of a run, by which a picture that shows the image is known."""
    found = []
    for split in ("train", "val", "test"):
        for batch in ImageShards(Packed([run / "shards"]), split).held_out(64):
            found += [row_of(image) for image in batch["image"]]
    return found


def row_of(image_CHW: torch.Tensor) -> bytes:
    """Returns the bytes of the middle row of an image, channels last."""
    return np.ascontiguousarray(image_CHW[:, image_CHW.shape[1] // 2].numpy().T).tobytes()


def image_ids(run: Path) -> list[str]:
    """Returns the ids of all real images of a run."""
    return [row["image_id"] for row in Packed([run / "shards"]).catalog()]


def neighbours(run: Path) -> list[dict[str, str]]:
    """Reads private/neighbours.csv."""
    return list(csv.DictReader((run / "report" / "private" / "neighbours.csv").open()))


def is_figure(value: object) -> bool:
    """Returns whether a value is a figure whose interval holds its value."""
    if not isinstance(value, dict) or set(value) - {"number"} != FIGURE:
        return False
    low, middle, high = value["low"], value["value"], value["high"]
    return all(v is None or isinstance(v, float) for v in (low, middle, high)) and (low is None or low <= high)


def check_schema(found: dict) -> None:
    """Checks that metrics.json has every part in the form that the report expects, or the reason why it is not there."""
    parts = "schema made verdict tokenizer priors likeness classifier diversity utility privacy gate fairness data"
    assert set(found) == set(parts.split()) and found["schema"] == 2
    made = "name date commit version command seed guidance temperature top_k top_p number gate config digests backbone"
    assert set(found["made"]) == {*made.split(), "backbone_digest"}
    assert all(found["made"]["digests"].values()) and "samples" in found["made"]["digests"]
    assert found["verdict"]["overall"] in ("use", "caution", "do not share")
    for finding in found["verdict"]["findings"]:
        assert set(finding) == {"rule", "topic", "mark", "sentence"}
        assert finding["mark"] in ("good", "fair", "poor", "none") and finding["sentence"].endswith((".", "!", "?"))
    assert {"psnr", "ssim", "nmse", "floor_psnr", "entries"} <= set(found["tokenizer"])
    assert set(found["priors"]) == {"top", "bottom"}
    for by_level in found["priors"].values():
        assert {"bits_per_token", "train_bits_per_token", "bigram_bits", "uniform_bits"} <= set(by_level)
    _check_images(found)
    if not is_reason(found["utility"]):
        _check_utility(found["utility"])
    _check_privacy(found["privacy"])
    gate = "rules candidates rejected reasons replaced given_up before after"
    assert found["gate"] is None or set(found["gate"]) == set(gate.split())
    for slices in found["fairness"]["slices"].values():
        for about in slices.values():
            assert set(about) == {"train", "held_out", "samples", "psnr", "recall", "bits"}
            assert all(about[key] is None or is_figure(about[key]) for key in ("psnr", "recall", "bits"))
    data = "size channels counts lesions patients groups sets rejected generated licences attributions sources"
    assert set(found["data"]) == {*data.split(), "lesions_in_two_splits"}


def is_reason(part: dict) -> bool:
    """Returns whether a part says only why it was not measured."""
    return set(part) == {"reason"} and part["reason"][:1].isupper() and part["reason"].endswith(".")


def _check_images(found: dict) -> None:
    """Checks likeness, classifier and diversity."""
    likeness, classifier, diversity = found["likeness"], found["classifier"], found["diversity"]
    assert likeness["rulers"] and sum(likeness["mix"].values()) == likeness["number"]
    for ruler in likeness["rulers"].values():
        assert ruler["about"]
        for pairs in (ruler["all"], *ruler["classes"].values()):
            assert set(pairs) == PAIRS
            for figures in pairs.values():
                assert set(figures) == {*DISTANCES, "number"} and all(is_figure(figures[name]) for name in DISTANCES)
    keys = {"about", "chance", "reason", "balanced_accuracy", "recall", "confusion", "classes", "flips"}
    assert set(classifier) == keys and set(diversity) == {"all", "classes", "reason"}
    if classifier["reason"] is None:
        for by_source in (classifier["balanced_accuracy"], *classifier["recall"].values()):
            assert set(by_source) == SOURCES and all(map(is_figure, by_source.values()))
        assert len(classifier["confusion"]) == len(classifier["classes"]) and is_figure(classifier["flips"])
    if diversity["reason"] is None:
        for by_source in (diversity["all"], *diversity["classes"].values()):
            assert set(by_source) == {*SOURCES, "ratio"} and all(map(is_figure, by_source.values()))


def _check_utility(found: dict) -> None:
    sizes = [str(size) for size in found["sizes"]]
    assert set(found["arms"]) == {"synthetic", "real", "augmented", "mixed"}
    for arm, by_size in found["arms"].items():
        assert list(by_size) == (["all"] if arm == "synthetic" else sizes)
        for scores in by_size.values():
            assert set(scores) == {"balanced_accuracy", "auprc", "classes", "images"} and is_figure(scores["auprc"])
    assert list(found["gain"]) == list(found["gain_over_real"]) == sizes
    assert set(found["test"]) == {"images", "lesions", "classes"} and 0 < found["chance"] <= 0.5


def _check_privacy(found: dict) -> None:
    assert set(found) == {"copies", "membership", "extraction"}
    copies = found["copies"]
    assert set(copies) == {"views", "draws", "held_out", "kinds", "any"}
    assert set(copies["kinds"]) == {"pixels", "features", "codes top", "codes bottom"}
    keys = "threshold rate copies number held_out_rate median least held_out_median held_out_least"
    for kind in copies["kinds"].values():
        assert set(kind) == set(keys.split()) and is_figure(kind["rate"]) and is_figure(kind["held_out_rate"])
    assert set(copies["any"]) == {"copies", "number", "rate", "held_out_rate"}
    if not is_reason(found["membership"]):
        assert set(found["membership"]) == {"members", "non_members", "how", "scores"}
        for score in found["membership"]["scores"].values():
            assert set(score) == {"auc", "tpr_at_1_fpr"} and all(map(is_figure, score.values()))
    if not is_reason(found["extraction"]):
        keys = "prompt completed level members non_members accuracy gain auc exact"
        assert set(found["extraction"]) == set(keys.split()) and is_figure(found["extraction"]["gain"])
