"""Rolls a training back after a spike of its loss.

The training goes on from the last checkpoint before the spike, and passes over the data around the spike, as Chowdhery et al.
2022 did by hand (PaLM, arXiv:2204.02311, section 5.1). rollbacks.jsonl in the stage's directory lists the rollbacks. They
belong to the optimizer's settings: a training that goes on with other settings starts without rollbacks.
"""

from pathlib import Path

from hpc import dist
from hpc.config import digest, to_plain
from hpc.errors import Diverged
from hpc.run import journal
from hpc.train import checkpoint
from hpc.train.engine import EngineConfig
from hpc.train.optim import OptimConfig

LEAD_STEPS = 5  # the data of so many steps before the first spike are passed over too: one of them did the damage


class Spike(Exception):
    """The losses of too many steps in a row are spikes or not finite, or the weights are destroyed. Raised on every rank.

    Attributes:
        first: Samples seen before the first of these steps.
        last: Samples seen after the last of them.
    """

    def __init__(self, reason: str, first: int, last: int):
        super().__init__(reason)
        self.first, self.last = first, last


class Rollbacks:
    """The rollbacks of a training under its present settings.

    Attributes:
        windows: (first, last) for each rollback, in samples: data that are passed over.
    """

    def __init__(self, folder: Path, optim: OptimConfig, engine: EngineConfig):
        """Reads the rollbacks that are recorded.

        Args:
            folder: The stage's directory.
            optim: The optimizer's settings.
            engine: The engine's settings, of which clip and precision count.
        """
        self.folder, self.path = folder, folder / "rollbacks.jsonl"
        self.settings = digest([to_plain(optim), engine.clip, engine.precision])
        entries = dist.run_on_leader(journal.read, self.path, "settings", "first", "last")
        self.windows = [(e["first"], e["last"]) for e in entries if e["settings"] == self.settings]

    def passes_over(self, samples: int) -> bool:
        """Returns whether the step that begins at this position is left out."""
        return any(first <= samples < last for first, last in self.windows)

    def roll_back(self, spike: Spike, batch: int, limit: int) -> str:
        """Deletes the checkpoints since shortly before the spike and records the rollback. Collective.

        Args:
            spike: What has happened.
            batch: Samples in a step.
            limit: How often a training may be rolled back.

        Returns:
            What was done, for the user.

        Raises:
            Diverged: Training was rolled back `limit` times already. With other settings it can go on from the newest
                checkpoint that is left.
        """
        first = max(0, spike.first - LEAD_STEPS * batch)
        samples = dist.run_on_leader(_delete_since, self.folder / "checkpoints", first, spike.first, batch)
        where = f"from the checkpoint at {samples:,} samples" if samples else "from the start"
        if len(self.windows) >= limit:
            raise Diverged(
                f"{spike}, after {len(self.windows)} rollbacks. Lower the learning rate or lengthen the warm-up, and run the "
                f"same command: training then goes on {where}."
            )
        entry = {"settings": self.settings, "first": first, "last": spike.last, "from": samples, "reason": str(spike)}
        dist.run_on_leader(journal.append, self.path, entry)
        return f"{spike}. Training goes on {where} and passes over samples {first:,} to {spike.last:,}."


def _delete_since(folder: Path, first: int, spike: int, batch: int) -> int:
    """Deletes the checkpoints of more than `first` samples; if none would be left, those of more than `spike` samples.

    Returns the samples of the newest checkpoint that is left, 0 if none is.
    """
    samples = {path: checkpoint.step_of(path) * batch for path in checkpoint.committed(folder)}
    sound = [seen for seen in samples.values() if seen <= first] or [s for s in samples.values() if s <= spike][:1] or [0]
    for path, seen in samples.items():
        if seen > sound[-1]:
            checkpoint.delete(path)
    return sound[-1]
