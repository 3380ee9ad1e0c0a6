"""`python -m benchmarks.gpu --rehearse` runs every section, resumes, and leaves its files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "benchmarks.gpu"]


@pytest.mark.long
def test_the_rehearsal_runs_every_section_and_resumes(tmp_path):
    done = subprocess.run([*COMMAND, str(tmp_path), "--rehearse"], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "results.md").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["sections"]) == 11 and all(found["ok"] for found in results["sections"].values())
    pictures = {"samples.png", "tokenizer.png", "polish.png", "prior-codes.png"}
    assert pictures <= {path.name for path in tmp_path.iterdir()}
    page = (tmp_path / "results.md").read_text()
    assert "The figures mean nothing" in page and "Not compared with rosinality" in page
    # A section that has failed runs again; the others do not.
    results["sections"]["quantizer"]["ok"] = False
    (tmp_path / "results.json").write_text(json.dumps(results))
    again = subprocess.run([*COMMAND, str(tmp_path), "--rehearse"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and again.stdout.count("…") == 1, again.stdout


def test_a_machine_without_a_gpu_is_told_what_to_do(tmp_path):
    done = subprocess.run([*COMMAND, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "--rehearse" in done.stderr
