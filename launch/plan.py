"""plan: what a run will cost, from arithmetic alone: parameters, memory per GPU for each ZeRO stage, tokens, steps.

Memory follows Rajbhandari et al. 2020 (ZeRO, section 3): with fp32 parameters 4 bytes each for parameters and gradients
and 8 for Adam's moments; stage 1 shards the moments over ranks, 2 the gradients too, 3 the parameters too. Stages 1 and 2
keep an fp32 copy of their shard beside the model.
"""

import math

from hpc.errors import UserError
from lesiongen.experiment import Experiment
from lesiongen.models.gpt import GPTConfig
from lesiongen.models.vqvae2 import VQVAE2Config

GIB = 2**30


def conv(inputs: int, outputs: int, kernel: int) -> int:
    return inputs * outputs * kernel**2 + outputs


def tokenizer_parameters(config: VQVAE2Config, channels: int) -> dict[str, int]:
    """Trainable parameters of each part, and the codebooks' buffers."""
    residual = config.residual_layers * (
        conv(config.hidden, config.residual_hidden, 3) + conv(config.residual_hidden, config.hidden, 1)
    )

    def encoder(inputs: int, stride: int) -> int:
        total, width = 0, inputs
        for i in range(stride.bit_length() - 1):
            following = config.hidden // 2 if i == 0 else config.hidden
            total, width = total + conv(width, following, 4), following
        return total + conv(width, config.hidden, 3) + residual

    def decoder(inputs: int, outputs: int, stride: int) -> int:
        total, width, doublings = conv(inputs, config.hidden, 3) + residual, config.hidden, stride.bit_length() - 1
        for i in range(doublings):
            following = outputs if i + 1 == doublings else config.hidden // 2
            total, width = total + conv(width, following, 4), following
        return total

    levels, dim = len(config.strides), config.dim
    encoders = sum(encoder(channels if i == 0 else config.hidden, s) for i, s in enumerate(config.strides))
    decoders = decoder(levels * dim, channels, config.strides[0])
    decoders += sum(decoder((levels - 1 - i) * dim, dim, config.strides[i + 1]) for i in range(levels - 1))
    projections = sum(conv(config.hidden + (dim if i < levels - 1 else 0), dim, 1) for i in range(levels))
    ups = sum(conv(dim, dim, s) for s in config.strides[1:])
    books = levels * (config.entries * (2 * dim + 1) + 2 * dim)
    return {"encoders": encoders + projections, "decoders": decoders + ups, "codebooks (buffers)": books}


def gpt_parameters(config: GPTConfig, entries: int, classes: int, upper: list[int]) -> dict[str, int]:
    width, hidden = config.width, -(-config.width * 8 // 3 // 32) * 32
    block = 4 * width**2 + 3 * width * hidden + 2 * width
    embeddings = (entries + 1 + classes + 1 + sum(upper)) * width + len(upper) * 2 * conv(width, width, 3)
    return {"blocks": config.layers * block, "embeddings": embeddings, "head": entries * width + width}


def tokenizer_activations(config: VQVAE2Config, size: int, channels: int) -> int:
    """Numbers kept for the backward pass, per image."""
    total, side = 0, size
    for i, stride in enumerate(config.strides):
        for step in range(stride.bit_length() - 1):
            side //= 2
            total += (config.hidden // 2 if step == 0 else config.hidden) * side**2
        cells = side**2
        # Encoder and decoder work at this grid: their convolutions, two tensors in each residual block, quantization.
        blocks = 2 * config.residual_layers * (2 * config.hidden + 2 * config.residual_hidden)
        total += cells * (blocks + 4 * config.hidden + 6 * config.dim * (len(config.strides) - i) + config.entries)
    return total + 3 * channels * size**2 + (config.hidden // 2) * (size // 2) ** 2


def gpt_activations(config: GPTConfig, tokens: int, entries: int) -> int:
    """Numbers kept for the backward pass, per image; attention is fused and keeps no T×T matrix."""
    hidden = -(-config.width * 8 // 3 // 32) * 32
    layer = tokens * (config.width if config.checkpoint else 12 * config.width + 4 * hidden)
    return config.layers * layer + 3 * tokens * entries + 3 * tokens * config.width


def memory(parameters: int, activations: int, micro_batch: int, zero: int, ranks: int, bf16: bool) -> dict[str, float]:
    """Bytes on one GPU, by part."""
    shard = 1 / ranks
    found = {
        "parameters": 4 * parameters * (shard if zero == 3 else 1),
        "gradients": 4 * parameters * (shard if zero >= 2 else 1),
        "optimizer": 8 * parameters * (shard if zero >= 1 else 1),
        "fp32 copy": 4 * parameters * shard if zero in (1, 2) else 0,
        "activations": activations * micro_batch * (2 if bf16 else 4),
    }
    return found | {"in all": sum(found.values())}


def report(config: Experiment) -> str:
    """The whole plan as text."""
    size, ranks = config.data.size, config.local.ranks
    model = config.tokenizer.model
    grids = model.grids(size)
    classes = len(config.data.classes) or 7
    lines = [f"{config.name}: {size} px, {ranks} ranks (local.ranks); {classes} classes assumed", ""]
    parts = tokenizer_parameters(model, config.data.channels)
    trainable = sum(v for k, v in parts.items() if "buffers" not in k)
    activations = tokenizer_activations(model, size, config.data.channels)
    grid_text = " + ".join(f"{grids[n]}² {n}" for n in reversed(model.names))
    lines += _section(
        f"tokenizer   {grid_text}, K={model.entries}", parts, trainable, activations, config.tokenizer.train, ranks, None
    )
    upper: list[int] = []
    for level in config.levels:
        own, tokens = config.prior(level), grids[level] ** 2
        parts = gpt_parameters(own.model, model.entries, classes, upper)
        activations = gpt_activations(own.model, tokens, model.entries)
        title = f"prior-{level}   {tokens} tokens a sample, K={model.entries}"
        lines += _section(title, parts, sum(parts.values()), activations, own.train, ranks, tokens)
        upper.append(model.entries)
    codes = sum(g**2 for g in grids.values()) * (1 if model.entries <= 256 else 2) * config.encode.draws
    lines.append(f"code store  {codes:,} bytes per training image ({config.encode.draws} draws)")
    return "\n".join(lines)


def _section(
    title: str, parts: dict[str, int], trainable: int, activations: int, train, ranks: int, tokens: int | None
) -> list[str]:
    try:
        micro = train.engine.micro_batch(train.batch, ranks)
    except ValueError as error:
        raise UserError(f"{title.split()[0]}: {error}") from None
    steps = math.ceil(train.samples / train.batch)
    lines = [title, "  parameters  " + ", ".join(f"{k} {v:,}" for k, v in parts.items()) + f"; trainable {trainable:,}"]
    per_step = f"{train.batch} images" + (f", {train.batch * tokens:,} tokens" if tokens else "")
    seen = f"{train.samples:,} samples" + (f", {train.samples * tokens:,} tokens" if tokens else "")
    lines.append(f"  a step      {per_step}; {micro} images per rank and micro-batch × {train.engine.accumulation}")
    lines.append(f"  in all      {seen}, {steps:,} steps")
    bf16 = train.engine.precision == "bf16"
    columns = ("parameters", "gradients", "optimizer", "fp32 copy", "activations", "in all")
    widths = (11, 11, 11, 11, 13, 9)
    lines.append("  GiB per GPU" + "".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True)))
    for zero in range(4):
        found = memory(trainable, activations, micro, zero, ranks, bf16)
        mark = "→" if zero == train.engine.zero else " "
        cells = "".join(f"{v / GIB:>{w}.3f}" for v, w in zip(found.values(), widths, strict=True))
        lines.append(f"  {mark} ZeRO {zero}    {cells}")
    return [*lines, ""]
