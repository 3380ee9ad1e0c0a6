"""Import rules: launch → lesiongen → hpc, floors in each package, no circles, and libraries that only one file may import."""

import shutil
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests import layering


def test_no_import_breaks_a_rule():
    assert layering.problems() == []


@pytest.fixture
def copy(tmp_path) -> Path:
    """Returns a copy of the sources, into which a test can write forbidden imports."""
    for package in layering.FLOORS:
        shutil.copytree(layering.ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("hpc/dist.py", "from lesiongen.data import images", "hpc.dist imports lesiongen.data.images, a layer above"),
        ("hpc/data/rows.py", "import hpc.train.loop", "hpc.data.rows imports hpc.train.loop, a floor above"),
        (
            "lesiongen/tokenizers/kmeans.py",
            "def late():\n    from lesiongen.tokenizers import quantizer",
            "circle: lesiongen.tokenizers.kmeans, lesiongen.tokenizers.quantizer",
        ),
        (
            "lesiongen/stages/encode.py",
            "from lesiongen.stages.prior import run",
            "lesiongen.stages.encode imports lesiongen.stages.prior; both import lesiongen.stages.base or",
        ),
        ("launch/status.py", "import mlflow", "mlflow is imported in hpc/run/mlflow_sync.py, launch/status.py, not in"),
    ],
)
def test_a_planted_import_is_found(copy, file, line, found):
    (copy / file).write_text((copy / file).read_text() + line + "\n")
    assert any(text.startswith(found) for text in layering.problems(copy)), layering.problems(copy)
    assert found in layering.report(copy)


def test_a_folder_on_no_floor_is_refused(copy):
    (copy / "hpc" / "extra").mkdir()
    (copy / "hpc" / "extra" / "__init__.py").write_text("import hpc.dist\n")
    with pytest.raises(ValueError, match=r"hpc\.extra stands on no floor"):
        layering.problems(copy)


def test_help_answers_at_once():
    """`--help` must not import torch, which takes seconds."""
    code = (
        "import sys, launch.__main__ as m\nsys.argv = ['lesiongen', '--help']\n"
        "try: m.command()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=layering.ROOT)
    assert time.monotonic() - began < 10


def test_pytest_enters_every_folder_of_tests(request):
    """pytest leaves some folders out by their names. A folder that it leaves out is tested by nobody, and nothing says so."""
    left_out = request.config.getini("norecursedirs")
    folders = {path.parent for path in (layering.ROOT / "tests").rglob("test_*.py")}
    assert len(folders) > 5
    assert [str(f) for f in folders for pattern in left_out if fnmatch(f.name, pattern)] == []
