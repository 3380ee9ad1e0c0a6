"""The protocol between the training loop and what it trains. The stages tokenizer and prior implement it."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn


class Task(Protocol):
    """A training problem: model, data, held-out metrics and export.

    A task may also have the attributes `tokens_per_sample` and `flops_per_sample`; the loop then logs tokens per second and MFU
    (hpc/train/flops.py).

    Attributes:
        metric: Name of the held-out metric that selects the exported weights; lower is better.
        size: Samples in an epoch.
    """

    metric: str
    size: int

    def build(self) -> nn.Module:
        """Builds the model, untrained. forward(batch) returns what hpc/train/engine.py asks for."""

    def prepare(self, module: nn.Module) -> None:
        """Initialises the model from data, before the engine is built. Every rank must get the same weights."""

    def stream(self, position: int, micro_batch: int) -> Iterator[dict]:
        """Yields this rank's micro-batches without end.

        Args:
            position: Global position of the first sample, a multiple of the global batch.
            micro_batch: Samples in each micro-batch.

        Returns:
            Dicts of tensors for the model, with "key" (names of the samples) and maybe "bad" (samples that were replaced).
        """

    def after_step(self, module: nn.Module, statistics: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Updates the model after an accepted optimizer step, outside the optimizer.

        Args:
            module: The model on this rank.
            statistics: The model's statistics, summed over micro-batches and ranks.

        Returns:
            Metrics to log.
        """

    def evaluate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, bytes]]:
        """Measures held-out metrics and draws pictures (name → PNG). Collective."""

    def curves(self, rows: list[dict]) -> dict[str, bytes]:
        """Draws the metrics log so far (name → PNG). Only rank 0 calls it."""

    def export(self, module: nn.Module, metrics: dict[str, float]) -> None:
        """Writes the model's weights for use outside training. Only rank 0 calls it.

        Args:
            module: An ordinary copy of the model with full weights.
            metrics: The held-out metrics of these weights.
        """
