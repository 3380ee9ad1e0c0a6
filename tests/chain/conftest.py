"""Shared by the tests of MLflow."""

import pytest

from hpc.run import mlflow_sync


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One `runs` for all sqlite tests, since making a store takes seconds; a space in its path, as people have."""
    patch = pytest.MonkeyPatch()
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in mlflow_sync.MLFLOW_ENVIRONMENT:
        patch.setenv(name, mlflow_sync.MLFLOW_ENVIRONMENT[name])
    yield tmp_path_factory.mktemp("my runs")
    patch.undo()
