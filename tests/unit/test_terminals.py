"""Terminals that lack characters of what is printed: names of users' folders, bars, signs."""

import io
import sys

from launch.__main__ import main
from tests.conftest import DEMO, tiny

NAME = "Läsionen × █ 病変"


def test_every_verb_prints_on_any_terminal(phantoms, tmp_path, monkeypatch):
    folder = tmp_path / NAME / "photos"
    folder.parent.mkdir()
    folder.symlink_to(phantoms)
    run = [DEMO, *tiny(folder, tmp_path / NAME, name=NAME)]
    out, err = (io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    codes = [main(command) for command in (["pack", *run], ["plan", *run], ["status", str(tmp_path / NAME / NAME)])]
    codes += [main(["verify", str(tmp_path / NAME)]), main(["logs", str(tmp_path / NAME / NAME)]), main(["run", NAME])]
    codes.append(main(["pack", *run, "data.images=photos-\udce9"]))  # a name that is not UTF-8 on the disk
    said = err.buffer.getvalue().decode("ascii")
    assert codes == [0, 0, 0, 0, 2, 2, 2], said
    assert "Traceback" not in said
    assert "L?sionen" in out.buffer.getvalue().decode("ascii")
