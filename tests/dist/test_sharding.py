"""Nothing whole on one rank: models that ZeRO 3 divides from birth to export are those that are whole."""

import numpy as np
import pytest

from lesiongen.priors import PRIORS
from lesiongen.tokenizers.quantize import QUANTIZERS
from tests.conftest import DEMO, tiny
from tests.dist import cases
from tests.dist import sharding_cases as sharding


@pytest.mark.parametrize("kind", PRIORS)
def test_a_prior_built_divided_has_the_same_weights(pools, kind):
    for found in pools(2).run(sharding.built, kind):
        assert found["divided"] == found["whole"]
        assert found["elements"] == 0
        assert found["whole"]["buffer64"].startswith("torch.float64")


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_tokenizer_built_divided_has_the_same_codebooks(pools, packed, quantizer):
    """Also after k-means, which runs the encoder before the engine is built. Codebooks stay fp32."""
    model = {"quantizer": quantizer, "kmeans": quantizer != "fsq"}
    model |= {"entries": 27, "fsq_levels": (3, 3, 3)} if quantizer == "fsq" else {}
    for whole, divided in pools(2).run(sharding.tokenizer_buffers, str(packed), model):
        assert divided == whole
        assert all(value.startswith(("torch.float32", "torch.bool")) for value in whole.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("average", [0.0, 1.0])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_held_out_loss_is_that_of_the_export(pools, zero, average, precision):
    """The engine's own module, evaluated in place, gives what a plain module with the exported weights gives, in fp32."""
    settings = {"zero": zero, "average": average, "precision": precision}
    found = pools(2).run(sharding.trained, "gpt", settings)[0]
    assert np.allclose(found["bits"], found["exported"], atol=1e-6)
    assert np.allclose(found["from_whole"], found["exported"], atol=1e-6)
    reference = pools(2).run(sharding.trained, "gpt", settings | {"zero": 0})[0]
    # The ranks' sums have another order than one sum; bf16 rounds the small differences up.
    tolerance = {"fp32": 1e-5, "bf16": 1e-3}[precision]
    assert np.allclose(found["losses"], reference["losses"], rtol=tolerance)
    assert np.allclose(found["bits"], reference["bits"], rtol=tolerance)


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        *[(kind, option) for kind in PRIORS for option in ({"checkpoint": True}, {"channels_last": False})],
        pytest.param("gpt", {"compile": True}, marks=pytest.mark.long),
    ],
)
def test_options_under_zero_3(pools, kind, option):
    """Activation checkpointing, layouts and compilation do not change the curve of a divided model."""
    model = {k: v for k, v in option.items() if k == "checkpoint"}
    settings = {"zero": 3, "average": 1.0} | {k: v for k, v in option.items() if k != "checkpoint"}
    found = pools(2).run(sharding.trained, kind, settings, model)[0]
    reference = pools(2).run(sharding.trained, kind, {"zero": 0, "average": 1.0})[0]
    assert np.allclose(found["losses"], reference["losses"], rtol=1e-4)
    assert np.allclose(found["bits"], reference["bits"], rtol=1e-4)


@pytest.fixture(scope="module")
def codes(pools, phantoms, tmp_path_factory) -> dict:
    """Overrides that name finished codes."""
    runs = tmp_path_factory.mktemp("codes")
    pools(2).run(cases.run_stages, tiny(phantoms, runs), DEMO, ["shards", "tokenizer", "codes"])
    return {f"inputs.{name}": runs / "tiny" / name for name in ("tokenizer", "codes")} | {
        "inputs.shards": f"[{runs / 'tiny' / 'shards'}]"
    }


@pytest.mark.parametrize(("zero", "gather_gib"), [(0, 0), (2, 0), (3, 8), (3, 0)])
def test_the_stage_exports_what_it_measured(pools, phantoms, codes, tmp_path, zero, gather_gib):
    """The held-out images do not divide evenly among the ranks. Samples are drawn only where the weights may be gathered."""
    engine = {"zero": zero, "gather_gib": gather_gib, "average": 32, "precision": "bf16"}
    more = {f"priors.top.train.engine.{k}": v for k, v in engine.items()} | codes
    found = pools(2).run(sharding.stage_and_export, tiny(phantoms, tmp_path, **more), DEMO)[0]
    assert found["exported"] == pytest.approx(found["held_out"], rel=1e-5)
    assert bool(found["pictures"]) == (zero < 3 or gather_gib > 0)
