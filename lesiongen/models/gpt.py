"""GPT prior over a grid of codes: RMSNorm, SwiGLU, 2-D rotary positions, label token, static KV cache.

Shapes: B batch, T = h·w tokens in raster order, K vocabulary, D width, H heads, E head dimension. p(codes | label,
coarser codes): the coarser grids are known beforehand, so every position sees them all, aligned in space.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    layers: int = 6
    heads: int = 6
    width: int = 384
    dropout: float = 0.1
    label_dropout: float = 0.1  # share of training labels replaced by "none", for classifier-free guidance
    token_dropout: float = 0.0  # share of input tokens replaced by "unknown" in training
    checkpoint: bool = False  # recompute activations in the backward pass

    def __post_init__(self):
        if min(self.layers, self.heads, self.width) < 1:
            raise ValueError("layers, heads and width must be at least 1")
        if self.width % (4 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of 4 × heads ({4 * self.heads}): 2-D rotary needs it")
        if not all(0 <= p < 1 for p in (self.dropout, self.label_dropout, self.token_dropout)):
            raise ValueError("dropouts are at least 0 and below 1")


def rotary_table(grid: tuple[int, int], head_dim: int) -> torch.Tensor:
    """cos and sin [2, T, E/2]: the first half of the pairs turns with the row, the second with the column."""
    frequencies = 100.0 ** (-torch.arange(head_dim // 4).float() / (head_dim // 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = torch.cat([p.reshape(-1, 1) * frequencies for p in (rows, columns)], 1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x_BHTE: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    a, b = x_BHTE.chunk(2, -1)
    cos, sin = table.to(x_BHTE.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        width, hidden = config.width, -(-config.width * 8 // 3 // 32) * 32
        self.heads, self.dropout = config.heads, config.dropout
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD, table, cache=None, at: int = 0):
        """cache: [2, B, H, T, E] written in place at token `at`; None in training."""
        batch, length, width = x_BTD.shape
        q, k, v = self.qkv(self.norm1(x_BTD)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, table), rotate(k, table)
        if cache is not None:
            cache[0][:, :, at : at + length], cache[1][:, :, at : at + length] = k, v
            k, v = cache[0][:, :, : at + length], cache[1][:, :, : at + length]
        drop = self.dropout if self.training else 0.0
        # No dropout inside attention: it would leave the fused kernels (5 times slower on CPU).
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        x_BTD = x_BTD + F.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)), drop)
        a, b = self.gate(self.norm2(x_BTD)).chunk(2, -1)
        return x_BTD + F.dropout(self.down(F.silu(a) * b), drop)


class GPT(nn.Module):
    """grid: (h, w) of this level; entries: K; classes: number of labels; upper: (entries, grid) of each coarser level."""

    def __init__(
        self,
        config: GPTConfig,
        grid: tuple[int, int],
        entries: int,
        classes: int,
        upper: tuple[tuple[int, tuple[int, int]], ...] = (),
    ):
        super().__init__()
        self.config, self.grid, self.entries, self.classes = config, grid, entries, classes
        self.tokens = nn.Embedding(entries + 1, config.width)  # the last one is "unknown", for token dropout
        self.labels = nn.Embedding(classes + 1, config.width)  # the last one is "none"
        self.upper = nn.ModuleList(nn.Embedding(k, config.width) for k, _ in upper)
        self.mix = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(config.width, config.width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(config.width, config.width, 3, padding=1),
            )
            for _ in upper
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm, self.head = nn.RMSNorm(config.width), nn.Linear(config.width, entries, bias=False)
        self.register_buffer("table", rotary_table(grid, config.width // config.heads), persistent=False)
        self.apply(self._init)
        for block in self.blocks:
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / (2 * config.layers) ** 0.5)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def context(self, label_B: torch.Tensor, upper: list[torch.Tensor]) -> torch.Tensor:
        """What every position knows beforehand, [B, T, D]: the label (-1 = none) and the coarser codes around it."""
        label_B = torch.where(label_B < 0, self.classes, label_B)
        known = self.labels(label_B)[:, None].expand(-1, self.grid[0] * self.grid[1], -1)
        for embedding, mix, codes_Bhw in zip(self.upper, self.mix, upper, strict=True):
            x_BDhw = embedding(codes_Bhw.long()).movedim(-1, 1)
            x_BDhw = F.interpolate(x_BDhw + mix(x_BDhw), size=self.grid, mode="nearest")
            known = known + x_BDhw.flatten(2).transpose(1, 2)
        return known

    def inputs(self, codes_BT: torch.Tensor, known_BTD: torch.Tensor) -> torch.Tensor:
        """Position t sees token t-1; position 0 sees the label alone, which is its token."""
        shifted = F.pad(self.tokens(codes_BT[:, :-1]), (0, 0, 1, 0))
        return shifted + known_BTD

    def forward(self, codes_BT: torch.Tensor, known_BTD: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, K]; those at t depend on tokens before t only."""
        x_BTD = self.inputs(codes_BT, known_BTD)
        for block in self.blocks:
            if self.config.checkpoint and self.training:
                x_BTD = checkpoint(block, x_BTD, self.table, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, self.table)
        return self.head(self.norm(x_BTD))

    def log_likelihood(self, codes_Bhw, label_B, upper) -> torch.Tensor:
        """Natural log-probability of each token, [B, T]."""
        codes_BT = codes_Bhw.flatten(1).long()
        logits_BTK = self(codes_BT, self.context(label_B, upper)).float()
        return -F.cross_entropy(logits_BTK.transpose(1, 2), codes_BT, reduction="none")

    def loss(self, codes_Bhw: torch.Tensor, label_B: torch.Tensor, upper: list[torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy in nats per token, with label and token dropout while training."""
        codes_BT = codes_Bhw.flatten(1).long()
        seen_BT = codes_BT
        if self.training:
            gone = torch.rand(label_B.shape, device=label_B.device) < self.config.label_dropout
            label_B = label_B.masked_fill(gone, -1)
            if self.config.token_dropout:
                lost = torch.rand(codes_BT.shape, device=codes_BT.device) < self.config.token_dropout
                seen_BT = codes_BT.masked_fill(lost, self.entries)
        logits_BTK = self(seen_BT, self.context(label_B, upper))
        return F.cross_entropy(logits_BTK.flatten(0, 1).float(), codes_BT.flatten())

    @torch.no_grad()
    def sample(self, label_B, upper, uniform_BT, choose, guidance: float = 1.0) -> torch.Tensor:
        """Codes [B, h, w], one token at a time from a KV cache. uniform_BT: the random numbers, one a token, so that a
        sample does not depend on its batch. choose(logits_BK, uniform_B) → tokens. guidance ≠ 1: classifier-free
        guidance (Ho and Salimans 2022), which runs each position with and without the label."""
        batch, length = uniform_BT.shape
        known = self.context(label_B, upper)
        if guidance != 1.0:
            known = torch.cat([known, self.context(torch.full_like(label_B, -1), upper)])
        cache = self.new_cache(known.shape[0], known)
        codes_BT = torch.zeros(batch, length, dtype=torch.long, device=label_B.device)
        for t in range(length):
            logits = self.step(codes_BT[:, t - 1] if t else None, known[:, t : t + 1], cache, t)
            if guidance != 1.0:
                with_label, without = logits.chunk(2)
                logits = without + guidance * (with_label - without)
            codes_BT[:, t] = choose(logits, uniform_BT[:, t])
        return codes_BT.view(batch, *self.grid)

    def new_cache(self, batch: int, like: torch.Tensor) -> list[torch.Tensor]:
        heads, length = self.config.heads, self.grid[0] * self.grid[1]
        return [like.new_zeros(2, batch, heads, length, self.config.width // heads) for _ in self.blocks]

    def step(self, previous_B, known_B1D, cache, t: int) -> torch.Tensor:
        """Logits [B, K] of token t, given token t-1 and the cache of those before."""
        x = known_B1D
        if previous_B is not None:
            token = self.tokens(previous_B)[:, None]
            x = x + token.repeat(x.shape[0] // token.shape[0], 1, 1)
        for block, kv in zip(self.blocks, cache, strict=True):
            x = block(x, self.table[:, t : t + 1], kv, t)
        return self.head(self.norm(x))[:, 0].float()


PRIORS = {"gpt": GPT}
