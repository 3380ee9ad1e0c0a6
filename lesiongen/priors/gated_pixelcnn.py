"""Gated PixelCNN prior (van den Oord et al. 2016, arXiv:1606.05328; reports 001 and 002): two stacks, no blind spot.

The vertical stack sees all rows above, the horizontal one what is left in its own row and the vertical one's findings.
What is known of each position (facts, coarser codes) enters every gate of both.

Shapes as in prior.py and causal.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from lesiongen.priors.causal import CausalConv, RowConv, Window, check_kernel
from lesiongen.priors.prior import Prior, PriorShape


@dataclass(frozen=True)
class GatedPixelCNNConfig(PriorShape):
    kind: Literal["gated_pixelcnn"] = "gated_pixelcnn"
    layers: int = 15
    width: int = 128
    kernel: int = 7  # of the first convolutions; the others are 3×3

    def __post_init__(self):
        super().__post_init__()
        check_kernel("kernel", self.kernel)


@dataclass
class BlockCache:
    """What a block keeps while sampling."""

    down: Window  # inputs of the vertical convolution
    right: Window  # of the horizontal one
    above: torch.Tensor  # [B, w, 2D]: what the vertical stack and the known say to the gates of this row


def gate(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return a.tanh() * b.sigmoid()


class Block(nn.Module):
    def __init__(self, config: GatedPixelCNNConfig):
        super().__init__()
        width = config.width
        self.vertical, self.horizontal = RowConv(width, 2 * width, 2, 3), CausalConv(width, 2 * width, 1, 3)
        self.across, self.out = nn.Linear(2 * width, 2 * width), nn.Linear(width, width)
        self.known = nn.Linear(width, 4 * width, bias=False)
        self.dropout = config.dropout
        # The vertical stack has no shortcuts, and a gate halves what is small: this keeps depth from silencing it.
        nn.init.normal_(self.vertical.weight, std=2 / self.vertical.in_features**0.5)

    def down(self, v: torch.Tensor, known: torch.Tensor, window: Window | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, h, w, D], or with a window the next row [B, w, D] → the same of the next block, and [..., 2D] for right()."""
        own, other = self.known(known).chunk(2, -1)
        x = self.vertical(v, window) + own
        return gate(x), self.across(x) + other

    def right(self, x: torch.Tensor, above: torch.Tensor, window: Window | None = None, t: int = 0) -> torch.Tensor:
        """[B, h, w, D], or with a window position t alone, [B, D]."""
        y = gate(self.horizontal(x, window, t) + above)
        return x + self.out(F.dropout(y, self.dropout, self.training))

    def forward(self, v_BhwD, x_BhwD, context_BhwD) -> tuple[torch.Tensor, torch.Tensor]:
        v_BhwD, above = self.down(v_BhwD, context_BhwD)
        return v_BhwD, self.right(x_BhwD, above)


class GatedPixelCNN(Prior):
    def __init__(self, config: GatedPixelCNNConfig, grid, entries, facts, upper=()):
        super().__init__(config, grid, entries, facts, upper)
        width, kernel = config.width, config.kernel
        self.down = RowConv(width, width, kernel // 2, kernel)
        self.right = CausalConv(width, width, 1, kernel, itself=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.last = nn.Linear(width, width)

    def features(self, codes_BT: torch.Tensor, context_BTD: torch.Tensor) -> torch.Tensor:
        tokens_BhwD, context_BhwD = self.tokens(codes_BT).unflatten(1, self.grid), context_BTD.unflatten(1, self.grid)
        # The vertical stack is a row late: then it may see rows whole.
        v_BhwD, x_BhwD = self.down(F.pad(tokens_BhwD[:, :-1], (0, 0, 0, 0, 1, 0))), self.right(tokens_BhwD)
        for block in self.blocks:
            v_BhwD, x_BhwD = self.run_block(block, v_BhwD, x_BhwD, context_BhwD)
        return self._out(x_BhwD).flatten(1, 2)

    def _out(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.last(F.relu(x)))

    def new_cache(self, context_BTD: torch.Tensor) -> dict:
        batch, columns = len(context_BTD), self.grid[1]
        kept = [
            BlockCache(
                block.vertical.new_cache(context_BTD, columns),
                block.horizontal.new_cache(context_BTD, columns),
                context_BTD.new_zeros(batch, columns, 2 * self.config.width),
            )
            for block in self.blocks
        ]
        first = self.down.new_cache(context_BTD, columns), self.right.new_cache(context_BTD, columns)
        row_BwD = context_BTD.new_zeros(batch, columns, self.config.width)  # of embedded tokens
        return {"first": first, "row": row_BwD, "blocks": kept}

    def step(self, previous_B, context_BTD, cache, t: int) -> torch.Tensor:
        columns = self.grid[1]
        column = t % columns
        x_BD = None
        if previous_B is not None:
            x_BD = self.tokens(previous_B)
            cache["row"][:, (t - 1) % columns] = x_BD
        if column == 0:
            self._next_row(context_BTD[:, t : t + columns], cache)
        x_BD = self.right(x_BD, cache["first"][1], t)
        for block, kept in zip(self.blocks, cache["blocks"], strict=True):
            x_BD = block.right(x_BD, kept.above[:, column], kept.right, t)
        return self._out(x_BD)

    def _next_row(self, context_BwD: torch.Tensor, cache: dict) -> None:
        """The vertical stack's part of a row, all at once, when the row above is whole."""
        v_BwD = self.down(cache["row"], cache["first"][0])
        for block, kept in zip(self.blocks, cache["blocks"], strict=True):
            v_BwD, above = block.down(v_BwD, context_BwD, kept.down)
            kept.above.copy_(above)
