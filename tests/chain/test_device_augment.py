"""Training with the augmentation on the device: from padded batches, and from decoded images that stay on the device."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.__main__ import main
from lesiongen import experiment
from lesiongen.data.packed import Packed
from lesiongen.data.resident import ResidentImages, load_if_small
from lesiongen.stages.tokenizer import TokenizerTask
from tests.conftest import DEMO, tiny

CPU = torch.device("cpu")


def task_of(packed: Path, **data) -> TokenizerTask:
    config = experiment.load(f"{packed}/config.yaml")
    config = replace(config, data=replace(config.data, workers=0, **data))
    return TokenizerTask(config, Packed([packed / "shards"]), packed / "unused", CPU)


def batches(task: TokenizerTask, number: int = 3) -> list[dict]:
    stream = task.stream(32, 8)
    return [task.finish(next(stream)) for _ in range(number)]


def test_the_device_shows_what_the_workers_show(packed):
    for mine, other in zip(batches(task_of(packed, augment_on="device")), batches(task_of(packed)), strict=True):
        assert mine["key"] == other["key"]
        assert all(torch.equal(mine[name], other[name]) for name in ("position", "label"))
        assert mine["image"].shape == other["image"].shape and mine["image"].dtype == torch.uint8
        assert (mine["image"].int() - other["image"].int()).abs().float().mean() < 4


def test_resident_images_are_the_streamed_ones(packed):
    streamed, resident = task_of(packed, augment_on="device"), task_of(packed, augment_on="device")
    resident.images.resident = ResidentImages(resident.data, CPU)
    for mine, other in zip(batches(resident), batches(streamed), strict=True):
        assert mine["key"] == other["key"]
        assert all(torch.equal(mine[name], other[name]) for name in ("slot", "label"))
        # Padding to another size changes the rounding of coordinates, not what is seen.
        assert (mine["image"].int() - other["image"].int()).abs().max() <= 1


def test_only_a_gpu_holds_the_images(packed):
    assert load_if_small(task_of(packed).data, CPU) is None


@pytest.mark.gpu
def test_a_gpu_holds_the_images(packed):
    found = load_if_small(task_of(packed).data, torch.device("cuda"))
    assert found.pixels.device.type == "cuda" and len(found.pixels) == len(found.keys)


def test_a_training_augments_on_the_device_and_resumes(phantoms, tmp_path, packed):
    more = {"inputs.shards": f"[{packed / 'shards'}]", "data.augment_on": "device", "tokenizer.augment.noise": 0.02}
    command = ["train", "tokenizer", DEMO, *tiny(phantoms, tmp_path, **more)]
    assert main([*command, "tokenizer.train.samples=160"]) == 0
    stage = tmp_path / "tiny" / "tokenizer" / "stage.json"
    first = json.loads(stage.read_text())["digest"]
    assert main([*command, "tokenizer.train.samples=320"]) == 0
    assert json.loads(stage.read_text())["digest"] != first
    assert main([*command, "tokenizer.train.samples=320", "data.augment_on=workers"]) == 0, "where it runs is not the identity"
