"""PixelSNAIL prior (Chen et al. 2017, arXiv:1712.09763), as in VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446).

Each block has gated residual causal convolutions, then attention over all positions up to its own.

- VQ-VAE-2 has no attention in its bottom prior; here `attention: false` does the same.
- The convolutions see as much as a masked kernel × kernel convolution, so they see the upper right also without attention.
  Chen et al. use 2×2 down-right shifted ones.
- RMSNorm at each position replaces the weight normalisation of Chen et al.

Shapes as in prior.py and causal.py, and H heads, E head dimension.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from lesiongen.priors.causal import CausalConv, Window, check_kernel
from lesiongen.priors.prior import BasePriorConfig, Prior


@dataclass(frozen=True)
class PixelSNAILConfig(BasePriorConfig):
    """Config of a PixelSNAIL."""

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


@dataclass
class BlockCache:
    """Cache of one block while sampling.

    Attributes:
        windows: For each residual, the latest inputs of its two convolutions.
        attention: Keys and values, [2, B, H, T, E]; None without attention.
    """

    windows: list[tuple[Window, Window]]
    attention: torch.Tensor | None


@dataclass
class Cache:
    """Cache of the whole prior while sampling.

    Attributes:
        first: Latest inputs of the first convolution.
        blocks: One cache for each block.
    """

    first: Window
    blocks: list[BlockCache]


def coordinates(grid: tuple[int, int]) -> torch.Tensor:
    """Returns the row and column of each position, scaled to ±0.5, [T, 2]."""
    axes = [(torch.arange(n) + 0.5) / n - 0.5 for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)


class Residual(nn.Module):
    """Two causal convolutions, the second gated, added to the input."""

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        width, rows = config.width, config.kernel // 2 + 1
        self.norm = nn.RMSNorm(width)
        self.first = CausalConv(width, width, rows, config.kernel)
        self.second = CausalConv(width, 2 * width, rows, config.kernel)
        self.known = nn.Linear(width, 2 * width, bias=False)  # projects the context
        self.dropout = config.dropout

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        windows: tuple[Window | None, Window | None] = (None, None),
        t: int = 0,
    ) -> torch.Tensor:
        """Applies the convolutions to a whole grid, or to one position in sampling.

        Args:
            x: Features of the whole grid [B, h, w, D], or with windows those of position t [B, D].
            context: Context of the same positions.
            windows: Caches of the two convolutions' inputs so far.
            t: The position; with windows only.

        Returns:
            Features in the shape of x.
        """
        y = F.dropout(F.elu(self.first(F.elu(self.norm(x)), windows[0], t)), self.dropout, self.training)
        return x + F.glu(self.second(y, windows[1], t) + self.known(context))


class Attention(nn.Module):
    """Causal attention over a block's input, the result of its convolutions, and the coordinates of each position."""

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        width = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.norm = nn.RMSNorm(2 * width)
        self.qkv = nn.Linear(2 * width + 2, 3 * width // 2, bias=False)
        # mix combines the features with the attended values, which have half their channels.
        self.mix, self.out = nn.Linear(width + width // 2, width), nn.Linear(width, 2 * width)

    def new_cache(self, context_BTD: torch.Tensor) -> torch.Tensor:
        """Allocates the keys and values, [2, B, H, T, E]."""
        batch, length, width = context_BTD.shape
        return context_BTD.new_zeros(2, batch, self.heads, length, width // 2 // self.heads)

    def forward(
        self,
        block_input: torch.Tensor,
        x: torch.Tensor,
        position_T2: torch.Tensor,
        cache: torch.Tensor | None = None,
        t: int = 0,
    ) -> torch.Tensor:
        """Attends over all positions up to each one.

        Args:
            block_input: Input of the block, [B, T, D], or with a cache that of position t alone, [B, D].
            x: Result of the block's convolutions, in the same shape.
            position_T2: Coordinates of all positions, or with a cache those of position t, [1, 2].
            cache: Keys and values so far, [2, B, H, T, E]; those of position t are written to it.
            t: The position; with a cache only.

        Returns:
            Features for the next block, in the shape of x.
        """
        shape, batch = x.shape, len(x)
        both = self.norm(torch.cat([block_input, x], -1)).reshape(batch, -1, 2 * shape[-1])
        inputs = torch.cat([both, position_T2.expand(batch, -1, -1)], -1)
        q, k, v = self.qkv(inputs).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0][:, :, t : t + 1], cache[1][:, :, t : t + 1] = k, v
            k, v = cache[0][:, :, : t + 1], cache[1][:, :, : t + 1]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        attended = attended.transpose(1, 2).reshape(*shape[:-1], -1)
        y = F.dropout(F.elu(self.mix(F.elu(torch.cat([x, attended], -1)))), self.dropout, self.training)
        return x + F.glu(self.out(y))


class Block(nn.Module):
    """Residual convolutions, then attention if the config has it."""

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        self.residuals = nn.ModuleList(Residual(config) for _ in range(config.residual_blocks))
        self.attention = Attention(config) if config.attention else None

    def forward(self, x_BhwD: torch.Tensor, context_BhwD: torch.Tensor, position_T2: torch.Tensor) -> torch.Tensor:
        """Applies the block to a whole grid.

        Args:
            x_BhwD: Features.
            context_BhwD: Context.
            position_T2: Coordinates of all positions.

        Returns:
            Features for the next block, [B, h, w, D].
        """
        block_input = x_BhwD
        for residual in self.residuals:
            x_BhwD = residual(x_BhwD, context_BhwD)
        if self.attention is None:
            return x_BhwD
        return self.attention(block_input.flatten(1, 2), x_BhwD.flatten(1, 2), position_T2).reshape(block_input.shape)

    def step(
        self, x_BD: torch.Tensor, context_BD: torch.Tensor, position_12: torch.Tensor, cache: BlockCache, t: int
    ) -> torch.Tensor:
        """Applies the block to one position in sampling.

        Args:
            x_BD: Features of position t.
            context_BD: Context of position t.
            position_12: Coordinates of position t.
            cache: Cache of the block; this call updates it.
            t: The position.

        Returns:
            Features for the next block, [B, D].
        """
        block_input = x_BD
        for residual, windows in zip(self.residuals, cache.windows, strict=True):
            x_BD = residual(x_BD, context_BD, windows, t)
        return x_BD if self.attention is None else self.attention(block_input, x_BD, position_12, cache.attention, t)


class PixelSNAIL(Prior):
    """A first convolution without its own position, then blocks of convolutions and attention."""

    def __init__(
        self,
        config: PixelSNAILConfig,
        grid: tuple[int, int],
        entries: int,
        facts: dict[str, int],
        upper: tuple[tuple[int, tuple[int, int]], ...] = (),
    ):
        """Builds the layers. Arguments as for Prior."""
        super().__init__(config, grid, entries, facts, upper)
        width = config.width
        self.first = CausalConv(width, width, config.kernel // 2 + 1, config.kernel, include_self=False)
        self.place = nn.Linear(2, width, bias=False)  # embeds the coordinates of a position
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(width)
        self.register_buffer("background", coordinates(grid), persistent=False)  # coordinates of all positions, [T, 2]

    def features(self, codes_BT: torch.Tensor, context_BTD: torch.Tensor) -> torch.Tensor:
        tokens_BTD = self.tokens(codes_BT)
        # Also add the previous token in raster order. Otherwise the last code of a row would enter only positions near the
        # right edge of the next rows, and the positions before them could not see it, not even by attention. (Chen et al. give
        # attention the codes themselves, shifted by one.)
        x_BTD = F.pad(tokens_BTD[:, :-1], (0, 0, 1, 0)) + self.place(self.background)
        x_BhwD = self.first(tokens_BTD.unflatten(1, self.grid)) + x_BTD.unflatten(1, self.grid)
        context_BhwD = context_BTD.unflatten(1, self.grid)
        for block in self.blocks:
            x_BhwD = self.run_block(block, x_BhwD, context_BhwD, self.background)
        return self._output(x_BhwD).flatten(1, 2)

    def _output(self, x: torch.Tensor) -> torch.Tensor:
        return F.elu(self.norm(x))

    def new_cache(self, context_BTD: torch.Tensor) -> Cache:
        columns, blocks = self.grid[1], []
        for block in self.blocks:
            pairs = [(r.first, r.second) for r in block.residuals]
            windows = [tuple(conv.new_cache(context_BTD, columns) for conv in pair) for pair in pairs]
            attention = block.attention and block.attention.new_cache(context_BTD)
            blocks.append(BlockCache(windows, attention))
        return Cache(self.first.new_cache(context_BTD, columns), blocks)

    def step(self, previous_B: torch.Tensor | None, context_BTD: torch.Tensor, cache: Cache, t: int) -> torch.Tensor:
        position_12 = self.background[t : t + 1]
        previous_BD = None if previous_B is None else self.tokens(previous_B)
        x_BD = self.first(previous_BD, cache.first, t) + self.place(position_12)
        x_BD = x_BD if previous_BD is None else x_BD + previous_BD
        for block, block_cache in zip(self.blocks, cache.blocks, strict=True):
            x_BD = block.step(x_BD, context_BTD[:, t], position_12, block_cache, t)
        return self._output(x_BD)
