"""The protocol between the training loop and what it trains. The stages tokenizer, polish and prior implement it."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from hpc.train.engine import Engine
from hpc.train.zero import Weights


class Task(Protocol):
    """A training problem: model, data, held-out metrics and export.

    A task may also have the attributes `tokens_per_sample` and `flops_per_sample`; the loop then logs tokens per second and MFU
    (hpc/train/flops.py). `shown` names the held-out metric that the progress bar shows in place of `metric`.

    Attributes:
        metric: Name of the held-out metric that selects the exported weights; lower is better.
        worst: A value of this metric that no sound model exceeds, not even an untrained one. Weights above it are destroyed.
        size: Samples in an epoch.
    """

    metric: str
    worst: float
    size: int

    def build(self) -> nn.Module:
        """Builds the model as it is before this training. forward(batch) returns what hpc/train/engine.py asks for.

        Under ZeRO 3 each parameter is divided among the ranks when its layer is built (hpc/train/zero.py).
        """

    def prepare(self, module: nn.Module) -> None:
        """Initialises the model from data, before the engine is built. Collective.

        Every rank must get the same weights. Parameters may be divided; hpc.train.zero.gathered() makes them whole.
        """

    def stream(self, position: int, micro_batch: int) -> Iterator[dict]:
        """Yields this rank's micro-batches without end.

        Args:
            position: Global position of the first sample, a multiple of the global batch.
            micro_batch: Samples in each micro-batch.

        Returns:
            Dicts of tensors for the model, with "key" (names of the samples) and maybe "bad" (samples that were replaced).
        """

    def finish(self, batch: dict) -> dict:
        """Completes a micro-batch on the device, for example augments its images, without waiting for the device."""

    def after_step(self, module: nn.Module, statistics: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Updates the model after an accepted optimizer step, outside the optimizer.

        Args:
            module: The model on this rank.
            statistics: The model's statistics, summed over micro-batches and ranks.

        Returns:
            Metrics to log.
        """

    def evaluate(self, engine: Engine) -> tuple[dict[str, float], dict[str, bytes]]:
        """Measures held-out metrics and draws pictures (name → PNG). Collective.

        Args:
            engine: The engine, inside evaluating(). Every rank must call engine.module equally often, because under ZeRO 3 its
                forward gathers weights. engine.whole_module() may be called by each rank as often as it likes.
        """

    def curves(self, rows: list[dict]) -> dict[str, bytes]:
        """Draws the metrics log so far (name → PNG). Only rank 0 calls it."""

    def export(self, weights: Weights, metrics: dict[str, float]) -> None:
        """Writes the model's weights for use outside training. Collective.

        Args:
            weights: The model's weights, in which averaged weights are in place of the weights of the last step.
            metrics: The held-out metrics of these weights.
        """
