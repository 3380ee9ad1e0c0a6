"""demo: the whole pipeline in a few minutes, on lesions drawn by the project or on a person's own."""

import argparse
import time
from pathlib import Path

from hpc import config as hpc_config
from hpc import errors
from launch import pipeline
from lesiongen import experiment

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"


def demo(options: argparse.Namespace) -> int:
    """Draws the images where none are given, then `run`. The same command again goes on where it was."""
    from lesiongen.ingest import phantom

    began = time.monotonic()
    data = hpc_config.read_yaml(CONFIG)
    data["runs"] = options.out
    if options.images:
        data["data"] |= {"images": options.images, "metadata": options.metadata, "format": "jpg"}
        data["name"] = "demo-own-images"
    else:
        drawn = Path(options.out) / "demo-images"
        data["data"] |= {"images": str(drawn / "images"), "metadata": str(drawn / "metadata.csv")}
        phantom.write(drawn, lesions_per_class=100, size=96)
    config = experiment.make(hpc_config.override(data, options.overrides))
    code = pipeline.run_stages(config, pipeline.to_do(config))
    if code == errors.DONE:
        print(pipeline.where_to_look(config))
        print(f"took {(time.monotonic() - began) / 60:.1f} min")
    return code
