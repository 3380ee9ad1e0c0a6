"""The stages in the order of the pipeline. Each file has stage(config) → Stage and run(config, topology, folder)."""

from lesiongen.experiment import Experiment
from lesiongen.stages import encode, evaluate, pack, prior, sample, tokenizer
from lesiongen.stages.base import Stage


def stages(config: Experiment) -> dict[str, Stage]:
    """Every stage this run makes itself, upstream first; those that `inputs` names are left out."""
    made = [pack.stage(config), tokenizer.stage(config), encode.stage(config)]
    made += [prior.stage(config, level) for level in config.levels]
    made += [sample.stage(config), evaluate.stage(config)]
    return {s.name: s for s in made if not getattr(config.inputs, s.name, None)}
