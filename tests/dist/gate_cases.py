"""What each rank does in tests/chain/test_gate.py. Every function runs on every rank of a pool."""

from pathlib import Path

import numpy as np

from hpc.data.codestore import CodeStore
from hpc.dist import Topology
from lesiongen import experiment
from lesiongen.evaluation.privacy.nearest import nearest_views
from lesiongen.evaluation.privacy.views import TrainingViews, training_views
from lesiongen.stages import sample
from lesiongen.stages.base import digest_of
from lesiongen.tokenizers.export import load_tokenizer


def views_of(run: str, topology: Topology, backbone=None) -> TrainingViews:
    """Returns the training views of a run."""
    config = experiment.load(f"{run}/config.yaml")
    net, _ = load_tokenizer(Path(run) / "tokenizer", topology.device)
    store = CodeStore(Path(run) / "codes")
    return training_views(Path(run), store, net, digest_of(config, "tokenizer"), backbone, topology)


def nearest(topology: Topology, run: str) -> dict[str, tuple[np.ndarray, ...]]:
    """Compares the held-out images with the training views."""
    views = views_of(run, topology)
    found = nearest_views(views, views.held_out(0)[0], topology)
    return {kind: (f.distance, f.row, f.form) for kind, f in found.items()}


def gated(topology: Topology, run: str, folder: str, overrides: list[str]) -> str:
    """Samples into a folder. Returns the digest."""
    config = experiment.load(f"{run}/config.yaml", overrides)
    return sample.run(config, topology, Path(folder))
