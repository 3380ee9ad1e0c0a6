"""PixelCNN prior (van den Oord, Kalchbrenner and Kavukcuoglu 2016, arXiv:1601.06759; report 000): masked convolutions.

The convolutions together see a trapezium that grows wider by one column with each row upwards. Codes to the upper right of it
are a blind spot, however many layers there are. gated_pixelcnn.py has no blind spot.

Shapes as in prior.py and causal.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from lesiongen.priors.causal import CausalConv, Window, check_kernel
from lesiongen.priors.prior import BasePriorConfig, Prior


@dataclass(frozen=True)
class PixelCNNConfig(BasePriorConfig):
    """Config of a PixelCNN."""

    kind: Literal["pixelcnn"] = "pixelcnn"
    layers: int = 15
    width: int = 256
    kernel: int = 7  # of the first convolution; the others are 3×3

    def __post_init__(self):
        super().__post_init__()
        check_kernel("kernel", self.kernel)
        if self.width % 2:
            raise ValueError(f"width {self.width} must be even, because each block halves it")


class Block(nn.Module):
    """Residual block: halves the channels, applies a 3×3 causal convolution, and restores the channels."""

    def __init__(self, config: PixelCNNConfig):
        super().__init__()
        width, half = config.width, config.width // 2
        self.narrow, self.widen = nn.Linear(width, half), nn.Linear(half, width)
        self.conv = CausalConv(half, half, 2, 3)
        self.known = nn.Linear(width, half, bias=False)  # projects the context
        self.dropout = config.dropout

    def forward(self, x: torch.Tensor, context: torch.Tensor, window: Window | None = None, t: int = 0) -> torch.Tensor:
        """Applies the block to a whole grid, or to one position in sampling.

        Args:
            x: Features of the whole grid [B, h, w, D], or with a window those of position t [B, D].
            context: Context of the same positions.
            window: Cache of the convolution's inputs so far.
            t: The position; with a window only.

        Returns:
            Features for the next block, in the shape of x.
        """
        y = self.conv(F.relu(self.narrow(F.relu(x))), window, t) + self.known(context)
        return x + self.widen(F.dropout(F.relu(y), self.dropout, self.training))


class PixelCNN(Prior):
    """A first convolution without its own position, residual blocks, and a last layer."""

    def __init__(
        self,
        config: PixelCNNConfig,
        grid: tuple[int, int],
        entries: int,
        facts: dict[str, int],
        upper: tuple[tuple[int, tuple[int, int]], ...] = (),
    ):
        """Builds the layers. Arguments as for Prior."""
        super().__init__(config, grid, entries, facts, upper)
        width = config.width
        self.first = CausalConv(width, width, config.kernel // 2 + 1, config.kernel, include_self=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.last = nn.Linear(width, width)

    def features(self, codes_BT: torch.Tensor, context_BTD: torch.Tensor) -> torch.Tensor:
        x_BhwD = self.first(self.tokens(codes_BT).unflatten(1, self.grid))
        context_BhwD = context_BTD.unflatten(1, self.grid)
        for block in self.blocks:
            x_BhwD = self.run_block(block, x_BhwD, context_BhwD)
        return self._output(x_BhwD).flatten(1, 2)

    def _output(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.last(F.relu(x)))

    def new_cache(self, context_BTD: torch.Tensor) -> list[Window]:
        """Allocates a window for each convolution: the first one's, then one for each block."""
        return [conv.new_cache(context_BTD, self.grid[1]) for conv in (self.first, *(b.conv for b in self.blocks))]

    def step(self, previous_B: torch.Tensor | None, context_BTD: torch.Tensor, cache: list[Window], t: int) -> torch.Tensor:
        x_BD = self.first(None if previous_B is None else self.tokens(previous_B), cache[0], t)
        for block, window in zip(self.blocks, cache[1:], strict=True):
            x_BD = block(x_BD, context_BTD[:, t], window, t)
        return self._output(x_BD)
