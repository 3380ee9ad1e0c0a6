"""Augmentations: each follows torchvision or its paper, can be switched off, and never changes the draws of another."""

import dataclasses
import math
from functools import partial

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from hpc.config import from_plain
from lesiongen.data import augment as A
from lesiongen.data.augment import AugmentConfig, PreprocessConfig, augment, centre, preprocess
from lesiongen.ingest import phantom

OFF = AugmentConfig(crop=1.0, dihedral=False)
STRONG = {
    "crop": {"crop": 0.5, "aspect": 1.3},
    "dihedral": {"dihedral": True},
    "hflip": {"hflip": 1.0},
    "vflip": {"vflip": 1.0},
    "rotate": {"rotate": 45.0},
    "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2},
    "noise": {"noise": 0.1},
}


@pytest.fixture(scope="module")
def lesion() -> torch.Tensor:
    """uint8 [3, 48, 64]."""
    return F.resize(torch.from_numpy(phantom.draw("mel", 1, 0, 64)).permute(2, 0, 1), [48, 64])


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def test_default_view_is_torchvisions_resized_crop_and_a_symmetry(lesion):
    for seed in range(20):
        u = torch.rand(9, generator=rng(seed)).tolist()
        side = round(48 * (0.85 + 0.15 * u[0]))
        wanted = F.resized_crop(lesion, round((48 - side) * u[1]), round((64 - side) * u[2]), side, side, [32, 32])
        wanted = torch.rot90(wanted, int(u[3] * 8) % 4, (-2, -1))
        wanted = wanted.flip(-1) if int(u[3] * 8) >= 4 else wanted
        assert torch.equal(augment(lesion, 32, AugmentConfig(), rng(seed)), wanted)


@pytest.mark.parametrize("size", [32, 48, 96])
def test_centre_is_torchvisions(lesion, size):
    assert torch.equal(centre(lesion, size), F.resize(F.center_crop(lesion, [48, 48]), [size, size], antialias=True))
    assert torch.equal(augment(lesion, size, OFF, rng(0)), centre(lesion, size))


def test_memory_layout_does_not_matter(lesion):
    config = AugmentConfig(**{k: v for strong in STRONG.values() for k, v in strong.items()})
    assert lesion.stride(0) == 1
    for seed in range(5):
        view = augment(lesion, 32, config, rng(seed))
        assert view.is_contiguous()
        assert largest_difference(view, augment(lesion.contiguous(), 32, config, rng(seed))) <= 1


@given(
    brightness=st.floats(0.5, 1.5),
    contrast=st.floats(0.5, 1.5),
    saturation=st.floats(0.5, 1.5),
    hue=st.floats(-0.5, 0.5),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_jitter_is_torchvisions_without_its_roundings(brightness, contrast, saturation, hue, channels, seed):
    image = torch.randint(0, 256, (channels, 12, 12), dtype=torch.uint8, generator=rng(seed))
    wanted = F.adjust_contrast(F.adjust_brightness(image / 255, brightness), contrast)
    if channels == 3:
        wanted = F.adjust_hue(F.adjust_saturation(wanted, saturation), hue)
    assert largest_difference(A.jitter(image, brightness, contrast, saturation, hue), wanted * 255) < 0.51


def test_jitter_stays_near_torchvisions_on_uint8(lesion):
    wanted = F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(lesion, 1.1), 0.9), 1.1)
    assert largest_difference(A.jitter(lesion, 1.1, 0.9, 1.1), wanted) <= 3  # torchvision truncates to integers three times


def test_jitter_of_nothing_is_the_identity(lesion):
    before = lesion.clone()
    assert torch.equal(A.jitter(lesion), lesion)
    assert largest_difference(A.jitter(lesion, hue=1e-9), lesion) == 0  # no loss in the conversion to hue and back
    A.jitter(lesion, 0.5, 0.5, 0.5, 0.2)
    assert torch.equal(lesion, before)


@pytest.mark.parametrize("degrees", [10.0, -33.0, 90.0, 180.0])
def test_rotation_is_torchvisions_from_inside(degrees):
    smooth = F.resize(torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=rng(0)), [64, 64])
    wanted = F.center_crop(F.rotate(smooth, degrees, InterpolationMode.BILINEAR), [40, 40])
    assert largest_difference(A.rotate(smooth, 40, math.radians(degrees)), wanted) <= 1


@given(side=st.floats(0.3, 1), ratio=st.floats(0.5, 2), top=st.floats(0, 1), left=st.floats(0, 1), angle=st.floats(-3.2, 3.2))
@settings(max_examples=60, deadline=None)
def test_no_view_has_empty_corners(side, ratio, top, left, angle):
    for shape in ((3, 40, 60), (1, 60, 40)):
        assert A.crop(
            torch.full(shape, 200, dtype=torch.uint8), 32, A.View(side, ratio, top, left, angle)
        ).unique().tolist() == [200]


def test_crop_has_the_side_and_ratio_asked_for():
    x = torch.arange(240, dtype=torch.uint8).expand(1, 240, 240)  # the value of a pixel is its column; if transposed, its row
    for side, ratio in ((0.5, 1.0), (0.5, 1.5), (0.4, 0.6)):
        for image, shown in ((x, math.sqrt(ratio)), (x.mT, 1 / math.sqrt(ratio))):
            view = A.crop(image, 240, A.View(side, ratio))
            assert int(view.max()) - int(view.min()) == pytest.approx(240 * side * shown, abs=3)
    turned = A.crop(x, 240, A.View(0.5, angle=math.pi / 4))  # the rotated window fits into the image, so it is not reduced
    assert int(turned.max()) - int(turned.min()) == pytest.approx(120 * math.sqrt(2), abs=4)


def test_dihedral_has_the_eight_symmetries():
    image = torch.arange(9, dtype=torch.uint8).view(1, 3, 3)
    assert torch.equal(A.dihedral(image, 0), image)
    assert len({A.dihedral(image, i).flatten().numpy().tobytes() for i in range(8)}) == 8
    views = [
        augment(image.repeat_interleave(8, 1).repeat_interleave(8, 2), 24, AugmentConfig(crop=1), rng(i)) for i in range(99)
    ]
    assert len({v.numpy().tobytes() for v in views}) == 8


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_has_its_deviation(channels):
    image = torch.full((channels, 100, 100), 128, dtype=torch.uint8)
    noisy = A.noise(image, 0.05, rng(0)).float()
    assert noisy.std().item() == pytest.approx(0.05 * 255, rel=0.05)
    assert noisy.mean().item() == pytest.approx(128, abs=0.5)
    assert torch.equal(A.noise(image, 0.0, rng(0)), image)


@pytest.mark.parametrize("name", A.OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_operation_acts_and_repeats(lesion, name, channels):
    image, config = lesion[:channels], dataclasses.replace(OFF, **STRONG[name])
    view = augment(image, 32, config, rng(8))
    assert view.shape == (channels, 32, 32) and view.dtype == torch.uint8
    assert torch.equal(view, augment(image, 32, config, rng(8)))
    assert not torch.equal(view, centre(image, 32))
    if name not in ("hflip", "vflip"):
        assert any(not torch.equal(view, augment(image, 32, config, rng(seed))) for seed in (4, 5, 6))


@pytest.mark.parametrize("name", A.OPERATIONS)
def test_one_operation_does_not_change_the_draws_of_another(lesion, name, monkeypatch):
    """Compares the arguments of all other operations with and without `name`. A rotation is an argument of crop()."""

    def calls(config: AugmentConfig) -> dict:
        seen = {}

        def spy(inner, real, image, *args, **more):
            state = [a.get_state().tolist() for a in args if isinstance(a, torch.Generator)]
            plain = [a for a in args if not isinstance(a, (torch.Generator, A.View))]
            window = [value for a in args if isinstance(a, A.View) for value in a[:5]]
            seen[inner] = plain + window + list(more.values()) + state
            return real(image, *args, **more)

        with monkeypatch.context() as patch:
            for inner in ("crop", "dihedral", "jitter", "noise"):
                patch.setattr(A, inner, partial(spy, inner, getattr(A, inner)))
            augment(lesion, 32, config, rng(7))
        return seen

    strong = {k: v for strong in STRONG.values() for k, v in strong.items()}
    every = calls(AugmentConfig(**strong))
    without = calls(AugmentConfig(**strong | {k: getattr(OFF, k) for k in STRONG[name]}))
    if name == "crop":
        assert without.pop("crop")[-1] == every.pop("crop")[-1]  # the angle
    if name == "rotate":
        assert without.pop("crop")[:-1] == every.pop("crop")[:-1]
    every.pop(name, None)
    assert without == every


@pytest.mark.parametrize("field", ["hflip", "vflip", "rotate_p", "jitter_p", "noise_p"])
def test_shares_are_kept(lesion, field):
    config = dataclasses.replace(OFF, **STRONG[field.removesuffix("_p")] | {field: 0.4})
    same = centre(lesion, 16)
    changed = sum(not torch.equal(augment(lesion, 16, config, rng(i)), same) for i in range(300))
    assert 0.3 < changed / 300 < 0.5


def test_one_of_gives_exactly_one(lesion):
    group = ("hflip", "vflip", "rotate", "jitter")
    config = dataclasses.replace(OFF, **STRONG["rotate"], **STRONG["jitter"], hflip=0.3, one_of=group)
    alone = [dataclasses.replace(config, one_of=(), hflip=0.0, rotate=0.0, jitter_p=0.0)] * 4
    alone = [dataclasses.replace(a, **{f: STRONG[n][f] for f in STRONG[n]}) for a, n in zip(alone, group, strict=True)]
    alone[3] = dataclasses.replace(alone[3], jitter_p=1.0)
    counts = [0] * 4
    for seed in range(200):
        view = augment(lesion, 16, config, rng(seed))
        hits = [torch.equal(view, augment(lesion, 16, a, rng(seed))) for a in alone]
        assert sum(hits) == 1
        counts[hits.index(True)] += 1
    assert min(counts) > 30


REPORTS = {
    "jitter": "brightness: 0.2, contrast: 0.2, saturation: 0.2, hue: 0.02",
    "one of each": "rotate: 30, brightness: 0.2, one_of: [hflip, vflip, rotate, jitter]",
    "crop, noise": "crop: 0.3, aspect: 1.333, hflip: 0.5, rotate: 15, brightness: 0.2, noise: 0.02",
    "flip, turn": "hflip: 0.4, rotate: 10",
}


@pytest.mark.parametrize("name", REPORTS)
def test_the_reports_augmentations_can_be_written(lesion, name):
    config = from_plain(AugmentConfig, {"dihedral": False, "crop": 1} | yaml.safe_load(f"{{{REPORTS[name]}}}"))
    assert augment(lesion, 32, config, rng(0)).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": 0}, "crop=0"),
        ({"crop": 0.9, "crop_max": 0.8}, "crop_max"),
        ({"crop": 1.0, "aspect": 1.3}, "needs a crop"),
        ({"hue": 0.6}, "hue"),
        ({"rotate": 200}, "180"),
        ({"hflip": 1.2}, "probabilities"),
        ({"one_of": ("hflip",)}, "two"),
        ({"one_of": ("hflip", "hflip")}, "once"),
        ({"one_of": ("hflip", "blur")}, "unknown operation 'blur'; choose among crop"),
        ({"one_of": ("hflip", "rotate")}, "'rotate', which is switched off"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**fields)


def test_preprocessing_off_is_the_identity(lesion):
    assert preprocess(lesion, PreprocessConfig()) is lesion
    cropped = preprocess(lesion, PreprocessConfig(centre=0.5))
    assert torch.equal(cropped, lesion[:, 12:36, 16:48])
    for wrong in ({"centre": 0}, {"light": (1.0, 0.0, 1.0)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PreprocessConfig(**wrong)


def test_stretch_is_min_max():
    image = torch.tensor([[[60, 110]], [[85, 100]], [[70, 70]]], dtype=torch.uint8)
    assert A.stretch(image).tolist() == [[[0, 255]], [[128, 204]], [[51, 51]]]
    assert torch.equal(A.stretch(A.stretch(image)), A.stretch(image))
    assert A.stretch(image[:1, :, :1]).item() == 60


def cast(image: torch.Tensor, colour: tuple[float, float, float]) -> torch.Tensor:
    """Returns the image under coloured light."""
    return (image * torch.tensor(colour).view(3, 1, 1)).round().to(torch.uint8)


def hue_of(image: torch.Tensor) -> torch.Tensor:
    """Returns the mean colour of an image, scaled to length 1."""
    mean = image.float().mean((1, 2))
    return mean / mean.norm()


def test_constancy_takes_a_cast_away(lesion):
    for label in phantom.LABELS:
        image = torch.from_numpy(phantom.draw(label, 0, 0, 48)).permute(2, 0, 1)
        straight, tinted = A.shades_of_grey(image), A.shades_of_grey(cast(image, (1.0, 0.8, 0.6)))
        assert (hue_of(straight) - hue_of(tinted)).norm() < 0.02
        assert (hue_of(image) - hue_of(cast(image, (1.0, 0.8, 0.6)))).norm() > 0.1
    asked = A.shades_of_grey(torch.full((3, 16, 16), 150, dtype=torch.uint8), light=(1.0, 0.5, 0.5)).float().mean((1, 2))
    assert (asked[1:] / asked[0]).tolist() == pytest.approx([0.5, 0.5], abs=0.01)


def test_constancy_does_not_mind_rulers_hair_and_frames():
    skin = torch.tensor([210.0, 160.0, 140.0]).view(3, 1, 1)
    image = (skin * (0.8 + 0.2 * torch.rand(1, 64, 64, generator=rng(0)))).round().to(torch.uint8)
    wanted = A.shades_of_grey(image)
    inner = slice(12, 52)
    ruler, hair, frame = image.clone(), image.clone(), image.clone()
    ruler[:, -6:], hair[:, :, ::9], frame[:, :9], frame[:, -9:] = 235, 25, 0, 0
    clipped = image.clone()
    clipped[:, 30:50, 20:40] = 255
    for odd in (ruler, hair, frame, clipped):
        same = (odd == image)[:, inner, inner].all(0)
        assert largest_difference(A.shades_of_grey(odd)[:, inner, inner][:, same], wanted[:, inner, inner][:, same]) <= 4


@pytest.mark.parametrize("value", [0, 90, 255])
def test_constancy_leaves_grey_and_empty_images(value):
    grey = torch.full((3, 16, 16), value, dtype=torch.uint8)
    assert torch.equal(A.shades_of_grey(grey), grey)
    shaded = torch.randint(0, 256, (1, 16, 16), dtype=torch.uint8, generator=rng(1))
    assert A.shades_of_grey(shaded) is shaded
    assert torch.equal(A.shades_of_grey(shaded.expand(3, -1, -1)), shaded.expand(3, -1, -1))
