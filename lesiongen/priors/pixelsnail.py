"""PixelSNAIL prior (Chen et al. 2017, arXiv:1712.09763), as VQ-VAE-2 has it (Razavi et al. 2019, arXiv:1906.00446): gated
residual causal convolutions, and in each block attention over all that came before.

VQ-VAE-2 leaves attention out on the bottom. The convolutions see what a masked kernel × kernel one does (Chen's see 2×2,
down-right), so that the upper right is not lost there. RMSNorm at each position stands where they normalise weights.

Shapes as in prior.py and causal.py, and H heads, E head dimension.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from lesiongen.priors.causal import CausalConv, Window, check_kernel
from lesiongen.priors.prior import Prior, PriorShape


@dataclass(frozen=True)
class PixelSNAILConfig(PriorShape):
    kind: Literal["pixelsnail"] = "pixelsnail"
    layers: int = 4  # blocks
    width: int = 256
    residual_blocks: int = 4  # in each block
    attention: bool = True
    heads: int = 8
    kernel: int = 5

    def __post_init__(self):
        super().__post_init__()
        check_kernel("kernel", self.kernel)
        if self.residual_blocks < 1:
            raise ValueError("residual_blocks must be at least 1")
        if self.attention and (self.heads < 1 or self.width % (2 * self.heads)):
            raise ValueError(f"width {self.width} must be a multiple of 2 × heads ({2 * self.heads})")


def background(grid: tuple[int, int]) -> torch.Tensor:
    """Row and column of each position, [T, 2], within ±0.5."""
    axes = [(torch.arange(n) + 0.5) / n - 0.5 for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)


class Residual(nn.Module):
    """Two causal convolutions, the second gated."""

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        width, rows = config.width, config.kernel // 2 + 1
        self.norm = nn.RMSNorm(width)
        self.first = CausalConv(width, width, rows, config.kernel)
        self.second = CausalConv(width, 2 * width, rows, config.kernel)
        self.known = nn.Linear(width, 2 * width, bias=False)
        self.dropout = config.dropout

    def forward(self, x, known, windows: tuple[Window | None, Window | None] = (None, None), t: int = 0) -> torch.Tensor:
        """x and known: [B, h, w, D], or with windows those of position t, [B, D]."""
        y = F.dropout(F.elu(self.first(F.elu(self.norm(x)), windows[0], t)), self.dropout, self.training)
        return x + F.glu(self.second(y, windows[1], t) + self.known(known))


class Attention(nn.Module):
    """Over what the block was given, what its convolutions made of it, and where each position is."""

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        width = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.norm = nn.RMSNorm(2 * width)
        self.qkv = nn.Linear(2 * width + 2, 3 * width // 2, bias=False)
        self.mix, self.out = nn.Linear(width + width // 2, width), nn.Linear(width, 2 * width)

    def new_cache(self, context_BTD: torch.Tensor) -> torch.Tensor:
        """Keys and values, [2, B, H, T, E]."""
        batch, length, width = context_BTD.shape
        return context_BTD.new_zeros(2, batch, self.heads, length, width // 2 // self.heads)

    def forward(self, given, x, place, cache: torch.Tensor | None = None, t: int = 0) -> torch.Tensor:
        """given, x: [B, T, D], place: [T, 2]; with a cache, which takes keys and values at t, those of position t alone:
        [B, D] and [1, 2]."""
        shape, batch = x.shape, len(x)
        both = self.norm(torch.cat([given, x], -1)).reshape(batch, -1, 2 * shape[-1])
        seen = torch.cat([both, place.expand(batch, -1, -1)], -1)
        q, k, v = self.qkv(seen).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0][:, :, t : t + 1], cache[1][:, :, t : t + 1] = k, v
            k, v = cache[0][:, :, : t + 1], cache[1][:, :, : t + 1]
        found = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        found = found.transpose(1, 2).reshape(*shape[:-1], -1)
        y = F.dropout(F.elu(self.mix(F.elu(torch.cat([x, found], -1)))), self.dropout, self.training)
        return x + F.glu(self.out(y))


class Block(nn.Module):
    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        self.residuals = nn.ModuleList(Residual(config) for _ in range(config.residual_blocks))
        self.attention = Attention(config) if config.attention else None

    def forward(self, x_BhwD, context_BhwD, position_T2) -> torch.Tensor:
        given = x_BhwD
        for residual in self.residuals:
            x_BhwD = residual(x_BhwD, context_BhwD)
        if self.attention is None:
            return x_BhwD
        return self.attention(given.flatten(1, 2), x_BhwD.flatten(1, 2), position_T2).reshape(given.shape)

    def step(self, x_BD, context_BD, position_12, cache: dict, t: int) -> torch.Tensor:
        given = x_BD
        for residual, windows in zip(self.residuals, cache["windows"], strict=True):
            x_BD = residual(x_BD, context_BD, windows, t)
        return x_BD if self.attention is None else self.attention(given, x_BD, position_12, cache["attention"], t)


class PixelSNAIL(Prior):
    def __init__(self, config: PixelSNAILConfig, grid, entries, facts, upper=()):
        super().__init__(config, grid, entries, facts, upper)
        width = config.width
        self.first = CausalConv(width, width, config.kernel // 2 + 1, config.kernel, itself=False)
        self.place = nn.Linear(2, width, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(width)
        self.register_buffer("background", background(grid), persistent=False)

    def features(self, codes_BT: torch.Tensor, context_BTD: torch.Tensor) -> torch.Tensor:
        tokens_BTD = self.tokens(codes_BT)
        # Without the code before it, in raster order, no position in reach of attention would hold the last code of the
        # row above (Chen et al. give attention the codes themselves, one late).
        x_BTD = F.pad(tokens_BTD[:, :-1], (0, 0, 1, 0)) + self.place(self.background)
        x_BhwD = self.first(tokens_BTD.unflatten(1, self.grid)) + x_BTD.unflatten(1, self.grid)
        context_BhwD = context_BTD.unflatten(1, self.grid)
        for block in self.blocks:
            x_BhwD = self.run_block(block, x_BhwD, context_BhwD, self.background)
        return self._out(x_BhwD).flatten(1, 2)

    def _out(self, x: torch.Tensor) -> torch.Tensor:
        return F.elu(self.norm(x))

    def new_cache(self, context_BTD: torch.Tensor) -> dict:
        columns, blocks = self.grid[1], []
        for block in self.blocks:
            pairs = [(r.first, r.second) for r in block.residuals]
            windows = [tuple(conv.new_cache(context_BTD, columns) for conv in pair) for pair in pairs]
            attention = block.attention and block.attention.new_cache(context_BTD)
            blocks.append({"windows": windows, "attention": attention})
        return {"first": self.first.new_cache(context_BTD, columns), "blocks": blocks}

    def step(self, previous_B, context_BTD, cache, t: int) -> torch.Tensor:
        position_12 = self.background[t : t + 1]
        before = None if previous_B is None else self.tokens(previous_B)
        x_BD = self.first(before, cache["first"], t) + self.place(position_12)
        x_BD = x_BD if before is None else x_BD + before
        for block, kept in zip(self.blocks, cache["blocks"], strict=True):
            x_BD = block.step(x_BD, context_BTD[:, t], position_12, kept, t)
        return self._out(x_BD)
