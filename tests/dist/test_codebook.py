"""Codebooks under ZeRO: learned by averages in buffers, or by the optimizer in parameters, but never by both."""

import numpy as np
import pytest

from lesiongen.tokenizers.quantize import QUANTIZERS
from tests.dist import codebook_cases as cases

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}  # gradients are summed in another order


@pytest.fixture(scope="module")
def plain(pools):
    """plain(kind, precision) → what one process without an engine comes to."""
    known: dict[tuple, dict] = {}

    def get(*arguments) -> dict:
        if arguments not in known:
            known[arguments] = pools(1).run(cases.plain, *arguments)[0]
        return known[arguments]

    return get


def apart(one: list, other: list) -> float:
    """How far apart two quantizers put the same vectors, at most."""
    return float(np.abs(np.subtract(one, other)).max())


@pytest.mark.parametrize(
    ("kind", "zero", "precision"),
    [
        *[("ema", zero, precision) for zero in (0, 1, 2, 3) for precision in ("fp32", "bf16")],
        *[(kind, zero, "fp32") for kind in QUANTIZERS if kind != "ema" for zero in (2, 3)],
    ],
)
def test_codebook_is_what_one_process_learns(pools, plain, kind, zero, precision):
    found, reference = pools(2).run(cases.engine, kind, zero, precision)[0], plain(kind, precision)
    assert found["ranks"] == [found["seen"]] * 2
    assert apart(found["seen"], reference["seen"]) < TOLERANCE[precision]
    assert apart(reference["seen"], reference["at first"]) > 10 * TOLERANCE[precision], "nothing was learned"
    assert found["metrics"] == pytest.approx(reference["metrics"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [1, 2])
def test_averages_in_a_parameter_are_undone(pools, plain, zero, precision):
    """Why a codebook that is moved by averages is a buffer: without an engine a parameter does as well, but ZeRO puts its
    own copy back after every step. The test above would see it."""
    reference = plain("ema", precision)["seen"]
    assert plain("held", precision)["seen"] == reference
    found = pools(2).run(cases.engine, "held", zero, precision)[0]["seen"]
    assert apart(found, reference) > 10 * TOLERANCE[precision]
