"""The verb `plan`: what a run will cost, known before it is queued. Parameters, memory per GPU, tokens, operations, steps.

Parameters are counted on models without storage (torch's meta device). Activations are measured on a training step without
storage (hpc/train/memory.py). The scratch memory of convolution kernels, 10 to 30 % on a CPU, and the memory that the
allocator keeps are not included.

The other memory follows Rajbhandari et al. 2020 (ZeRO, section 3). With fp32 parameters, a parameter and its gradient take
4 bytes each, and Adam's two moments 8. ZeRO 1 shards the moments over the ranks, ZeRO 2 also the gradients, ZeRO 3 also the
parameters. ZeRO 1 and 2 keep an fp32 copy of each rank's shard beside the model.
"""

import math

import torch
from torch import nn

from hpc.errors import UserError
from hpc.train.engine import EngineConfig
from hpc.train.loop import TrainConfig
from hpc.train.memory import peak_activations
from lesiongen import priors, tokenizers
from lesiongen.experiment import Experiment
from lesiongen.priors import objective as prior_objective
from lesiongen.priors.prior import BasePriorConfig
from lesiongen.tokenizers import TokenizerModel
from lesiongen.tokenizers import objective as tokenizer_objective
from lesiongen.tokenizers.losses import LossConfig, ReconstructionLoss

GIB = 2**30
ASSUMED_VALUES = {"label": 7, "site": 12, "sex": 2, "age_band": 5}  # distinct values of each fact, before data are packed
# The columns of the memory table: what memory_per_gpu() returns, and the width of each column.
COLUMN_WIDTHS = {
    "parameters": 11,
    "gradients": 11,
    "optimizer": 11,
    "fp32 copy": 11,
    "average": 9,
    "activations": 13,
    "evaluation": 12,
    "total": 9,
}


def parameters_by_part(net: nn.Module) -> dict[str, int]:
    """Returns the number of trainable parameters of each child module that has any."""
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    return {name: number for name, number in parts.items() if number}


def tokenizer_parameters(config: TokenizerModel, channels: int) -> dict[str, int]:
    """Counts the parameters of a tokenizer.

    Args:
        config: The model's config.
        channels: Colour channels of the images, 1 or 3.

    Returns:
        {child module: trainable parameters}, and under "buffers" the numbers in the codebooks' buffers.
    """
    with torch.device("meta"):
        net = tokenizers.make(config, channels, batch=1)
    return parameters_by_part(net) | {"buffers": sum(b.numel() for b in net.buffers())}


def prior_parameters(config: BasePriorConfig, shape: dict) -> dict[str, int]:
    """Counts the parameters of a prior.

    Args:
        config: The model's config.
        shape: The arguments of `priors.make`: grid, entries, facts, upper.

    Returns:
        {child module: trainable parameters}.
    """
    with torch.device("meta"):
        return parameters_by_part(priors.make(config, **shape))


def tokenizer_activations(config: Experiment, micro: int) -> int:
    """Returns the peak bytes of a tokenizer's training step, without weights and gradients.

    Args:
        config: The run's config.
        micro: Images of the micro-batch.
    """
    tokenizer, size, channels = config.tokenizer, config.data.size, config.data.channels
    # The loss is made outside make_step, which runs on fake tensors: LPIPS reads its weights from a file.
    loss = ReconstructionLoss(tokenizer.loss, 1.0)

    def make_step() -> tuple[nn.Module, dict]:
        net = tokenizers.make(tokenizer.model, channels, tokenizer.train.batch)
        module = tokenizer_objective.Objective(net, LossConfig(), 1.0)
        module.reconstruction = loss
        image = torch.zeros(micro, channels, size, size, dtype=torch.uint8)
        return module.train(), {"image": image, "slot": torch.arange(micro), "position": torch.arange(micro)}

    return peak_activations(make_step, tokenizer.train.engine.precision == "bf16")


def prior_activations(config: BasePriorConfig, shape: dict, micro: int, bf16: bool = False) -> int:
    """Returns the peak bytes of a prior's training step, without weights and gradients.

    Args:
        config: The model's config.
        shape: The arguments of `priors.make`.
        micro: Samples of the micro-batch.
        bf16: Whether training runs under bf16 autocast.
    """

    def make_step() -> tuple[nn.Module, dict]:
        return prior_objective.Objective(priors.make(config, **shape)).train(), prior_objective.blank_batch(shape, micro)

    return peak_activations(make_step, bf16)


def memory_per_gpu(parameters: int, activations: int, zero: int, ranks: int, engine: EngineConfig) -> dict[str, float]:
    """Returns the bytes that a training takes on one GPU, by part, and their total.

    An evaluation needs a full copy of the weights, but only when a step's activations are freed. So the total counts the
    larger of the two.

    Args:
        parameters: Number of trainable parameters.
        activations: Peak bytes of the activations of one micro-batch.
        zero: ZeRO stage, 0 to 3.
        ranks: Number of ranks.
        engine: The engine's config; only `offload` and `average` matter.
    """
    shard, on_gpu = 1 / ranks, not (engine.offload and zero)
    permanent = {
        "parameters": 4 * parameters * (shard if zero == 3 else 1),
        "gradients": 4 * parameters * (shard if zero >= 2 else 1),
        "optimizer": 8 * parameters * (shard if zero >= 1 else 1) * on_gpu,
        "fp32 copy": 4 * parameters * shard * on_gpu if zero in (1, 2) else 0,
        "average": 4 * parameters * (shard if zero >= 1 else 1) if engine.average else 0,
    }
    temporary = {"activations": activations, "evaluation": 4 * parameters}
    return permanent | temporary | {"total": sum(permanent.values()) + max(temporary.values())}


def format_cost(config: Experiment) -> str:
    """Returns the cost of every training of a run, and the size of its code store, as text."""
    ranks, model = config.local.ranks, config.tokenizer.model
    grids = model.grids(config.data.size)
    fact_values = ASSUMED_VALUES | {"label": len(config.data.classes) or ASSUMED_VALUES["label"]}
    lines = [f"{config.name}: {config.data.size} px, {ranks} ranks (local.ranks); {fact_values['label']} classes assumed", ""]
    lines += _format_tokenizer(config, grids)
    upper: tuple = ()
    for level in config.levels:
        grid = (grids[level], grids[level])
        facts = {fact: fact_values[fact] for fact in config.prior(level).facts}
        lines += _format_prior(config, level, {"grid": grid, "entries": model.entries, "facts": facts, "upper": upper})
        upper += ((model.entries, grid),)
    code_bytes = 1 if model.entries <= 256 else 2
    image_bytes = sum(side**2 for side in grids.values()) * code_bytes * config.encode.draws
    lines.append(f"code store  {image_bytes:,} bytes per training image ({config.encode.draws} draws)")
    return "\n".join(lines)


def _format_tokenizer(config: Experiment, grids: dict[str, int]) -> list[str]:
    model, train, ranks = config.tokenizer.model, config.tokenizer.train, config.local.ranks
    micro = _micro_batch("tokenizer", train, ranks)
    parts = tokenizer_parameters(model, config.data.channels)
    activations = tokenizer_activations(config, micro)
    title = f"tokenizer   {' + '.join(f'{grids[name]}² {name}' for name in reversed(model.names))}, K={model.entries}"
    return [
        title,
        _format_parameters(parts),
        *_format_length(train, micro),
        *_format_memory(parts, activations, train, ranks),
        "",
    ]


def _format_prior(config: Experiment, level: str, shape: dict) -> list[str]:
    model, train, ranks = config.prior(level).model, config.prior(level).train, config.local.ranks
    micro = _micro_batch(f"prior-{level}", train, ranks)
    parts = prior_parameters(model, shape)
    activations = prior_activations(model, shape, micro, train.engine.precision == "bf16")
    tokens, flops = math.prod(shape["grid"]), prior_objective.training_flops_per_sample(model, shape)
    title = f"prior-{level}   {model.kind}, {tokens} tokens per sample, K={shape['entries']}"
    return [
        title,
        _format_parameters(parts),
        *_format_length(train, micro, tokens, flops),
        *_format_memory(parts, activations, train, ranks),
        "",
    ]


def _micro_batch(stage: str, train: TrainConfig, ranks: int) -> int:
    """Returns the samples in one micro-batch of one rank. Raises UserError if the batch cannot be divided so."""
    try:
        return train.engine.micro_batch(train.batch, ranks)
    except ValueError as error:
        raise UserError(f"{stage}: {error}") from None


def _trainable(parts: dict[str, int]) -> int:
    return sum(number for name, number in parts.items() if "buffers" not in name)


def _format_parameters(parts: dict[str, int]) -> str:
    numbers = ", ".join(f"{name} {number:,}" for name, number in parts.items())
    return f"  parameters  {numbers}; trainable {_trainable(parts):,}"


def _format_length(train: TrainConfig, micro: int, tokens: int = 0, flops: int = 0) -> list[str]:
    """Returns lines about one step and the whole training. tokens, flops: of one sample, for a prior."""
    step = f"{train.batch} images" + (f", {train.batch * tokens:,} tokens" if tokens else "")
    total = f"{train.samples:,} samples" + (f", {train.samples * tokens:,} tokens" if tokens else "")
    total += f", {train.samples * flops:.2g} floating-point operations" if flops else ""
    return [
        f"  per step    {step}; {micro} images per rank and micro-batch × {train.engine.accumulation}",
        f"  total       {total}, {math.ceil(train.samples / train.batch):,} steps",
    ]


def _format_memory(parts: dict[str, int], activations: int, train: TrainConfig, ranks: int) -> list[str]:
    """Returns a table of the memory per GPU: one row per ZeRO stage, the configured stage marked with an arrow."""
    lines = ["  GiB per GPU" + "".join(f"{name:>{width}}" for name, width in COLUMN_WIDTHS.items())]
    for zero in range(4):
        memory = memory_per_gpu(_trainable(parts), activations, zero, ranks, train.engine)
        mark = "→" if zero == train.engine.zero else " "
        cells = "".join(f"{memory[name] / GIB:>{width}.3f}" for name, width in COLUMN_WIDTHS.items())
        lines.append(f"  {mark} ZeRO {zero}    {cells}")
    return lines
