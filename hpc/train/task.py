"""What the training loop needs to know of the thing that is trained: a tokenizer or a prior implements this protocol."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn


class Task(Protocol):
    """A training problem: model, data, held-out figures and export.

    A task that knows what its samples cost may also have `tokens_per_sample` and `flops_per_sample`; the loop then logs tokens
    per second and MFU (hpc/train/flops.py).

    Attributes:
        metric: Name of the held-out figure that selects the exported weights; lower is better.
        size: Samples in an epoch.
    """

    metric: str
    size: int

    def build(self) -> nn.Module:
        """Builds the model, untrained. forward(batch) returns what hpc/train/engine.py asks for."""

    def prepare(self, module: nn.Module) -> None:
        """Initialises the model from data, once, before the engine holds it. Every rank must come to the same weights."""

    def stream(self, position: int, micro_batch: int) -> Iterator[dict]:
        """Yields this rank's micro-batches without end.

        Args:
            position: Global position of the first sample, a multiple of the global batch.
            micro_batch: Samples in each micro-batch.

        Returns:
            Dicts of tensors for the model, with "key" (names of the samples) and maybe "bad" (samples that were replaced).
        """

    def after_step(self, module: nn.Module, statistics: torch.Tensor | None) -> dict[str, float]:
        """Updates the model after an accepted optimizer step, outside the optimizer.

        Args:
            module: The model on this rank.
            statistics: The model's statistics, summed over micro-batches and ranks.

        Returns:
            Metrics to log.
        """

    def evaluate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, bytes]]:
        """Measures held-out figures and draws pictures (name → PNG). Collective."""

    def curves(self, rows: list[dict]) -> dict[str, bytes]:
        """Draws the metrics log so far (name → PNG). Only rank 0 calls it."""

    def export(self, module: nn.Module, metrics: dict[str, float]) -> None:
        """Writes the model's weights for use outside training. Only rank 0 calls it.

        Args:
            module: An ordinary copy of the model with full weights.
            metrics: The held-out figures of these weights.
        """
