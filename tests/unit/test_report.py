"""The plots of the report."""

import io

from PIL import Image

from lesiongen.evaluation import plots


def test_classes_share_the_panel_of_their_level():
    plain = [{"samples": n, "train/usage/top": 0.5, "val/usage/top": 0.6, "val/perplexity/top": 9.0} for n in (1, 2)]
    parted = [row | {f"val/{what}/top/{c}": 0.3 for what in ("usage", "perplexity") for c in ("mel", "nv")} for row in plain]
    sizes = [Image.open(io.BytesIO(plots.curves({"tokenizer": rows}))).size for rows in (plain, parted)]
    assert sizes[0] == sizes[1]


def test_there_are_no_curves_of_nothing():
    assert plots.curves({"tokenizer": [{"samples": 1, "system/cpu": 3.0}]}) is None
