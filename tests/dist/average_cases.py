"""What each rank does in test_average.py."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from hpc import dist
from tests.dist.cases import whole_weights
from tests.dist.topology_cases import DECAY, Trainer


def by_hand(topology, run: str, steps: int, poisoned: int) -> tuple[list[float], list[float]]:
    """Compares the engine's averaged weights with an average that is computed here in fp64.

    A NaN makes the engine skip the step `poisoned`. The average is read after every step, which must not change the training.

    Returns:
        The loss of each step, and for each rank the largest difference of the averages after each step.
    """
    trainer = Trainer(topology, run, {"zero": 0, "accumulation": 4 // topology.world_size, "average": 1.0})
    average = [p.detach().double() for p in trainer.module.parameters()]
    losses, largest_differences = [], []
    for number in range(steps):
        step = trainer.step(poison=number == poisoned and topology.leader)
        losses.append(step.metrics["loss"])
        if number != poisoned:
            weights = [p.detach().double() for p in trainer.module.parameters()]
            average = [DECAY * a + (1 - DECAY) * w for a, w in zip(average, weights, strict=True)]
        whole = whole_weights(trainer.engine)
        averaged = [whole[name] for name, _ in trainer.module.named_parameters()]
        differences = [(p - a).abs().max() for p, a in zip(averaged, average, strict=True)]
        largest_differences.append(float(torch.stack(differences).max()))
        assert all(torch.equal(whole[name], b) for name, b in trainer.module.named_buffers() if name in whole)
    return losses, dist.gather(largest_differences)


def former_file(topology, run: str, folder: str) -> tuple[list[float], list[float]]:
    """Loads averages from one file of whole tensors, as older checkpoints have. Returns the sums before and after."""
    trainer = Trainer(topology, run, {"zero": 2, "average": 1.0})
    trainer.step()
    whole = whole_weights(trainer.engine)
    if topology.leader:
        named = {name: whole[name].contiguous() for name, _ in trainer.module.named_parameters()}
        save_file(named, Path(folder) / "average.safetensors")
    dist.barrier()
    averages = trainer.engine.averages
    before = [float(tensor.double().sum()) for tensor in averages.tensors]
    trainer.step()
    averages.load(Path(folder))
    return before, [float(tensor.double().sum()) for tensor in averages.tensors]
