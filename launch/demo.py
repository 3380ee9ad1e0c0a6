"""The verb `demo`: runs the whole pipeline in a few minutes, with configs/demo.yaml.

The images are lesions that lesiongen/ingest/phantom.py draws, or the user's own.
"""

import argparse
import time
from pathlib import Path

from hpc import config as hpc_config
from hpc import errors
from launch import pipeline
from lesiongen import experiment

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"


def run_demo(options: argparse.Namespace) -> int:
    """Draws the images, unless the user gives images, and runs every unfinished stage.

    Args:
        options: The options of the verb: `out`, `images`, `metadata`, `overrides`.

    Returns:
        The exit code.
    """
    from lesiongen.ingest import phantom

    start = time.monotonic()
    settings = hpc_config.read_yaml(CONFIG)
    settings["runs"] = options.out
    if options.images:
        settings["data"] |= {"images": options.images, "metadata": options.metadata, "format": "jpg"}
        settings["name"] = "demo-own-images"
    else:
        folder = Path(options.out) / "demo-images"
        settings["data"] |= {"images": str(folder / "images"), "metadata": str(folder / "metadata.csv")}
        phantom.write(folder, lesions_per_class=100, size=96)
    config = experiment.make(hpc_config.apply_overrides(settings, options.overrides))
    code = pipeline.run_stages(config, pipeline.stages_to_do(config))
    if code == errors.DONE:
        print(pipeline.result_locations(config))
        print(f"took {(time.monotonic() - start) / 60:.1f} min")
    return code
