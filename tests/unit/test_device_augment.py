"""Views of batches on the device show what the views of the data workers show."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from lesiongen.data import augment as A
from lesiongen.data.augment import AugmentConfig, View, augment, draw_view
from lesiongen.data.device_augment import augment_batch, view_row
from tests.unit.test_augment import OFF, STRONG

SIZE = 32


def smooth(height: int, width: int, seed: int = 0, channels: int = 3) -> torch.Tensor:
    """A smooth random image, so that other ways to interpolate differ little."""
    coarse = torch.rand(1, channels, 5, 6, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0] * 255).to(torch.uint8)


def on_device(images: list[torch.Tensor], views: list[View], positions: list[int] | None = None) -> torch.Tensor:
    """Pads the images to one size and makes the views."""
    height, width = (max(image.shape[i] for image in images) for i in (1, 2))
    padded = torch.zeros(len(images), images[0].shape[0], height, width, dtype=torch.uint8)
    for target, image in zip(padded, images, strict=True):
        target[:, : image.shape[1], : image.shape[2]] = image
    rows = torch.tensor([view_row(v, SIZE, *image.shape[1:]) for v, image in zip(views, images, strict=True)])
    return augment_batch(padded, rows, torch.tensor(positions or list(range(len(images)))), SIZE)


def difference(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one.int() - other.int()).abs().float()


@pytest.mark.parametrize("name", [name for name in A.OPERATIONS if name != "noise"])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_operation_shows_the_same(name, channels):
    """Images of several shapes in one batch, packed for this size of view. The mean difference is about 1 of 255 or less."""
    config = dataclasses.replace(OFF, **STRONG[name])
    images = [smooth(*((SIZE, 40 + 5 * (i % 3)) if i % 2 else (40 + 3 * (i % 4), SIZE)), i, channels) for i in range(16)]
    views = [draw_view(config, torch.Generator().manual_seed(i)) for i in range(16)]
    expected = torch.stack([augment(images[i], SIZE, config, torch.Generator().manual_seed(i)) for i in range(16)])
    found = on_device(images, views)
    assert found.dtype == torch.uint8 and found.shape == expected.shape
    assert difference(found, expected).mean((1, 2, 3)).max() < (1.5 if name == "rotate" else 1.0)
    if name in ("dihedral", "hflip", "vflip"):
        assert difference(found, expected).max() <= 1


def test_all_operations_together_show_the_same():
    config = AugmentConfig(**{k: v for strong in STRONG.values() for k, v in strong.items()} | {"noise": 0.0})
    images = [smooth(SIZE, 48, i) for i in range(24)]
    views = [draw_view(config, torch.Generator().manual_seed(i)) for i in range(24)]
    expected = torch.stack([augment(images[i], SIZE, config, torch.Generator().manual_seed(i)) for i in range(24)])
    assert difference(on_device(images, views), expected).mean((1, 2, 3)).max() < 3.0


@pytest.mark.parametrize("symmetry", range(8))
@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
def test_symmetries_are_exact(symmetry, flips):
    image = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8)
    expected = A.dihedral(image, symmetry)
    expected = expected.flip(-1) if flips[0] else expected
    expected = expected.flip(-2) if flips[1] else expected
    found = on_device([image], [View(symmetry=symmetry, hflip=flips[0], vflip=flips[1])])
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2, -2.0])
def test_no_view_shows_the_padding(angle):
    images = [torch.full((3, 32, 40 + 9 * i), 200, dtype=torch.uint8) for i in range(4)]
    views = [View(side=0.9, top=top, left=left, angle=angle) for top, left in ((0, 0), (1, 1), (0, 1), (1, 0))]
    assert on_device(images, views).unique().tolist() == [200]


def test_noise_is_normal_and_does_not_depend_on_the_batch():
    image, views = torch.full((3, SIZE, SIZE), 128, dtype=torch.uint8), [View(noise=0.05)] * 40
    noisy = on_device([image] * 40, views, list(range(1_000, 1_040)))
    values = (noisy.float() - 128) / 255
    assert values.std().item() == pytest.approx(0.05, rel=0.03) and values.mean().item() == pytest.approx(0, abs=1e-3)
    kurtosis = (values / values.std()).pow(4).mean().item()
    assert kurtosis == pytest.approx(3, abs=0.15)
    flat = values.flatten(1)
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.1, "samples share their noise"
    assert abs(float((flat[:, 1:] * flat[:, :-1]).mean() / flat.var())) < 0.02, "neighbours share their noise"
    assert torch.equal(on_device([image] * 2, views[:2], [1_020, 1_003]), noisy[[20, 3]])
