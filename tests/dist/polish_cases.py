"""What each rank does in test_polish.py. Every function runs on every rank of a pool."""

import json
from pathlib import Path

from lesiongen import experiment
from lesiongen.stages import base, stages
from tests.conftest import DEMO


def polish(topology, overrides: list[str]) -> tuple[str, list[dict], Path]:
    """Polishes the decoder of a run's tokenizer. Returns the digest of the export, the rows of the log, and the export."""
    config = experiment.load(DEMO, overrides)
    base.execute(config, stages(config)["polish"], topology)
    folder = Path(config.directory) / "polish"
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    return base.digest_of(config, "polish"), [json.loads(row) for row in rows], folder / "export"
