"""Trains generators of skin-lesion images: data, tokenizers, priors, stages, evaluation.

    import lesiongen

    generator = lesiongen.load("runs/ham10000")
    samples = generator.sample("mel", n=4, seed=0)

lesiongen/generator.py says what a generator can do.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lesiongen.generator import Generator


def load(path: str | Path, device: str | None = None) -> "Generator":
    """Loads a trained generator.

    Args:
        path: Directory of a run or of a published generator, or the path of a config.
        device: The device that computes, such as "cpu"; None for a GPU where there is one.

    Raises:
        UserError: The path is neither, or a model is not finished.
    """
    from lesiongen.generator import Generator  # imports torch, which takes seconds

    return Generator.of_run(path, device)
