"""configs/gpu: each config loads, says what it is for, and fits the GPUs that it names."""

import re
from pathlib import Path

import pytest

from launch.cost import format_cost
from lesiongen import experiment

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "gpu").glob("*.yaml"))
MARGIN = 0.8  # share of the memory that the computed peak may take: kernels' scratch and the allocator come on top


def hardware(path: Path) -> tuple[int, int]:
    """(GPUs, GB of memory of one) as the header says."""
    number, memory = re.search(r"# Hardware: (\d+) GPUs? of (\d+) GB", path.read_text()).groups()
    return int(number), int(memory)


def load(path: Path) -> experiment.Experiment:
    return experiment.load(str(path), [f"local.ranks={hardware(path)[0]}"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_loads_and_says_what_it_is_for(path):
    config, text = load(path), path.read_text()
    assert config.name == path.stem
    assert all(word in text.split("name:")[0] for word in ("# What:", "# Command:", "# Hardware:", "# Expect:"))
    assert f"configs/gpu/{path.name}" in text


@pytest.mark.long
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_fits_the_gpus_that_it_names(path):
    """The row of each training's own ZeRO stage is marked by an arrow; its last cell is the total in GiB."""
    totals = [float(line.split()[-1]) for line in format_cost(load(path)).splitlines() if "→ ZeRO" in line]
    assert len(totals) == 3
    assert max(totals) * 2**30 < MARGIN * hardware(path)[1] * 1e9, totals
