"""plan: what a run will cost, before it is queued: parameters, memory per GPU for each ZeRO stage, tokens, operations, steps.

Parameters are counted on models that take no memory, and activations on a training step that takes none (hpc/train/memory.py);
the scratch of a convolution's kernels comes on top, 10 to 30 % on CPU, and so does what the allocator keeps.
The rest follows Rajbhandari et al. 2020 (ZeRO, section 3): with fp32 parameters 4 bytes each for parameters and gradients
and 8 for Adam's moments; stage 1 shards the moments over ranks, 2 the gradients too, 3 the parameters too. Stages 1 and 2
keep an fp32 copy of their shard beside the model.
"""

import math

import torch
from torch import nn

from hpc.errors import UserError
from hpc.train.engine import EngineConfig
from hpc.train.memory import peak_activations
from lesiongen import priors, tokenizers
from lesiongen.experiment import Experiment
from lesiongen.priors import objective as prior_objective
from lesiongen.priors.prior import PriorShape
from lesiongen.tokenizers import TokenizerModel
from lesiongen.tokenizers import objective as tokenizer_objective
from lesiongen.tokenizers.losses import LossConfig, Reconstruction

GIB = 2**30
ASSUMED = {"label": 7, "site": 12, "sex": 2, "age_band": 5}  # values of each fact, before any data are packed


def parameters_by_part(net: nn.Module) -> dict[str, int]:
    """Trainable parameters of each part."""
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    return {name: n for name, n in parts.items() if n}


def tokenizer_parameters(config: TokenizerModel, channels: int) -> dict[str, int]:
    """Trainable parameters of each part, and the codebooks' buffers."""
    with torch.device("meta"):
        net = tokenizers.make(config, channels, batch=1)
    return parameters_by_part(net) | {"buffers": sum(b.numel() for b in net.buffers())}


def prior_parameters(config: PriorShape, shape: dict) -> dict[str, int]:
    with torch.device("meta"):
        return parameters_by_part(priors.make(config, **shape))


def tokenizer_activations(config: Experiment, micro: int) -> int:
    """Bytes at the worst moment of one micro-batch."""
    own, size, channels = config.tokenizer, config.data.size, config.data.channels
    loss = Reconstruction(own.loss, 1.0)

    def step():
        module = tokenizer_objective.Objective(tokenizers.make(own.model, channels, own.train.batch), LossConfig(), 1.0)
        module.reconstruction = loss
        image = torch.zeros(micro, channels, size, size, dtype=torch.uint8)
        return module.train(), {"image": image, "slot": torch.arange(micro), "position": torch.arange(micro)}

    return peak_activations(step, own.train.engine.precision == "bf16")


def prior_activations(config: PriorShape, shape: dict, micro: int, bf16: bool = False) -> int:
    """Bytes at the worst moment of one micro-batch."""

    def step():
        return prior_objective.Objective(priors.make(config, **shape)).train(), prior_objective.blank_batch(shape, micro)

    return peak_activations(step, bf16)


def memory_per_gpu(parameters: int, activations: int, zero: int, ranks: int, engine: EngineConfig) -> dict[str, float]:
    """Bytes on one GPU, by part; activations: bytes of one micro-batch. An evaluation takes a whole copy of the weights
    when a step's activations are gone: the larger of the two counts."""
    shard, here = 1 / ranks, not (engine.offload and zero)
    found = {
        "parameters": 4 * parameters * (shard if zero == 3 else 1),
        "gradients": 4 * parameters * (shard if zero >= 2 else 1),
        "optimizer": 8 * parameters * (shard if zero >= 1 else 1) * here,
        "fp32 copy": 4 * parameters * shard * here if zero in (1, 2) else 0,
        "average": 4 * parameters * (shard if zero >= 1 else 1) if engine.average else 0,
    }
    passing = {"activations": activations, "evaluation": 4 * parameters}
    return found | passing | {"in all": sum(found.values()) + max(passing.values())}


def report(config: Experiment) -> str:
    """The whole plan as text."""
    ranks, model = config.local.ranks, config.tokenizer.model
    grids = model.grids(config.data.size)
    values = ASSUMED | {"label": len(config.data.classes) or ASSUMED["label"]}
    lines = [f"{config.name}: {config.data.size} px, {ranks} ranks (local.ranks); {values['label']} classes assumed", ""]
    parts = tokenizer_parameters(model, config.data.channels)
    grid_text = " + ".join(f"{grids[n]}² {n}" for n in reversed(model.names))
    title, train = f"tokenizer   {grid_text}, K={model.entries}", config.tokenizer.train
    activations = tokenizer_activations(config, _micro_batch("tokenizer", train, ranks))
    lines += _section(title, parts, activations, train, ranks)
    upper: tuple = ()
    for level in config.levels:
        own, grid = config.prior(level), (grids[level], grids[level])
        shape = {"grid": grid, "entries": model.entries, "facts": {f: values[f] for f in own.facts}, "upper": upper}
        parts, micro = prior_parameters(own.model, shape), _micro_batch(f"prior-{level}", own.train, ranks)
        activations = prior_activations(own.model, shape, micro, own.train.engine.precision == "bf16")
        title = f"prior-{level}   {own.model.kind}, {math.prod(grid)} tokens a sample, K={model.entries}"
        lines += _section(
            title,
            parts,
            activations,
            own.train,
            ranks,
            math.prod(grid),
            prior_objective.training_flops_per_sample(own.model, shape),
        )
        upper += ((model.entries, grid),)
    codes = sum(g**2 for g in grids.values()) * (1 if model.entries <= 256 else 2) * config.encode.draws
    lines.append(f"code store  {codes:,} bytes per training image ({config.encode.draws} draws)")
    return "\n".join(lines)


def _micro_batch(what: str, train, ranks: int) -> int:
    try:
        return train.engine.micro_batch(train.batch, ranks)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from None


def _section(
    title: str, parts: dict[str, int], activations: int, train, ranks: int, tokens: int | None = None, flops: int = 0
) -> list[str]:
    micro, trainable = _micro_batch(title.split()[0], train, ranks), sum(n for k, n in parts.items() if "buffers" not in k)
    steps = math.ceil(train.samples / train.batch)
    lines = [title, "  parameters  " + ", ".join(f"{k} {v:,}" for k, v in parts.items()) + f"; trainable {trainable:,}"]
    per_step = f"{train.batch} images" + (f", {train.batch * tokens:,} tokens" if tokens else "")
    seen = f"{train.samples:,} samples" + (f", {train.samples * tokens:,} tokens" if tokens else "")
    seen += f", {train.samples * flops:.2g} floating-point operations" if flops else ""
    lines.append(f"  a step      {per_step}; {micro} images per rank and micro-batch × {train.engine.accumulation}")
    lines.append(f"  in all      {seen}, {steps:,} steps")
    columns = ("parameters", "gradients", "optimizer", "fp32 copy", "average", "activations", "evaluation", "in all")
    widths = (11, 11, 11, 11, 9, 13, 12, 9)
    lines.append("  GiB per GPU" + "".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True)))
    for zero in range(4):
        found = memory_per_gpu(trainable, activations, zero, ranks, train.engine)
        mark = "→" if zero == train.engine.zero else " "
        cells = "".join(f"{v / GIB:>{w}.3f}" for v, w in zip(found.values(), widths, strict=True))
        lines.append(f"  {mark} ZeRO {zero}    {cells}")
    return [*lines, ""]
