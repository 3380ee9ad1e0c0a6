"""Causal convolutions over a grid of codes: over whole grids in training, one position at a time in sampling.

Both compute the same function, so a sampler that uses the cache draws from exactly the distribution that was trained.

Shapes: B batch, h × w grid, C channels, t = row·w + column. Channels come last, which suits linear layers, norms and single
positions. Filters are stored flat, [out_channels, taps·C], with taps in raster order. So one position is a single matrix
product with a flattened patch of the input, and a whole grid is one convolution with the same weights.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Window:
    """Cache of a convolution's latest input rows, while sampling.

    The convolutions below create a Window in new_cache() and write to it. Columns outside the grid stay 0, and so do rows
    above the grid.

    Attributes:
        inputs: [B, rows, left + width + right, C]; the last row is the current one.
    """

    def __init__(self, like: torch.Tensor, rows: int, left: int, width: int, right: int, channels: int):
        """Allocates the cache, filled with 0.

        Args:
            like: Tensor that has the batch size, dtype and device of the inputs.
            rows: Height of the convolution's filter.
            left: Columns of padding on the left.
            width: Columns of the grid.
            right: Columns of padding on the right.
            channels: Channels of the inputs, C.
        """
        self.left, self.width = left, width
        self.inputs = like.new_zeros(len(like), rows, left + width + right, channels)

    def next_row(self) -> None:
        """Moves all rows up by one.

        The last row keeps its old values. Every value of the row is overwritten before it is read.
        """
        for i in range(self.inputs.shape[1] - 1):
            self.inputs[:, i] = self.inputs[:, i + 1]

    def write(self, x_BC: torch.Tensor, column: int) -> None:
        """Stores the input [B, C] of one column of the current row."""
        self.inputs[:, -1, self.left + column] = x_BC

    def write_row(self, x_BwC: torch.Tensor) -> None:
        """Stores the inputs [B, w, C] of the whole current row."""
        self.inputs[:, -1, self.left : self.left + self.width] = x_BwC

    def patch(self, column: int, columns: int) -> torch.Tensor:
        """Returns all rows of `columns` columns, the first of them at grid column `column` - left, as [B, rows·columns·C]."""
        return self.inputs[:, :, column : column + columns].flatten(1)


class CausalConv(nn.Linear):
    """Convolution that sees the rows above, and in the current row the positions to the left, with or without its own position.

    This is a masked convolution of van den Oord et al. 2016 (arXiv:1601.06759), with mask A (without its own position) or
    mask B (with it). A convolution of this class sees what PixelSNAIL's down shifted and down-right shifted convolutions see
    together. Masked taps have no weights.
    """

    def __init__(self, in_channels: int, out_channels: int, rows: int, columns: int, include_self: bool = True):
        """Creates the weights.

        Args:
            in_channels: Channels of the input, C.
            out_channels: Channels of the output.
            rows: Height of the filter: the current row and `rows` - 1 rows above.
            columns: Width of the filter, odd: `columns` // 2 positions to each side.
            include_self: Whether the filter covers its own position (mask B) or not (mask A).
        """
        self.rows, self.include_self = rows, include_self
        self.left = columns // 2
        self.right = self.left if rows > 1 else 0  # with a single row, all taps to the right are masked
        self.columns = self.left + 1 + self.right
        super().__init__(in_channels * ((rows - 1) * self.columns + self.left + include_self), out_channels)
        self.in_channels = in_channels

    def new_cache(self, like: torch.Tensor, width: int) -> Window:
        """Allocates the cache for sampling a grid of `width` columns; `like` has the inputs' batch size, dtype and device."""
        return Window(like, self.rows, self.left, width, self.right, self.in_channels)

    def forward(self, x: torch.Tensor | None, window: Window | None = None, t: int = 0) -> torch.Tensor:
        """Applies the convolution to a whole grid, or to one position in sampling.

        Args:
            x: Without a window, the inputs of the whole grid, [B, h, w, C]. With a window, the newest input that position t
                sees, [B, C]: the input at position t, or without include_self the input at t - 1 (None if t is 0).
            window: Cache of the inputs so far; this call writes x to it. Calls must go through the positions in raster order.
            t: The position; with a window only.

        Returns:
            [B, h, w, out_channels], or with a window [B, out_channels].
        """
        if window is None:
            x_BhwC = F.pad(x, (0, 0, self.left, self.right, self.rows - 1, 0))
            masked = self.in_channels * self.rows * self.columns - self.in_features
            return _convolve(x_BhwC, F.pad(self.weight, (0, masked)), self.bias, self.rows)
        column = t % window.width
        if not self.include_self and t:
            window.write(x, (t - 1) % window.width)
        if t and not column:
            window.next_row()
        if self.include_self:
            window.write(x, column)
        return super().forward(window.patch(column, self.columns)[:, : self.in_features])


class RowConv(nn.Linear):
    """Convolution that sees positions to both sides, in the current row and in the rows above.

    This class alone is not causal. The caller makes it causal by passing a grid that is shifted down by one row.
    """

    def __init__(self, in_channels: int, out_channels: int, rows: int, columns: int):
        """Creates the weights.

        Args:
            in_channels: Channels of the input, C.
            out_channels: Channels of the output.
            rows: Height of the filter: the current row and `rows` - 1 rows above.
            columns: Width of the filter, odd: `columns` // 2 positions to each side.
        """
        super().__init__(in_channels * rows * columns, out_channels)
        self.in_channels, self.rows, self.side = in_channels, rows, columns // 2

    def new_cache(self, like: torch.Tensor, width: int) -> Window:
        """Allocates the cache for sampling a grid of `width` columns; `like` has the inputs' batch size, dtype and device."""
        return Window(like, self.rows, self.side, width, self.side, self.in_channels)

    def forward(self, x: torch.Tensor, window: Window | None = None) -> torch.Tensor:
        """Applies the convolution to a whole grid, or to the next row in sampling.

        Args:
            x: Without a window, the whole grid [B, h, w, C]. With a window, the next row [B, w, C].
            window: Cache of the rows so far; this call writes x to it.

        Returns:
            [B, h, w, out_channels], or with a window [B, w, out_channels].
        """
        if window is None:
            return _convolve(F.pad(x, (0, 0, self.side, self.side, self.rows - 1, 0)), self.weight, self.bias, self.rows)
        window.next_row()
        window.write_row(x)
        return _convolve(window.inputs, self.weight, self.bias, self.rows)[:, 0]


def _convolve(x_BhwC: torch.Tensor, flat_weight: torch.Tensor, bias: torch.Tensor, rows: int) -> torch.Tensor:
    """Convolves without padding. flat_weight: [out_channels, rows·columns·C].

    Input and weight are channels-last in memory, so conv2d need not copy them.
    """
    weight = flat_weight.view(len(flat_weight), rows, -1, x_BhwC.shape[-1]).movedim(-1, 1)
    return F.conv2d(x_BhwC.movedim(-1, 1), weight, bias).movedim(1, -1)


def check_kernel(name: str, kernel: int) -> None:
    """Raises ValueError if a kernel size, called `name` in the config, is even or below 3."""
    if kernel < 3 or kernel % 2 == 0:
        raise ValueError(f"{name} {kernel} must be odd and at least 3")
