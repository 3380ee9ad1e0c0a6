"""Codebooks under ZeRO: averages must be stored in buffers; only the optimizer may update a parameter."""

import numpy as np
import pytest

from lesiongen.tokenizers.quantize import QUANTIZERS
from tests.dist import codebook_cases as cases

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}  # two ranks sum gradients in another order than one process


@pytest.fixture(scope="module")
def plain(pools):
    """plain(kind, precision) returns the results of one process without an engine. Each is computed once."""
    results: dict[tuple, dict] = {}

    def get(*arguments) -> dict:
        if arguments not in results:
            results[arguments] = pools(1).run(cases.plain, *arguments)[0]
        return results[arguments]

    return get


def largest_difference(one: list, other: list) -> float:
    """Returns the largest difference between two lists of vectors."""
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
    assert found["vectors of ranks"] == [found["vectors"]] * 2
    assert largest_difference(found["vectors"], reference["vectors"]) < TOLERANCE[precision]
    assert largest_difference(reference["vectors"], reference["initial vectors"]) > 10 * TOLERANCE[precision], (
        "training changed nothing"
    )
    assert found["metrics"] == pytest.approx(reference["metrics"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [1, 2])
def test_averages_in_a_parameter_are_undone(pools, plain, zero, precision):
    """Shows why a codebook that is updated by averages must be a buffer.

    Without an engine a parameter works too. But ZeRO overwrites a parameter with its own copy after every step. The test above
    would detect this.
    """
    reference = plain("ema", precision)["vectors"]
    assert plain("ema parameter", precision)["vectors"] == reference
    found = pools(2).run(cases.engine, "ema parameter", zero, precision)[0]["vectors"]
    assert largest_difference(found, reference) > 10 * TOLERANCE[precision]
