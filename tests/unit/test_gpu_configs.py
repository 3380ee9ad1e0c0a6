"""configs/gpu: each config loads, says what it is for, and fits the GPUs that it names."""

import re
from pathlib import Path

import pytest

from launch.cost_table import format_cost
from lesiongen import experiment

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "gpu").glob("*.yaml"))


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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_fits_the_machines_that_it_names(path):
    """The header, the section `hardware` and the plan speak of the same machines."""
    config = load(path)
    number, memory = hardware(path)
    assert config.hardware.nodes * config.hardware.gpus == number
    text = format_cost(config)
    assert f"of {memory} GB" in text.splitlines()[0]
    assert "it fits" in text and "DOES NOT FIT" not in text
    hours = float(re.search(r"all trainings: ([\d.]+) hours", text).group(1))
    assert 0.05 < hours < 0.2 if path.stem.startswith("short") else hours > 0.5
