"""An intact shard, and copies of it for tests that damage them."""

import shutil
from pathlib import Path

import pytest

from hpc.data.shards import write_shard
from tests.faults.shards import SAMPLES, describe


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Returns a folder with a shard of six samples, its index and a manifest."""
    folder = tmp_path_factory.mktemp("whole")
    write_shard(folder / "a.tar", [{**s, "__label__": i % 2} for i, s in enumerate(SAMPLES)])
    describe(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """Returns a copy of `whole` that the test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "shards"))
