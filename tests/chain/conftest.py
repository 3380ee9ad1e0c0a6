"""Fixtures of the tests of MLflow and of pages."""

import pytest

from hpc.run import mlflow_address
from tests.chain.browser import find_chromium


@pytest.fixture(scope="session")
def chromium() -> str:
    """Returns the path of Chromium."""
    if found := find_chromium():
        return found
    pytest.skip("needs Chromium (Debian's package chromium)")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns one `runs` folder for all SQLite tests, because creating a store takes seconds. Its path has a space."""
    patch = pytest.MonkeyPatch()
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in mlflow_address.MLFLOW_ENVIRONMENT:
        patch.setenv(name, mlflow_address.MLFLOW_ENVIRONMENT[name])
    yield tmp_path_factory.mktemp("my runs")
    patch.undo()
