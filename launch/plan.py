"""plan: what a run will cost, from arithmetic alone: parameters, memory per GPU for each ZeRO stage, tokens, steps.

Memory follows Rajbhandari et al. 2020 (ZeRO, section 3): with fp32 parameters 4 bytes each for parameters and gradients
and 8 for Adam's moments; stage 1 shards the moments over ranks, 2 the gradients too, 3 the parameters too. Stages 1 and 2
keep an fp32 copy of their shard beside the model.
"""

import math

import torch

from hpc.errors import UserError
from lesiongen.experiment import Experiment
from lesiongen.models.gpt import GPTConfig
from lesiongen.models.tokenizer import make
from lesiongen.models.vqvae import VQVAEConfig
from lesiongen.models.vqvae2 import VQVAE2Config

GIB = 2**30
TokenizerModel = VQVAEConfig | VQVAE2Config


def conv(inputs: int, outputs: int, kernel: int) -> int:
    return inputs * outputs * kernel**2 + outputs


def tokenizer_parameters(config: TokenizerModel, channels: int) -> dict[str, int]:
    """Trainable parameters of each part, and the codebooks' buffers; counted on a model that takes no memory."""
    with torch.device("meta"):
        net = make(config, channels, batch=1)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    return {name: n for name, n in parts.items() if n} | {"codebooks (buffers)": sum(b.numel() for b in net.buffers())}


def gpt_parameters(config: GPTConfig, entries: int, classes: int, upper: list[int]) -> dict[str, int]:
    width, hidden = config.width, -(-config.width * 8 // 3 // 32) * 32
    block = 4 * width**2 + 3 * width * hidden + 2 * width
    embeddings = (entries + 1 + classes + 1 + sum(upper)) * width + len(upper) * 2 * conv(width, width, 3)
    return {"blocks": config.layers * block, "embeddings": embeddings, "head": entries * width + width}


def tokenizer_activations(config: TokenizerModel, size: int, channels: int) -> int:
    """Numbers kept for the backward pass, per image."""
    total, side = 0, size
    for i, stride in enumerate(config.strides):
        for step in range(stride.bit_length() - 1):
            side //= 2
            total += (config.outer if step == 0 else config.hidden) * side**2
        cells = side**2
        # Encoder and decoder work at this grid: their convolutions, two tensors in each residual block, quantization.
        blocks = 2 * config.residual_layers * (2 * config.hidden + 2 * config.residual_hidden)
        total += cells * (blocks + 4 * config.hidden + 6 * config.dim * (len(config.strides) - i) + config.entries)
    return total + 3 * channels * size**2 + config.outer * (size // 2) ** 2


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
