"""What ranks agree on beside the training: failures of rank 0, time-outs of groups, precision under every ZeRO stage."""

import os

import pytest
import torch

from hpc import dist
from hpc.errors import Busy, LeaderFailed, UserError
from tests.dist import topology_cases as cases


def failing(kind: str) -> None:
    raise {"user": UserError, "busy": Busy, "other": OSError}[kind](f"no luck: {kind}")


def outcome(topology, kind: str) -> tuple[str, str]:
    try:
        dist.run_on_leader(failing, kind)
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def test_a_mistake_of_the_user_is_one_on_every_rank(pools):
    assert set(pools(2).run(outcome, "user")) == {("UserError", "no luck: user")}
    assert set(pools(2).run(outcome, "busy")) == {("Busy", "no luck: busy")}


def test_another_failure_of_rank_0_is_no_mistake_of_the_user_elsewhere(pools):
    first, second = pools(2).run(outcome, "other")
    assert first == ("OSError", "no luck: other")
    assert second == (LeaderFailed.__name__, "rank 0 failed: OSError('no luck: other')")


def timeouts(topology, run: str) -> set[float]:
    """Seconds after which each process group gives up, those that DeepSpeed has made included."""
    cases.Trainer(topology, run, {"zero": 2, "accumulation": 2})
    groups = torch.distributed.distributed_c10d._world.pg_map
    return {g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups}


def test_every_group_waits_longer_than_the_watchdog(pools, packed):
    for found in pools(2).run(timeouts, str(packed)):
        assert found == {dist.LONGEST_WAIT.total_seconds()}


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("a1", "a1"),
        ("a1,b2", "a1"),
        ("a[01-03,7],b2", "a01"),
        ("gpu[3,9-11]-ib", "gpu3-ib"),
        ("rack[1-2]n[016-020],x", "rack1n016"),
        ("n-4-[08-09].cluster", "n-4-08.cluster"),
    ],
)
def test_first_host_of_a_node_list(nodelist, first):
    assert dist.first_host(nodelist) == first


@pytest.mark.parametrize(
    ("visible", "ranks", "launcher", "refused"),
    [(2, 4, True, True), (1, 2, True, True), (4, 4, True, False), (1, 4, False, False), (8, 4, True, False)],
)
def test_ranks_that_would_share_a_gpu(monkeypatch, visible, ranks, launcher, refused):
    """Without a launcher of this machine one visible GPU may be a task's own, as some clusters have it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if launcher:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    topology = dist.Topology(rank=0, world_size=ranks)
    if refused:
        with pytest.raises(UserError, match="at most one rank per GPU"):
            dist.refuse_shared_gpus(topology)
    else:
        dist.refuse_shared_gpus(topology)


def test_gpus_can_be_hidden(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    dist.hide_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_bf16_is_the_same_under_every_zero_stage(pools, packed):
    """And differs from fp32, by what bf16 rounds: a test that passes with bf16 off would show nothing."""

    def losses(zero: int, precision: str) -> list[float]:
        return pools(2).run(cases.leg, str(packed), {"zero": zero, "accumulation": 2, "precision": precision}, 4)[0].losses

    exact, rounded = losses(0, "fp32"), losses(0, "bf16")
    assert rounded == pytest.approx(exact, rel=2e-2)
    assert max(abs(a - b) / a for a, b in zip(exact, rounded, strict=True)) > 1e-5
    for zero in (1, 2, 3):
        assert losses(zero, "bf16") == pytest.approx(rounded, rel=1e-5)
