"""The state of the training loop: its counters, which each checkpoint holds as JSON in its manifest."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from hpc.train import checkpoint
from hpc.train.engine import Step
from hpc.train.health import REMEMBERED


@dataclass
class State:
    """State of the loop that a resume needs in addition to the engine's state. Stored as JSON in each checkpoint's manifest.

    Attributes:
        samples: Samples seen.
        evaluated: Samples seen at the last evaluation.
        evaluating: Whether the checkpoint was saved just before an evaluation. A resumed training then evaluates again.
            Otherwise it would not know the best metric, and could later export worse weights.
        best: The best held-out metric; None before the first.
        best_at: Samples seen at the evaluation that gave `best`.
        patience_from: Samples seen when patience last started again. Patience counts from here, or from `best_at` if later.
        ended_length: `TrainConfig.samples` of the training that ended because patience ran out; 0 otherwise.
        skipped: Number of the latest steps in a row that were skipped: the loss was a spike, or a loss or gradient not finite.
        skipped_total: Number of all skipped steps.
        bad: Number of samples that were replaced because they could not be read.
        sums: Sum of each training metric since the last log line.
        count: Number of steps in these sums.
        recent: Losses of the latest accepted steps, at most REMEMBERED, with which the next loss is compared.
    """

    samples: int = 0
    evaluated: int = 0
    evaluating: bool = False
    best: float | None = None
    best_at: int = 0
    patience_from: int = 0
    ended_length: int = 0
    skipped: int = 0
    skipped_total: int = 0
    bad: int = 0
    sums: dict[str, float | torch.Tensor] = field(default_factory=dict)
    count: int = 0
    recent: list[float] = field(default_factory=list)

    # Old name of a field in older checkpoints → its name now.
    FORMER_NAMES = {"patient_from": "patience_from", "ended_for": "ended_length"}  # noqa: RUF012 — not a field

    @classmethod
    def resume(cls, path: Path | None, length: int) -> "State":
        """Reads the state of a checkpoint.

        Args:
            path: The checkpoint; None gives a new state.
            length: `TrainConfig.samples` of the training that resumes.
        """
        if path is None:
            return cls()
        stored = checkpoint.read_manifest(path)["state"]
        state = cls(**{cls.FORMER_NAMES.get(name, name): value for name, value in stored.items()})
        if 0 < state.ended_length < length:  # now a longer training is requested: patience starts again
            state.patience_from, state.ended_length = state.samples, 0
        return state

    def account(self, step: Step, after: dict[str, torch.Tensor]) -> None:
        """Adds one optimizer step to the counters and sums.

        Metrics on the device are summed there, so that the host does not wait for the device at each step; read_sums() reads
        them.

        Args:
            step: The result of the step.
            after: The metrics from the task's after_step().
        """
        self.skipped = 0 if step.accepted else self.skipped + 1
        self.skipped_total += not step.accepted
        self.bad += int(step.flags["bad"])
        if step.accepted:
            self.count += 1
            self.recent = [*self.recent[1 - REMEMBERED :], step.metrics["loss"]]
            for name, value in (step.metrics | after).items():
                value = value.detach().double() if isinstance(value, torch.Tensor) else value
                self.sums[name] = self.sums.get(name, 0.0) + value

    def read_sums(self) -> None:
        """Replaces the sums on the device by numbers, in one transfer."""
        on_device = {name: value for name, value in self.sums.items() if isinstance(value, torch.Tensor)}
        if on_device:
            self.sums |= dict(zip(on_device, torch.stack(list(on_device.values())).tolist(), strict=True))
