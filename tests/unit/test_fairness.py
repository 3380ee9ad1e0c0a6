"""Fairness slices and the skin tone of an image."""

import math

import numpy as np
import pytest
import torch

from lesiongen.data import images
from lesiongen.data.augment import centre
from lesiongen.evaluation.fairness import SMALLEST, HeldOut, Slices, fairness, tones
from lesiongen.evaluation.skin_tone import TONES, skin_tone, to_lab, tone_index

# sRGB colours and their CIELAB values under D65, as published in tables of the ColorChecker and of sRGB's primaries.
KNOWN = {
    (255, 255, 255): (100.0, 0.0, 0.0),
    (0, 0, 0): (0.0, 0.0, 0.0),
    (255, 0, 0): (53.24, 80.09, 67.20),
    (0, 0, 255): (32.30, 79.19, -107.86),
    (119, 119, 119): (50.03, 0.0, 0.0),
}
LIGHT_SKIN, DARK_SKIN = (230, 195, 175), (110, 75, 55)


def angle_of(colour: tuple[int, int, int]) -> float:
    """Computes the ITA of a colour by the formula of the paper, in float64."""
    linear = [v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in colour]
    y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    z = (0.0193 * linear[0] + 0.1192 * linear[1] + 0.9505 * linear[2]) / 1.0888
    lightness, yellow = 116 * y ** (1 / 3) - 16, 200 * (y ** (1 / 3) - z ** (1 / 3))
    return math.degrees(math.atan((lightness - 50) / yellow))


def painted(colour: tuple[int, int, int], side: int = 96, noise: float = 4.0) -> torch.Tensor:
    """Returns an image of skin, uint8 [3, side, side]."""
    x = torch.tensor(colour).view(3, 1, 1) + noise * torch.randn(3, side, side, generator=torch.Generator().manual_seed(0))
    return x.clamp(0, 255).to(torch.uint8)


def spoilt(image: torch.Tensor, *what: str) -> torch.Tensor:
    """Returns a copy with a lesion, dark corners that fade, hairs, ink, a reflection, or a black or white frame."""
    x, side = image.clone().float(), image.shape[-1]
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    radius = ((rows - side / 2) ** 2 + (columns - side / 2) ** 2).sqrt() / (side / 2)
    if "lesion" in what:
        x[:, (rows > side * 0.1) & (rows < side * 0.9) & (columns < side * 0.8) & (columns > side * 0.3)] = 40.0
    if "corners" in what:
        x *= ((1.3 - radius) / 0.25).clamp(0, 1)
    if "hairs" in what:
        x[:, (rows + 2 * columns) % 24 < 4] *= 0.35
    if "ink" in what:
        x[:, rows > side * 0.93] = torch.tensor([40.0, 40.0, 200.0]).view(3, 1)
    for name, value in (("black frame", 5.0), ("white frame", 254.0)):
        if name in what:
            x[:, (rows - side / 2 + 0.5).abs().maximum((columns - side / 2 + 0.5).abs()) > side * 0.39] = value
    if "reflection" in what:
        x[:, rows < side * 0.05] = 255.0
    return x.to(torch.uint8)


def test_colours_have_their_published_values():
    lab = to_lab(torch.tensor(list(KNOWN)))
    assert lab.numpy() == pytest.approx(np.array(list(KNOWN.values())), abs=0.05)


@pytest.mark.parametrize("colour", [LIGHT_SKIN, DARK_SKIN])
@pytest.mark.parametrize(
    "what",
    [
        (),
        ("lesion",),
        ("corners",),
        ("hairs",),
        ("black frame",),
        ("white frame",),
        ("ink", "reflection"),
        ("lesion", "corners", "hairs"),
    ],
)
def test_angle_is_that_of_the_skin(colour, what):
    found = skin_tone(spoilt(painted(colour), *what)[None])[0]
    assert found == pytest.approx(angle_of(colour), abs=4)


def test_darker_part_of_the_border_does_not_shift_the_angle():
    """A third of the border is lesion, and the skin is uneven, so the lesion would move the median."""
    uneven = 14 * torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
    skin = (torch.tensor((200, 165, 145)).view(3, 1, 1) + uneven).clamp(0, 255)
    alone = skin_tone(skin.to(torch.uint8)[None])[0]
    skin[:, :, :30] *= 0.45
    assert skin_tone(skin.to(torch.uint8)[None])[0] == pytest.approx(alone, abs=1.5)


def test_angle_hardly_depends_on_the_size_of_the_image():
    big, small = (skin_tone(spoilt(painted(LIGHT_SKIN, side), "lesion", "corners")[None])[0] for side in (256, 64))
    assert big == pytest.approx(small, abs=2)


@pytest.mark.parametrize(
    "image",
    [
        torch.full((1, 64, 64), 180, dtype=torch.uint8),
        torch.full((3, 64, 64), 180, dtype=torch.uint8),
        torch.zeros(3, 64, 64, dtype=torch.uint8),
        painted((190, 170, 220)),
        painted((255, 0, 0)),
    ],
    ids=["grey", "grey in colour", "black", "violet light", "red"],
)
def test_angle_is_unknown_without_skin(image):
    assert np.isnan(skin_tone(image[None])).all() and tone_index(skin_tone(image[None])).tolist() == [-1]


def test_classes_of_skin_tone():
    angles = np.array([80, 55.1, 55, 41.1, 41, 28.1, 28, 10.1, 10, -29.9, -30, -80, np.nan])
    names = [TONES[i] if i >= 0 else None for i in tone_index(angles)]
    assert names == [
        *("very light", "very light", "light", "light", "intermediate", "intermediate", "tan", "tan"),
        *("brown", "brown", "dark", "dark", None),
    ]


def test_skin_of_real_images_is_mostly_light(real_images):
    """Most images of the two archives show light skin; where the light is violet, there is no angle."""
    for name in ("ham10000", "isic-cc0"):
        paths = sorted((real_images / name / "images").iterdir())[::25][:150]
        batch = torch.stack([centre(images.to_tensor(images.read(path, 3, 64)), 64) for path in paths])
        angles = skin_tone(batch)
        known = angles[~np.isnan(angles)]
        assert len(known) > len(angles) / 2
        assert ((known > 0) & (known < 90)).mean() > 0.9 and 41 < np.median(known) < 85


def example(images_per_value: int = 40) -> tuple[dict[str, Slices], HeldOut]:
    """Returns two sexes, of which the second is treated worse in every respect, and a third value of few images."""
    sex = np.repeat([0, 1, 2, -1], [images_per_value, images_per_value, SMALLEST - 1, 5])
    rng = np.random.default_rng(0)
    labels = np.arange(len(sex)) % 4
    predicted = np.where((sex == 1) & (labels == 3), 0, labels)  # the fourth class of the second sex is never found
    facts = {
        "sex": Slices(("female", "male", "other"), np.repeat([0, 1, -1], [300, 100, 7]), sex, np.array([0, 0, 0, 1, -1])),
        "site": Slices(("arm", "back"), np.zeros(9, np.int16), np.zeros(len(sex), np.int16), None),
    }
    psnr = np.where(sex == 1, 25.0, 30.0) + rng.normal(0, 0.5, len(sex))
    return facts, HeldOut(np.arange(len(sex)) // 2, psnr, labels, predicted, np.where(sex == 1, 900.0, 700.0))


def test_slices_are_counted_and_measured():
    facts, held_out = example()
    found = fairness(facts, held_out, 0)["slices"]
    female, male, other = (found["sex"][value] for value in ("female", "male", "other"))
    assert (female["train"], female["held_out"], female["samples"]) == (300, 40, 0.75)
    assert (male["train"], male["held_out"], male["samples"]) == (100, 40, 0.25)
    assert female["psnr"]["value"] == pytest.approx(held_out.psnr_N[:40].mean())
    assert female["psnr"]["low"] > male["psnr"]["high"]
    assert female["recall"]["value"] == 1.0 and male["recall"]["value"] == 0.75
    assert female["bits"]["value"] == 700 and male["bits"]["value"] == 900
    assert (other["held_out"], other["psnr"], other["recall"], other["bits"]) == (SMALLEST - 1, None, None, None)
    assert list(found["site"]) == ["arm"] and found["site"]["arm"]["samples"] is None


def test_recall_counts_classes_alike():
    labels = np.repeat([0, 1], [90, 10])
    facts = {"sex": Slices(("female",), np.zeros(1, int), np.zeros(100, int))}
    held_out = HeldOut(np.arange(100), None, labels, np.zeros(100, int), None)
    found = fairness(facts, held_out, 0)["slices"]["sex"]["female"]
    assert found["recall"]["value"] == 0.5 and found["psnr"] is None and found["bits"] is None


def test_interval_counts_lesions_and_not_photographs():
    psnr = np.repeat(np.random.default_rng(0).normal(30, 2, 10), 10)
    facts = {"sex": Slices(("female",), np.zeros(1, int), np.zeros(100, int))}
    widths = []
    for groups in (np.arange(100), np.arange(100) // 10):
        figure = fairness(facts, HeldOut(groups, psnr), 0)["slices"]["sex"]["female"]["psnr"]
        widths.append(figure["high"] - figure["low"])
    assert widths[1] > 2 * widths[0]


def test_unlabelled_images_have_no_recall():
    facts = {"sex": Slices(("female",), np.zeros(1, int), np.zeros(50, int))}
    held_out = HeldOut(np.arange(50), None, np.full(50, -1), np.zeros(50, int), None)
    assert fairness(facts, held_out, 0)["slices"]["sex"]["female"]["recall"] is None


def test_note_warns_of_skin_tone_only_where_there_is_one():
    held_out = HeldOut(np.arange(30))
    some = fairness({"skin_tone": tones(np.array([0, 1]), np.repeat([0, -1], [25, 5]), None)}, held_out, 0)
    assert list(some["slices"]["skin_tone"]) == ["very light", "light"]
    assert "2602.10265" in some["note"] and "Of 30 held-out images, 5 have no skin tone" in some["note"]
    none = fairness({"skin_tone": tones(np.array([-1]), np.full(30, -1), None)}, held_out, 0)
    assert none["slices"] == {} and "Grey images have no skin tone." in none["note"] and "2602" not in none["note"]
