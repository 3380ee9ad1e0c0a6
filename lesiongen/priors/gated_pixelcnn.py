"""Gated PixelCNN prior (van den Oord et al. 2016, arXiv:1606.05328; reports 001 and 002): two stacks, no blind spot.

The vertical stack sees all rows above. The horizontal stack sees the positions to the left in its own row and receives the
vertical stack's features. The context of each position enters every gate of both stacks.

Shapes as in prior.py and causal.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from lesiongen.priors.causal import CausalConv, RowConv, Window, check_kernel
from lesiongen.priors.prior import BasePriorConfig, Prior


@dataclass(frozen=True)
class GatedPixelCNNConfig(BasePriorConfig):
    """Config of a Gated PixelCNN."""

    kind: Literal["gated_pixelcnn"] = "gated_pixelcnn"
    layers: int = 15
    width: int = 128
    kernel: int = 7  # of the first convolutions; the others are 3×3

    def __post_init__(self):
        super().__post_init__()
        check_kernel("kernel", self.kernel)


@dataclass
class BlockCache:
    """Cache of one block while sampling.

    Attributes:
        vertical: Latest inputs of the vertical convolution.
        horizontal: Latest inputs of the horizontal convolution.
        gate_inputs: What the vertical stack and the context add to the horizontal gates of the current row, [B, w, 2D].
    """

    vertical: Window
    horizontal: Window
    gate_inputs: torch.Tensor


@dataclass
class Cache:
    """Cache of the whole prior while sampling.

    Attributes:
        vertical: Latest inputs of the first vertical convolution.
        horizontal: Latest inputs of the first horizontal convolution.
        row: Embedded tokens of the current row, [B, w, D].
        blocks: One cache for each block.
    """

    vertical: Window
    horizontal: Window
    row: torch.Tensor
    blocks: list[BlockCache]


def gate(x: torch.Tensor) -> torch.Tensor:
    """Multiplies tanh of the first half of the channels by sigmoid of the second half, [..., 2D] → [..., D]."""
    a, b = x.chunk(2, -1)
    return a.tanh() * b.sigmoid()


class Block(nn.Module):
    """One gated layer of both stacks. In sampling the prior calls run_vertical() once per row, run_horizontal() per token."""

    def __init__(self, config: GatedPixelCNNConfig):
        super().__init__()
        width = config.width
        self.vertical, self.horizontal = RowConv(width, 2 * width, 2, 3), CausalConv(width, 2 * width, 1, 3)
        self.across, self.out = nn.Linear(2 * width, 2 * width), nn.Linear(width, width)  # across: vertical → horizontal
        self.known = nn.Linear(width, 4 * width, bias=False)  # projects the context, for the gates of both stacks
        self.dropout = config.dropout
        # The vertical stack has no residual connections, and a gate halves small values. Larger initial weights make up for
        # this; otherwise the signal would vanish with depth. Module.apply() gives the function whole weights, also where ZeRO 3
        # divides them (hpc/train/zero.py).
        self.vertical.apply(lambda layer: nn.init.normal_(layer.weight, std=2 / layer.in_features**0.5))

    def run_vertical(
        self, v: torch.Tensor, context: torch.Tensor, window: Window | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the vertical stack's layer.

        Args:
            v: Vertical features of the whole grid [B, h, w, D], or with a window those of the next row [B, w, D].
            context: Context of the same positions.
            window: Cache of the rows so far.

        Returns:
            Vertical features for the next block, in the shape of v, and the gate inputs [..., 2D] for run_horizontal().
        """
        vertical_context, horizontal_context = self.known(context).chunk(2, -1)
        x = self.vertical(v, window) + vertical_context
        return gate(x), self.across(x) + horizontal_context

    def run_horizontal(
        self, x: torch.Tensor, gate_inputs: torch.Tensor, window: Window | None = None, t: int = 0
    ) -> torch.Tensor:
        """Runs the horizontal stack's layer.

        Args:
            x: Horizontal features of the whole grid [B, h, w, D], or with a window those of position t [B, D].
            gate_inputs: What run_vertical() returned for the same positions.
            window: Cache of the positions so far.
            t: The position; with a window only.

        Returns:
            Horizontal features for the next block, in the shape of x.
        """
        y = gate(self.horizontal(x, window, t) + gate_inputs)
        return x + self.out(F.dropout(y, self.dropout, self.training))

    def forward(
        self, v_BhwD: torch.Tensor, x_BhwD: torch.Tensor, context_BhwD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs both layers over the whole grid.

        Args:
            v_BhwD: Vertical features.
            x_BhwD: Horizontal features.
            context_BhwD: Context.

        Returns:
            Vertical and horizontal features for the next block, [B, h, w, D] each.
        """
        v_BhwD, gate_inputs = self.run_vertical(v_BhwD, context_BhwD)
        return v_BhwD, self.run_horizontal(x_BhwD, gate_inputs)


class GatedPixelCNN(Prior):
    """A first convolution for each stack, gated blocks, and a last layer on the horizontal features."""

    def __init__(
        self,
        config: GatedPixelCNNConfig,
        grid: tuple[int, int],
        entries: int,
        facts: dict[str, int],
        upper: tuple[tuple[int, tuple[int, int]], ...] = (),
    ):
        """Builds the layers. Arguments as for Prior."""
        super().__init__(config, grid, entries, facts, upper)
        width, kernel = config.width, config.kernel
        self.down = RowConv(width, width, kernel // 2, kernel)  # first convolution of the vertical stack
        self.right = CausalConv(width, width, 1, kernel, include_self=False)  # first convolution of the horizontal stack
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.last = nn.Linear(width, width)

    def features(self, codes_BT: torch.Tensor, context_BTD: torch.Tensor) -> torch.Tensor:
        tokens_BhwD, context_BhwD = self.tokens(codes_BT).unflatten(1, self.grid), context_BTD.unflatten(1, self.grid)
        # Shift the vertical stack's input down by one row. It then sees only rows above, although it sees them whole.
        v_BhwD, x_BhwD = self.down(F.pad(tokens_BhwD[:, :-1], (0, 0, 0, 0, 1, 0))), self.right(tokens_BhwD)
        for block in self.blocks:
            v_BhwD, x_BhwD = self.run_block(block, v_BhwD, x_BhwD, context_BhwD)
        return self._output(x_BhwD).flatten(1, 2)

    def _output(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.last(F.relu(x)))

    def new_cache(self, context_BTD: torch.Tensor) -> Cache:
        batch, columns, width = len(context_BTD), self.grid[1], self.config.width
        blocks = [
            BlockCache(
                block.vertical.new_cache(context_BTD, columns),
                block.horizontal.new_cache(context_BTD, columns),
                context_BTD.new_zeros(batch, columns, 2 * width),
            )
            for block in self.blocks
        ]
        vertical, horizontal = self.down.new_cache(context_BTD, columns), self.right.new_cache(context_BTD, columns)
        return Cache(vertical, horizontal, context_BTD.new_zeros(batch, columns, width), blocks)

    def step(self, previous_B: torch.Tensor | None, context_BTD: torch.Tensor, cache: Cache, t: int) -> torch.Tensor:
        columns = self.grid[1]
        column = t % columns
        x_BD = None
        if previous_B is not None:
            x_BD = self.tokens(previous_B)
            cache.row[:, (t - 1) % columns] = x_BD
        if column == 0:
            self._start_row(context_BTD[:, t : t + columns], cache)
        x_BD = self.right(x_BD, cache.horizontal, t)
        for block, block_cache in zip(self.blocks, cache.blocks, strict=True):
            x_BD = block.run_horizontal(x_BD, block_cache.gate_inputs[:, column], block_cache.horizontal, t)
        return self._output(x_BD)

    def _start_row(self, context_BwD: torch.Tensor, cache: Cache) -> None:
        """Runs the vertical stack for a whole row. At its first position the row above, in cache.row, is complete."""
        v_BwD = self.down(cache.row, cache.vertical)
        for block, block_cache in zip(self.blocks, cache.blocks, strict=True):
            v_BwD, gate_inputs = block.run_vertical(v_BwD, context_BwD, block_cache.vertical)
            block_cache.gate_inputs.copy_(gate_inputs)
