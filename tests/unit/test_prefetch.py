"""Batches on the device: their order, their nested tensors, and what is passed on unchanged."""

import pytest
import torch

from hpc.train.prefetch import on_device


def batches(number: int) -> list[dict]:
    return [
        {"image": torch.full((2, 3), i, dtype=torch.uint8), "upper": [torch.tensor([i]), torch.tensor([-i])], "key": [f"k{i}"]}
        for i in range(number)
    ]


@pytest.mark.parametrize("number", [0, 1, 2, 5])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_batch_arrives_in_order(number, device):
    found = list(on_device(iter(batches(number)), torch.device(device)))
    assert [batch["key"] for batch in found] == [batch["key"] for batch in batches(number)]
    for batch, expected in zip(found, batches(number), strict=True):
        assert batch["image"].device.type == device
        assert torch.equal(batch["image"].cpu(), expected["image"])
        assert [t.item() for t in batch["upper"]] == [t.item() for t in expected["upper"]]


def test_batches_are_read_when_they_are_asked_for():
    """On the CPU nothing is read ahead: the stream's reads would only delay the step."""
    read = []
    stream = on_device((read.append(i) or batch for i, batch in enumerate(batches(3))), torch.device("cpu"))
    next(stream)
    assert read == [0]
