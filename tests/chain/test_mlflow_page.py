"""MLflow's page of a real run in headless Chromium: what a user has to see is seen."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from hpc.run import mlflow_address
from launch.__main__ import main
from tests.chain.browser import browse
from tests.chain.mlflow_runs import wait_for
from tests.chain.test_mlflow_server import free_port, get
from tests.conftest import DEMO, tiny

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory):
    """A sweep of two priors up to the samples."""
    runs = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    grid = ["--grid", "priors.top.model.layers=1,2", "--until", "samples"]
    assert main(["sweep", DEMO, *tiny(phantoms, runs), *grid]) == 0
    patch.undo()
    return runs / "tiny-layers2"


@pytest.fixture(scope="module")
def page(run):
    """Runs `lesiongen ui` and returns the address that it prints."""
    command = [sys.executable, "-m", "launch", "ui", "--runs", str(run.parent), "--port", str(free_port())]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    address = re.search(r"http://\S+", server.stdout.readline())[0]
    yield address
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(30)


@pytest.fixture(scope="module")
def ids(page, run):
    """The ids of the MLflow runs: that of the whole run is under None."""
    wait_for(lambda: (run / "mlflow.json").exists())
    store = json.loads((run / "mlflow.json").read_text())["stores"][mlflow_address.default_uri(run)]
    return {None: store["parent"]["id"]} | {name: entry["id"] for name, entry in store["stages"].items()}


def text_of(chromium, folder, address, *expected) -> str:
    """Returns the text that a page shows, which must have these words. The machine may be slow: tries again."""
    for attempt in range(3):
        dom = browse(chromium, folder / str(attempt), "--window-size=1600,4000", "--dump-dom", address)
        text = re.sub(r"\s+", " ", re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", dom, flags=re.DOTALL))
        if all(words in text for words in expected):
            return text
        time.sleep(2)
    raise AssertionError(f"{[words for words in expected if words not in text]} are missing in: {text[:3000]}")


def test_the_printed_address_opens_on_the_runs(chromium, page, ids, tmp_path):
    text_of(chromium, tmp_path, page, "Model training", " tiny ", "matching runs")


def test_a_run_shows_its_note_its_figures_and_its_stages(chromium, page, ids, tmp_path):
    base, query = page.split("/runs?")
    text = text_of(
        chromium, tmp_path, f"{base}/runs/{ids[None]}?{query}", "samples · 14 · guidance", "prior-top/bits_per_token"
    )
    assert re.search(r"prior-top · gpt 2×32 · \d+\.\d k", text) and "priors.top.model.layers" in text
    assert "| stage |" not in text and "prior-bottom gpt 2×32" in text, "the note is shown as a table"


def test_a_stage_shows_its_parameters_its_lineage_and_its_command(chromium, page, ids, tmp_path):
    base, query = page.split("/runs?")
    text = text_of(chromium, tmp_path, f"{base}/runs/{ids['prior-top']}?{query}", "prior.model.layers", "Parent run")
    assert "tiny-layers2" in text
    assert re.search(r"codes \([0-9a-f]{16}\) Made From", text, re.IGNORECASE)
    assert "lesiongen" in text


def test_pictures_have_a_slider(chromium, page, ids, tmp_path):
    base, query = page.split("/runs?")
    cards = (" bits_per_token ", " bits #", " samples #")  # the last two are pictures: a colour follows their name
    text = text_of(chromium, tmp_path, f"{base}/runs/{ids['prior-bottom']}/model-metrics?{query}", *cards)
    assert "No image logged at this step" not in text, "a slider opens on nothing"
    port = int(re.search(r":(\d+)/", page)[1])
    listed = get(port, f"/api/2.0/mlflow/artifacts/list?run_id={ids['prior-bottom']}&path=images")[1].decode()
    assert {"samples+step+80+", "samples+step+160+", "samples+step+0+"} <= set(re.findall(r"samples\+step\+\d+\+", listed))
