"""Training on several processes gives the same result for every topology and ZeRO stage."""

import math
import subprocess
import sys

import pytest

from tests.conftest import DEMO, tiny
from tests.dist import cases


@pytest.fixture(scope="module")
def reference(pools, packed):
    return pools(1).run(cases.curve, str(packed), 0, 1)[0]


@pytest.mark.parametrize(
    ("world", "accumulation", "zero"), [(1, 4, 0), (2, 2, 0), (4, 1, 0), (2, 1, 1), (2, 1, 2), (2, 1, 3), (4, 1, 2)]
)
def test_same_curve_for_every_topology_and_zero_stage(pools, packed, reference, world, accumulation, zero):
    losses, weights, books, own = pools(world).run(cases.curve, str(packed), zero, accumulation)[0]
    assert losses == pytest.approx(reference[0], rel=1e-3)
    assert weights == pytest.approx(reference[1], rel=1e-4)
    assert len(set(own)) == 1, "codebooks differ between ranks"
    assert own[0] == books, "the exported codebook is not the trained one"


def test_bf16_stays_near_fp32(pools, packed, reference):
    losses, _, _, own = pools(2).run(cases.curve, str(packed), 2, 1, "bf16")[0]
    assert losses == pytest.approx(reference[0], rel=0.1)
    assert len(set(own)) == 1


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_nan_on_one_rank_leaves_the_step_out_on_all(pools, packed, zero):
    for before, after, losses in pools(2).run(cases.skipped_step, str(packed), zero):
        assert after == before
        assert all(math.isfinite(v) for v in losses)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_resume_continues_exactly(pools, packed, tmp_path, zero):
    for uninterrupted, resumed in pools(2).run(cases.save_and_resume, str(packed), zero, str(tmp_path)):
        assert resumed == uninterrupted


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_resume_on_other_numbers_of_ranks(pools, packed, tmp_path, zero):
    uninterrupted, _ = pools(2).run(cases.save_and_resume, str(packed), zero, str(tmp_path))[0]
    for world, accumulation in ((1, 2), (4, 1)):
        resumed = pools(world).run(cases.resume, str(packed), zero, accumulation, str(tmp_path))[0]
        assert resumed == pytest.approx(uninterrupted, rel=1e-3)


def test_a_damaged_checkpoint_is_passed_over_by_all(pools, packed, tmp_path):
    assert set(pools(2).run(cases.damaged, str(packed), str(tmp_path))) == {"step-000001"}


def test_the_leaders_refusal_reaches_every_rank(pools, tmp_path):
    for message in pools(2).run(cases.refused, str(tmp_path / "stage")):
        assert "a: 1 → 2" in message


@pytest.mark.parametrize("zero", [0, 3])
def test_whole_stages_on_two_ranks(pools, phantoms, tmp_path, zero):
    """Encode and sample write the same bytes for any number of ranks. Priors draw samples in training, also under ZeRO 3."""
    more = {"priors.top.train.engine.zero": zero, "priors.bottom.train.engine.zero": zero, "local.ranks": 2}
    overrides = tiny(phantoms, tmp_path, **more)
    names = ["shards", "tokenizer", "codes", "prior-top", "prior-bottom", "samples"]
    digests = pools(2).run(cases.run_stages, overrides, DEMO, names)
    assert digests[0] == digests[1]
    assert all(digests[0].values())
    assert list((tmp_path / "tiny" / "prior-top" / "images").glob("code-map-*.png"))
    assert list((tmp_path / "tiny" / "prior-bottom" / "images").glob("samples-*.png"))
    for stage in ("codes", "samples"):
        (tmp_path / "tiny" / stage).rename(tmp_path / stage)
    again = pools(1).run(cases.run_stages, overrides, DEMO, ["codes", "samples"])[0]
    assert again == {name: digests[0][name] for name in again}


def test_a_missing_rank_is_named():
    code = (
        "from hpc import dist\nfrom hpc.dist import Topology\n"
        "try: dist.init(Topology(rank=0, world_size=3, address='127.0.0.1', port=0), timeout_s=1)\n"
        "except TimeoutError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "have not joined: 1, 2" in done.stdout, done.stderr
