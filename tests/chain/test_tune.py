"""tune: settings of sampling by their distance to validation images, level by level; a killed search goes on."""

import csv
from pathlib import Path

import pytest
import yaml

from launch.__main__ import main
from lesiongen import experiment
from lesiongen.stages.tune import GUIDANCE, TEMPERATURES
from tests.conftest import DEMO, tiny


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory) -> Path:
    """Returns a run with trained models, without samples."""
    runs = tmp_path_factory.mktemp("runs")
    settings = [DEMO, *tiny(phantoms, runs)]
    for command in (["pack"], ["train", "tokenizer"], ["encode"], ["train", "prior"]):
        assert main([*command, *settings]) == 0
    assert main(["tune", "sampling", *settings, "-n", "28"]) == 0
    return runs / "tiny"


def trials(folder: Path) -> list[dict]:
    return list(csv.DictReader((folder / "trials.csv").open()))


def test_each_level_is_tuned_below_real_codes(run):
    rows = trials(run / "tuning")
    each = len(GUIDANCE) + len(TEMPERATURES)
    assert [row["level"] for row in rows] == ["", *["bottom"] * each, *["top"] * each]
    found = yaml.safe_load((run / "tuning" / "sampling.yaml").read_text())["sample"]["levels"]
    for level in ("top", "bottom"):
        best = min((row for row in rows if row["level"] == level), key=lambda row: float(row["kid"]))
        assert found[level] == {
            "temperature": float(best["temperature"]),
            "guidance": float(best["guidance"]),
            "guidance_schedule": best["guidance_schedule"],
        }
        # The temperature is searched at the best guidance.
        guided = [row for row in rows if row["level"] == level][: len(GUIDANCE)]
        best_guidance = min(guided, key=lambda row: float(row["kid"]))["guidance"]
        assert {row["guidance"] for row in rows if row["level"] == level and row["temperature"] != "1.0"} == {best_guidance}
    assert len({row["kid"] for row in rows}) > each  # settings make a difference
    assert (run / "tuning" / "samples.png").stat().st_size > 1000


def test_the_section_is_one_for_the_config(run, tmp_path):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["sample"] |= yaml.safe_load((run / "tuning" / "sampling.yaml").read_text())["sample"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    found = experiment.load(str(tmp_path / "config.yaml"))
    assert found.sample.at("top").temperature == float(found.sample.levels["top"].temperature)


def test_a_search_goes_on_and_other_images_start_anew(phantoms, run, capsys):
    settings = ["tune", "sampling", DEMO, *tiny(phantoms, run.parent)]
    journal = run / "tuning" / "trials.jsonl"
    before, table = journal.read_text(), (run / "tuning" / "trials.csv").read_bytes()
    lines = before.splitlines(keepends=True)
    journal.write_text("".join(lines[:5]) + lines[5][:20])  # as after a kill
    assert main([*settings, "-n", "28"]) == 0
    assert journal.read_text().splitlines()[:5] == before.splitlines()[:5]
    assert (run / "tuning" / "trials.csv").read_bytes() == table
    number = len(journal.read_text().splitlines())
    assert main([*settings, "-n", "28"]) == 0
    assert len(journal.read_text().splitlines()) == number
    capsys.readouterr()
    assert main([*settings, "-n", "35"]) == 0
    assert len(journal.read_text().splitlines()) == 2 * number - 1  # one of the first lines was damaged
    assert "sample.levels.top.temperature=" in capsys.readouterr().out


def test_what_cannot_be_tuned_is_said(phantoms, run, tmp_path, capsys):
    assert main(["tune", "sampling", DEMO, *tiny(phantoms, run.parent), "-n", "3"]) == 2
    assert "at least 20" in capsys.readouterr().err
    assert main(["tune", "sampling", DEMO, *tiny(phantoms, tmp_path)]) == 2
    assert "is not finished" in capsys.readouterr().err
