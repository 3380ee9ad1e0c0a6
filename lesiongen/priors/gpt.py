"""GPT prior over a grid of codes: SwiGLU, 2-D rotary positions, context added to every input, preallocated key-value cache.

With `modulate` the context also enters every block: it scales and shifts what the block's two layers read, and scales what they
add (adaLN-zero, Peebles and Xie 2023, arXiv:2212.09748, figure 3; there one condition for an image, here the context of each
position).

Shapes as in prior.py, and H heads, E head dimension.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hpc.config import added
from lesiongen.priors.prior import BasePriorConfig, Prior


@dataclass(frozen=True)
class GPTConfig(BasePriorConfig):
    """Config of a GPT."""

    kind: Literal["gpt"] = "gpt"
    heads: int = 6
    modulate: bool = added(False)  # let the context scale and shift the inputs of every block's layers (adaLN-zero)

    def __post_init__(self):
        super().__post_init__()
        if self.heads < 1 or self.width % (4 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of 4 × heads ({4 * self.heads}): 2-D rotary needs it")


def rotary_table(grid: tuple[int, int], head_dim: int) -> torch.Tensor:
    """Computes the rotation of each pair of channels at each position.

    The angles of the first half of the pairs grow with the row, those of the second half with the column.

    Args:
        grid: Height and width of the grid.
        head_dim: Head dimension E, a multiple of 4.

    Returns:
        Cosine and sine, [T, E/2, 2].
    """
    frequencies = 100.0 ** (-torch.arange(head_dim // 4).float() / (head_dim // 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = torch.cat([index.reshape(-1, 1) * frequencies for index in (rows, columns)], 1)
    return torch.stack([angles.cos(), angles.sin()], -1)


def apply_rotary(x_BTHE: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotates each pair of neighbouring channels by the angle of its position.

    Args:
        x_BTHE: Queries or keys.
        table: Rows of rotary_table() for these positions, [T, E/2, 2].

    Returns:
        [B, T, H, E].
    """
    pairs = x_BTHE.unflatten(-1, (-1, 2))
    table = table[:, None].to(pairs.dtype)
    # In fp32 use complex numbers: their multiplication passes over the memory once. PyTorch has no complex bf16 numbers, and
    # torch.compile does not fuse complex operations, so these cases use real numbers.
    if pairs.dtype == torch.float32 and not torch.compiler.is_compiling():
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table)).flatten(-2)
    (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class SwiGLUGate(nn.Linear):
    """First half of SwiGLU (Shazeer 2020, arXiv:2002.05202): two linear maps, one of which gates the other.

    They are one product with the whole weight. Products with its halves would make autograd keep views of the weight, and with
    them the memory of a weight that ZeRO 3 has gathered for the layer and frees after it.
    """

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Maps [B, T, D] to [B, T, out_features / 2]."""
        a, b = super().forward(x_BTD).chunk(2, -1)
        return F.silu(a) * b


class Modulation(NamedTuple):
    """What the context does to one layer of a block; nothing if all are None. Each is [B, T, D] or [B, 1, D]."""

    shift: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    gain: torch.Tensor | None = None

    def scale_input(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Scales and shifts the layer's input."""
        return x_BTD if self.scale is None else x_BTD * (1 + self.scale) + self.shift

    def scale_output(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Scales the layer's output."""
        return x_BTD if self.gain is None else x_BTD * self.gain


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width, hidden = config.width, -(-config.width * 8 // 3 // 32) * 32
        self.heads, self.dropout = config.heads, config.dropout
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.down = SwiGLUGate(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.modulation = nn.Linear(width, 6 * width) if config.modulate else None  # projects the context

    def forward(
        self,
        x_BTD: torch.Tensor,
        table: torch.Tensor,
        context_BTD: torch.Tensor,
        cache: torch.Tensor | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """Applies attention and the feed-forward layer.

        Args:
            x_BTD: Features of consecutive tokens: all of them in training, a single one in sampling.
            table: Rotary table of these tokens, [T, E/2, 2].
            context_BTD: Context of these tokens, or [B, 1, D] if it is the same for all.
            cache: Keys and values of all tokens, [2, B, H, T, E]; those of x_BTD are written to it. None in training.
            start: Index of the first token in x_BTD.

        Returns:
            Features for the next block, [B, T, D].
        """
        batch, length, width = x_BTD.shape
        first, second = self._modulations(context_BTD)
        q, k, v = self.qkv(first.scale_input(self.norm1(x_BTD))).view(batch, length, 3, self.heads, -1).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (apply_rotary(q, table), apply_rotary(k, table), v))
        if cache is not None:
            cache[0][:, :, start : start + length], cache[1][:, :, start : start + length] = k, v
            k, v = cache[0][:, :, : start + length], cache[1][:, :, : start + length]
        dropout = self.dropout if self.training else 0.0
        # Attention has no dropout: with dropout PyTorch does not use its fused kernels, which is 5 times slower on a CPU.
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        update_BTD = self.out(attended.transpose(1, 2).reshape(batch, length, width))
        x_BTD = x_BTD + first.scale_output(F.dropout(update_BTD, dropout))
        update_BTD = self.down(self.gate(second.scale_input(self.norm2(x_BTD))))
        return x_BTD + second.scale_output(F.dropout(update_BTD, dropout))

    def _modulations(self, context_BTD: torch.Tensor) -> "tuple[Modulation, Modulation]":
        """Returns what the context does to the attention, and to the feed-forward layer."""
        if self.modulation is None:
            return Modulation(), Modulation()
        values = self.modulation(F.silu(context_BTD)).chunk(6, -1)
        return Modulation(*values[:3]), Modulation(*values[3:])


class GPT(Prior):
    """Transformer blocks over the sequence of tokens in raster order."""

    def __init__(
        self,
        config: GPTConfig,
        grid: tuple[int, int],
        entries: int,
        facts: dict[str, int],
        upper: tuple[tuple[int, tuple[int, int]], ...] = (),
    ):
        """Builds the layers, initialised like those of GPT-2. Arguments as for Prior."""
        super().__init__(config, grid, entries, facts, upper)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        # The rotary table is saved with the weights, because weights work only with the table that they were trained with.
        self.register_buffer("table", rotary_table(grid, config.width // config.heads))
        # Module.apply() gives the functions whole weights, also where ZeRO 3 divides them (hpc/train/zero.py).
        self.apply(self._init)
        for block in self.blocks:
            for layer in (block.out, block.down):
                layer.apply(self._init_residual)
            if block.modulation is not None:
                block.modulation.apply(self._init_zero)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def _init_residual(self, module: nn.Linear) -> None:
        nn.init.normal_(module.weight, std=0.02 / (2 * self.config.layers) ** 0.5)

    @staticmethod
    def _init_zero(module: nn.Linear) -> None:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)

    def features(self, codes_BT: torch.Tensor, context_BTD: torch.Tensor) -> torch.Tensor:
        # The input at position t is token t - 1 and the context; at position 0 it is the context alone.
        x_BTD = F.pad(self.tokens(codes_BT[:, :-1]), (0, 0, 1, 0)) + context_BTD
        shared_BTD = context_BTD if self.upper else context_BTD[:, :1]  # facts alone are the same at all positions
        for block in self.blocks:
            x_BTD = self.run_block(block, x_BTD, self.table, shared_BTD)
        return self.norm(x_BTD)

    def new_cache(self, context_BTD: torch.Tensor) -> list[torch.Tensor]:
        """Allocates the keys and values of each block, [2, B, H, T, E]."""
        batch, heads = len(context_BTD), self.config.heads
        return [context_BTD.new_zeros(2, batch, heads, self.length, self.config.width // heads) for _ in self.blocks]

    def step(
        self, previous_B: torch.Tensor | None, context_BTD: torch.Tensor, cache: list[torch.Tensor], t: int
    ) -> torch.Tensor:
        x_B1D = context_BTD[:, t : t + 1]
        if previous_B is not None:
            x_B1D = x_B1D + self.tokens(previous_B)[:, None]
        for block, block_cache in zip(self.blocks, cache, strict=True):
            x_B1D = block(x_B1D, self.table[t : t + 1], context_BTD[:, t : t + 1], block_cache, t)
        return self.norm(x_B1D)[:, 0]
