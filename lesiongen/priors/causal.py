"""Causal convolutions over a grid of codes: whole grids in training, one position at a time in sampling.

Shapes: B batch, h × w grid, C channels (last, as 1×1 convolutions, norms and steps want them), t = row·w + column.
Filters are kept flat, [outputs, taps·C] with taps in raster order: a step is one matrix product with the patch that it
sees, and a whole grid is one convolution by the same numbers.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Window:
    """The last rows of a convolution's inputs, [B, rows, left + w + right, C], zero beyond the grid."""

    def __init__(self, like: torch.Tensor, rows: int, left: int, width: int, right: int, channels: int):
        self.left, self.width = left, width
        self.kept = like.new_zeros(len(like), rows, left + width + right, channels)

    def next_row(self) -> None:
        """Goes to the next row; what the new one holds until it is put there is never read."""
        for i in range(self.kept.shape[1] - 1):
            self.kept[:, i] = self.kept[:, i + 1]

    def write(self, x_BC: torch.Tensor, column: int) -> None:
        """The input at a column of the newest row."""
        self.kept[:, -1, self.left + column] = x_BC

    def write_row(self, x_BwC: torch.Tensor) -> None:
        self.kept[:, -1, self.left : self.left + self.width] = x_BwC

    def patch(self, column: int, size: int) -> torch.Tensor:
        """[B, rows·size·C] around a column."""
        return self.kept[:, :, column : column + size].flatten(1)


class CausalConv(nn.Linear):
    """Sees `rows` - 1 rows above, `columns` wide, and what is left in its own row, with or without its own position:
    masks A and B of van den Oord et al. 2016 (arXiv:1601.06759), and the sum of a down shifted and a down-right shifted
    convolution (PixelSNAIL). What it may not see has no weights."""

    def __init__(self, inputs: int, outputs: int, rows: int, columns: int, itself: bool = True):
        self.rows, self.itself = rows, itself
        self.left = columns // 2
        self.right = self.left if rows > 1 else 0  # one row alone has nothing to see there
        self.columns = self.left + 1 + self.right
        super().__init__(inputs * ((rows - 1) * self.columns + self.left + itself), outputs)
        self.inputs = inputs

    def new_cache(self, like: torch.Tensor, width: int) -> Window:
        return Window(like, self.rows, self.left, width, self.right, self.inputs)

    def forward(self, x: torch.Tensor | None, window: Window | None = None, t: int = 0) -> torch.Tensor:
        """[B, h, w, C] → [B, h, w, outputs]; with a window, position t alone: [B, C] → [B, outputs]. There x is the newest
        input that it sees: position t's, or position t-1's (None for the first) where it does not see itself."""
        if window is None:
            x_BhwC = F.pad(x, (0, 0, self.left, self.right, self.rows - 1, 0))
            missing = self.inputs * self.rows * self.columns - self.in_features
            return _convolve(x_BhwC, F.pad(self.weight, (0, missing)), self.bias, self.rows)
        column = t % window.width
        if not self.itself and t:
            window.write(x, (t - 1) % window.width)
        if t and not column:
            window.next_row()
        if self.itself:
            window.write(x, column)
        return super().forward(window.patch(column, self.columns)[:, : self.in_features])


class RowConv(nn.Linear):
    """Sees whole rows: its own and `rows` - 1 above, `columns` wide. The grid it is given must lag by a row."""

    def __init__(self, inputs: int, outputs: int, rows: int, columns: int):
        super().__init__(inputs * rows * columns, outputs)
        self.inputs, self.rows, self.side = inputs, rows, columns // 2

    def new_cache(self, like: torch.Tensor, width: int) -> Window:
        return Window(like, self.rows, self.side, width, self.side, self.inputs)

    def forward(self, x: torch.Tensor, window: Window | None = None) -> torch.Tensor:
        """[B, h, w, C] → [B, h, w, outputs]; with a window, the next row alone: [B, w, C] → [B, w, outputs]."""
        if window is None:
            return _convolve(F.pad(x, (0, 0, self.side, self.side, self.rows - 1, 0)), self.weight, self.bias, self.rows)
        window.next_row()
        window.write_row(x)
        return _convolve(window.kept, self.weight, self.bias, self.rows)[:, 0]


def _convolve(x_BhwC: torch.Tensor, flat: torch.Tensor, bias: torch.Tensor, rows: int) -> torch.Tensor:
    """flat: [outputs, rows·columns·C]; both operands lie channels-last in memory, so that nothing is copied."""
    weight = flat.view(len(flat), rows, -1, x_BhwC.shape[-1]).movedim(-1, 1)
    return F.conv2d(x_BhwC.movedim(-1, 1), weight, bias).movedim(1, -1)


def check_kernel(name: str, kernel: int) -> None:
    if kernel < 3 or kernel % 2 == 0:
        raise ValueError(f"{name} {kernel} must be odd and at least 3")
