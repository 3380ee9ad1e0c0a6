"""launch → lesiongen → hpc, and one file for each of the libraries whose ways change."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {"hpc": {"hpc"}, "lesiongen": {"hpc", "lesiongen"}, "launch": {"hpc", "lesiongen", "launch"}}
ALONE = {
    "deepspeed": "hpc/train/engine.py",
    "mlflow": "hpc/run/mlflow_sync.py",
    "submitit": "launch/executors.py",
    "webdataset": "hpc/data/shards.py",
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            found.add(node.module)
    return {name.split(".")[0] for name in found}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    assert sources(package)
    for path in sources(package):
        assert imports(path) & ALLOWED.keys() <= ALLOWED[package], path


@pytest.mark.parametrize(("library", "home"), ALONE.items())
def test_one_file_imports(library, home):
    users = {str(p.relative_to(ROOT)) for package in ALLOWED for p in sources(package) if library in imports(p)}
    assert users == {home}


def test_help_answers_at_once():
    """No torch import: within a second even on a busy machine, where torch alone takes two."""
    code = (
        "import sys, launch.__main__ as m\nsys.argv = ['lesiongen', '--help']\n"
        "try: m.command()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
    assert time.monotonic() - began < 10
