"""The stages in the order of the pipeline.

Each file has stage(config), which describes the stage, and run(config, topology, folder), which makes its result. The command
line asks `stages` for the stages of a run.
"""

from lesiongen.experiment import Experiment
from lesiongen.stages import encode, evaluate, pack, polish, prior, sample, tokenizer
from lesiongen.stages.base import Stage


def stages(config: Experiment) -> dict[str, Stage]:
    """Returns the stages that this run makes itself, upstream first. Stages whose results `inputs` names are left out."""
    pipeline = [pack.stage(config), tokenizer.stage(config), encode.stage(config)]
    pipeline += [polish.stage(config)] if config.polish else []
    pipeline += [prior.stage(config, level) for level in config.levels]
    pipeline += [sample.stage(config), evaluate.stage(config)]
    return {s.name: s for s in pipeline if not getattr(config.inputs, s.name, None)}
