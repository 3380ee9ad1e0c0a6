"""PixelCNN prior (van den Oord, Kalchbrenner and Kavukcuoglu 2016, arXiv:1601.06759; report 000): masked convolutions.

Its convolutions together see a trapezium that widens upwards by one column a row, not all that came before: the codes to
the upper right beyond that are its blind spot, however many layers it has. gated_pixelcnn.py has none.

Shapes as in prior.py and causal.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from lesiongen.priors.causal import CausalConv, Window, check_kernel
from lesiongen.priors.prior import Prior, PriorShape


@dataclass(frozen=True)
class PixelCNNConfig(PriorShape):
    kind: Literal["pixelcnn"] = "pixelcnn"
    layers: int = 15
    width: int = 256
    kernel: int = 7  # of the first convolution; the others are 3×3

    def __post_init__(self):
        super().__post_init__()
        check_kernel("kernel", self.kernel)
        if self.width % 2:
            raise ValueError(f"width {self.width} must be even: within a block it is halved")


class Block(nn.Module):
    def __init__(self, config: PixelCNNConfig):
        super().__init__()
        width, half = config.width, config.width // 2
        self.narrow, self.widen = nn.Linear(width, half), nn.Linear(half, width)
        self.conv = CausalConv(half, half, 2, 3)
        self.known = nn.Linear(width, half, bias=False)
        self.dropout = config.dropout

    def forward(self, x: torch.Tensor, known: torch.Tensor, window: Window | None = None, t: int = 0) -> torch.Tensor:
        """x and known: [B, h, w, D], or with a window those of position t, [B, D]."""
        y = self.conv(F.relu(self.narrow(F.relu(x))), window, t) + self.known(known)
        return x + self.widen(F.dropout(F.relu(y), self.dropout, self.training))


class PixelCNN(Prior):
    def __init__(self, config: PixelCNNConfig, grid, entries, facts, upper=()):
        super().__init__(config, grid, entries, facts, upper)
        width = config.width
        self.first = CausalConv(width, width, config.kernel // 2 + 1, config.kernel, itself=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.last = nn.Linear(width, width)

    def features(self, codes_BT: torch.Tensor, context_BTD: torch.Tensor) -> torch.Tensor:
        x_BhwD = self.first(self.tokens(codes_BT).unflatten(1, self.grid))
        context_BhwD = context_BTD.unflatten(1, self.grid)
        for block in self.blocks:
            x_BhwD = self.run_block(block, x_BhwD, context_BhwD)
        return self._out(x_BhwD).flatten(1, 2)

    def _out(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.last(F.relu(x)))

    def new_cache(self, context_BTD: torch.Tensor) -> list[Window]:
        """The last rows that each convolution sees."""
        return [conv.new_cache(context_BTD, self.grid[1]) for conv in (self.first, *(b.conv for b in self.blocks))]

    def step(self, previous_B, context_BTD, cache, t: int) -> torch.Tensor:
        x_BD = self.first(None if previous_B is None else self.tokens(previous_B), cache[0], t)
        for block, window in zip(self.blocks, cache[1:], strict=True):
            x_BD = block(x_BD, context_BTD[:, t], window, t)
        return self._out(x_BD)
