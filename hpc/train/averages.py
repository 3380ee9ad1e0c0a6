"""Exponentially averaged weights. Evaluation and export use them; the engine owns them.

Each rank averages its own part of the master weights, so the averages take the memory of the master weights and are never
whole on one rank. A checkpoint holds a file of each rank; any number of ranks and any ZeRO stage can load the files.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hpc import dist
from hpc.run.rundir import share
from hpc.train.zero import Weights


class Averages:
    """The averages of a model's master weights."""

    def __init__(self, weights: Weights):
        """Starts the averages at the present weights."""
        self.weights = weights
        self.restart()

    def restart(self) -> None:
        """Sets the averages to the present weights."""
        self.tensors = [master.detach().clone() for master in self.weights.masters()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Sets each average to decay · average + (1 - decay) · weight."""
        torch._foreach_lerp_(self.tensors, self.weights.masters(), 1 - decay)

    @contextlib.contextmanager
    def in_masters(self) -> Iterator[None]:
        """Swaps averages and master weights inside the block. The model's weights do not change."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Puts the averages into the model's weights inside the block. Collective."""
        with self.in_masters():
            self.weights.update_model()
            yield
        self.weights.update_model()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self.tensors, self.weights.masters(), strict=True):
            previous = master.clone()
            master.copy_(average)
            average.copy_(previous)

    def save(self, folder: Path) -> None:
        """Writes this rank's part of the averages into average-<rank>.safetensors.

        The key "<name>:<start>" holds a part of the flattened parameter <name>, from element <start> on. Under stage 0 every
        rank has all of it, and only rank 0 writes.
        """
        if self.weights.stage == 0 and dist.rank() > 0:
            return
        with self.in_masters():
            parts = {f"{name}:{start}": part.flatten() for name, start, part in self.weights.fragments()}
            path = folder / f"average-{dist.rank():05d}.safetensors"
            save_file(parts, path)
            share(path)

    def load(self, folder: Path) -> None:
        """Reads what save() wrote, with any number of ranks. Overwrites the master weights. Collective."""
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("average*.safetensors"))]
            saved: dict[str, list[tuple[int, int, object]]] = {}  # name → [(start, stop, reader of the elements)]
            for file in files:
                for key in file.keys():  # noqa: SIM118 — safe_open is no dict
                    # Before ZeRO's parts were saved apart, one file held each average whole, under its plain name.
                    name, _, start = key.rpartition(":") if ":" in key else (key, "", "0")
                    size = torch.Size(file.get_slice(key).get_shape()).numel()
                    saved.setdefault(name, []).append((int(start), int(start) + size, (file, key)))
            for name, start, part in self.weights.fragments():
                part.copy_(_read_range(saved[name], start, start + part.numel()).view(part.shape))
        self.restart()


def _read_range(saved: list[tuple[int, int, tuple]], start: int, stop: int) -> torch.Tensor:
    """Reads elements start to stop of a flattened parameter from the saved parts that overlap them."""
    parts = []
    for first, last, (file, key) in sorted(saved, key=lambda entry: entry[0]):
        if first < stop and start < last:
            window, stored = slice(max(start - first, 0), min(stop, last) - first), file.get_slice(key)
            flat = len(stored.get_shape()) == 1
            parts.append(stored[window] if flat else file.get_tensor(key).flatten()[window])
    return torch.cat(parts)
