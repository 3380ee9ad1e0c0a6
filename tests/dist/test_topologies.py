"""Losses, codebooks and averaged weights do not depend on the number of ranks, the micro-batches or the ZeRO stage, also if the
number of ranks changes at a resume."""

import numpy as np
import pytest

from tests.dist import topology_cases as cases


def engine(world: int, zero: int, **more) -> dict:
    return {"zero": zero, "accumulation": 4 // world, "average": 1.0} | more


@pytest.fixture(scope="module")
def references(pools, packed):
    """Returns {optimizer: result of six steps on one rank under ZeRO 0}."""
    return {name: pools(1).run(cases.leg, str(packed), engine(1, 0), 6, name)[0] for name in cases.RATES}


def compare(leg: cases.Leg, reference: cases.Leg) -> None:
    assert leg.losses == pytest.approx(reference.losses, rel=1e-4)
    assert leg.norms == pytest.approx(reference.norms, rel=1e-3)
    assert np.abs(leg.weights - reference.weights).max() < 3e-5, "more than a rounding error: Adam's first steps are 1e-3"
    assert len(set(leg.books)) == 1, "codebooks differ between ranks"
    assert all(own == reference.settings[0] for own in leg.settings)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_one_curve(pools, packed, references, world, zero):
    compare(pools(world).run(cases.leg, str(packed), engine(world, zero), 6)[0], references["adamw"])


@pytest.mark.parametrize(("name", "world", "zero"), [("adam", 2, 0), ("adam", 2, 3), ("sgd", 2, 2), ("sgd", 4, 3)])
def test_one_curve_for_other_optimizers(pools, packed, references, name, world, zero):
    compare(pools(world).run(cases.leg, str(packed), engine(world, zero), 6, name)[0], references[name])


@pytest.mark.parametrize(
    ("name", "zero"),
    [
        ("adamw", 0),
        pytest.param("adamw", 1, marks=pytest.mark.long),
        pytest.param("adamw", 2, marks=pytest.mark.long),
        ("adamw", 3),
        pytest.param("sgd", 2, marks=pytest.mark.long),
        pytest.param("sgd", 3, marks=pytest.mark.long),
    ],
)
def test_four_ranks_then_two_then_one(pools, packed, references, tmp_path, name, zero):
    losses, norms, load = [], [], None
    for world in (4, 2, 1):
        save = str(tmp_path / str(world))
        leg = pools(world).run(cases.leg, str(packed), engine(world, zero), 2, name, load, save)[0]
        losses, norms, load = losses + leg.losses, norms + leg.norms, save
    leg.losses, leg.norms = losses, norms
    compare(leg, references[name])


@pytest.mark.parametrize("first", [False, True])
def test_another_layout_after_a_resume(pools, packed, references, tmp_path, first):
    """Resumes with another memory format. The fused optimizer needs its moments in the memory format of the weights."""
    halves = []
    for channels_last, load, save in ((first, None, str(tmp_path)), (not first, str(tmp_path), None)):
        halves.append(
            pools(1).run(cases.leg, str(packed), engine(1, 0, channels_last=channels_last), 3, "adamw", load, save)[0]
        )
    halves[1].losses, halves[1].norms = (halves[0].losses + halves[1].losses, halves[0].norms + halves[1].norms)
    compare(halves[1], references["adamw"])


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_images_with_channels_first(pools, packed, references, zero):
    compare(pools(2).run(cases.leg, str(packed), engine(2, zero, channels_last=False), 6)[0], references["adamw"])


@pytest.mark.long
@pytest.mark.parametrize("zero", [0, 2])
def test_compiled(pools, packed, references, zero):
    leg = pools(1).run(cases.leg, str(packed), engine(1, zero, compile=True), 6)[0]
    assert leg.losses == pytest.approx(references["adamw"].losses, rel=1e-3)
