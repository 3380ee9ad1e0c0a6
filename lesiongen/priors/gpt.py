"""GPT prior over a grid of codes: SwiGLU, 2-D rotary positions, facts at every position, static KV cache.

Shapes as in prior.py, and H heads, E head dimension.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from lesiongen.priors.prior import Prior, PriorShape


@dataclass(frozen=True)
class GPTConfig(PriorShape):
    kind: Literal["gpt"] = "gpt"
    heads: int = 6

    def __post_init__(self):
        super().__post_init__()
        if self.heads < 1 or self.width % (4 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of 4 × heads ({4 * self.heads}): 2-D rotary needs it")


def rotary_table(grid: tuple[int, int], head_dim: int) -> torch.Tensor:
    """cos and sin [T, E/2, 2]: the first half of the pairs turns with the row, the second with the column."""
    frequencies = 100.0 ** (-torch.arange(head_dim // 4).float() / (head_dim // 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = torch.cat([p.reshape(-1, 1) * frequencies for p in (rows, columns)], 1)
    return torch.stack([angles.cos(), angles.sin()], -1)


def apply_rotary(x_BTHE: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Neighbouring pairs turned by the angles of their position."""
    pairs = x_BTHE.unflatten(-1, (-1, 2))
    table = table[:, None].to(pairs.dtype)
    if pairs.dtype == torch.float32 and not torch.compiler.is_compiling():  # complex numbers take one pass over memory,
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table)).flatten(-2)
    (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)  # but know no bf16, and no compiler fuses them
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Gate(nn.Linear):
    """SwiGLU's first half. Two products: the gradients of their results, the largest tensors, are never put together."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        a, b = (F.linear(x_BTD, half) for half in self.weight.chunk(2))
        return F.silu(a) * b


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        width, hidden = config.width, -(-config.width * 8 // 3 // 32) * 32
        self.heads, self.dropout = config.heads, config.dropout
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.down = Gate(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD, table, cache=None, at: int = 0):
        """cache: [2, B, H, T, E] written in place at token `at`; None in training."""
        batch, length, width = x_BTD.shape
        q, k, v = self.qkv(self.norm1(x_BTD)).view(batch, length, 3, self.heads, -1).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (apply_rotary(q, table), apply_rotary(k, table), v))
        if cache is not None:
            cache[0][:, :, at : at + length], cache[1][:, :, at : at + length] = k, v
            k, v = cache[0][:, :, : at + length], cache[1][:, :, : at + length]
        drop = self.dropout if self.training else 0.0
        # No dropout inside attention: it would leave the fused kernels (5 times slower on CPU).
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        x_BTD = x_BTD + F.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)), drop)
        return x_BTD + F.dropout(self.down(self.gate(self.norm2(x_BTD))), drop)


class GPT(Prior):
    def __init__(self, config: GPTConfig, grid, entries, facts, upper=()):
        super().__init__(config, grid, entries, facts, upper)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.register_buffer("table", rotary_table(grid, config.width // config.heads))  # with the weights: they fit no other
        self.apply(self._init)
        for block in self.blocks:
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / (2 * config.layers) ** 0.5)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def features(self, codes_BT: torch.Tensor, context_BTD: torch.Tensor) -> torch.Tensor:
        # Position t sees token t-1; position 0 sees what is known alone.
        x_BTD = F.pad(self.tokens(codes_BT[:, :-1]), (0, 0, 1, 0)) + context_BTD
        for block in self.blocks:
            x_BTD = self.run_block(block, x_BTD, self.table)
        return self.norm(x_BTD)

    def new_cache(self, context_BTD: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values of each block, [2, B, H, T, E]."""
        batch, heads = len(context_BTD), self.config.heads
        return [context_BTD.new_zeros(2, batch, heads, self.length, self.config.width // heads) for _ in self.blocks]

    def step(self, previous_B, context_BTD, cache, t: int) -> torch.Tensor:
        x = context_BTD[:, t : t + 1]
        if previous_B is not None:
            x = x + self.tokens(previous_B)[:, None]
        for block, kv in zip(self.blocks, cache, strict=True):
            x = block(x, self.table[t : t + 1], kv, t)
        return self.norm(x)[:, 0]
