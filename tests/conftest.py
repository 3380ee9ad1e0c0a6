"""Fixtures of all tests: phantom images, a run with packed shards, and pools of rank processes."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # ranks do not compete for cores, and sums round alike on every machine
os.environ.pop("MLFLOW_TRACKING_URI", None)
if not os.environ.get("LESIONGEN_TEST_GPU"):  # the tests run on the CPU, also on a machine with GPUs; those marked gpu need it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from pathlib import Path

import pytest

from tests import reliability
from tests.ranks import Ranks

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items):
    """Skips the tests marked gpu unless LESIONGEN_TEST_GPU is set and there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU and LESIONGEN_TEST_GPU=1"))


def pytest_terminal_summary(terminalreporter, config):
    """Prints the table of faults if the tests of faults were asked for by their folder."""
    if not any("faults" in argument for argument in config.args):
        return
    outcomes: dict[str, set[str]] = {}
    for word in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(word, ()):
            outcomes.setdefault(report.nodeid.partition("::")[2].partition("[")[0], set()).add(word)
    terminalreporter.section("faults (docs/reliability.md)")
    for line in reliability.summary(outcomes):
        terminalreporter.line(line)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """Returns a folder with images/ and metadata.csv: 7 classes with 12 lesions each, 48 px."""
    from lesiongen.ingest import phantom

    folder = tmp_path_factory.mktemp("phantoms")
    phantom.write(folder, lesions_per_class=12, size=48, progress=False)
    return folder


@pytest.fixture(scope="session")
def real_images() -> Path:
    """Returns the folder of real images. Skips the test if this machine does not have it."""
    if not SHARED.exists():
        pytest.skip("the real images are not on this machine")
    return SHARED


def tiny(phantoms: Path, runs: Path, **more) -> list[str]:
    """Returns overrides with which a run of the demo's config takes seconds: images of 32 px, code grids of 8×8 and 4×4."""
    settings = {
        "name": "tiny",
        "runs": runs,
        "data.images": phantoms / "images",
        "data.metadata": phantoms / "metadata.csv",
        "data.size": 32,
        "data.val": 0.2,
        "data.test": 0.2,
        "data.shard_samples": 30,
        "data.workers": 0,
        "tokenizer.model.hidden": 16,
        "tokenizer.model.residual_hidden": 8,
        "tokenizer.model.residual_layers": 1,
        "tokenizer.model.dim": 8,
        "tokenizer.model.entries": 32,
        "tokenizer.train.samples": 320,
        "tokenizer.train.batch": 16,
        "tokenizer.train.log_every": 16,
        "tokenizer.train.eval_every": 160,
        "tokenizer.train.save_every": 80,
        "encode.draws": 2,
        "sample.number": 14,
        "sample.batch": 7,
        "evaluate.features.backbone": "lesions",
        "evaluate.classifier_samples": 320,
        "evaluate.utility.seeds": 1,
        "evaluate.utility.sizes": "[10]",
    }
    for level in ("top", "bottom"):
        settings |= {
            f"priors.{level}.model.layers": 2,
            f"priors.{level}.model.heads": 2,
            f"priors.{level}.model.width": 32,
            f"priors.{level}.train.samples": 160,
            f"priors.{level}.train.batch": 16,
            f"priors.{level}.train.log_every": 16,
            f"priors.{level}.train.eval_every": 80,
            f"priors.{level}.train.save_every": 80,
        }
    return [f"{k}={v}" for k, v in (settings | more).items()]


@pytest.fixture(scope="session")
def pools():
    """pools(world) returns `world` rank processes. All tests share them; they are started again after a failure."""
    started: dict[int, Ranks] = {}

    def get(world: int) -> Ranks:
        if world not in started or not all(p.is_alive() for p in started[world].processes):
            started[world] = Ranks(world)
        return started[world]

    yield get
    for ranks in started.values():
        ranks.close()


DEMO = str(Path(__file__).parent.parent / "configs" / "demo.yaml")


@pytest.fixture(scope="session")
def packed(phantoms, tmp_path_factory) -> Path:
    """Returns a run directory in which only the pack stage has run."""
    from launch.__main__ import main

    runs = tmp_path_factory.mktemp("packed")
    assert main(["pack", DEMO, *tiny(phantoms, runs)]) == 0
    return runs / "tiny"
