"""What each rank does in test_average.py."""

import torch

from hpc import dist
from tests.dist.topology_cases import DECAY, Trainer


def by_hand(topology, run: str, steps: int, poisoned: int) -> tuple[list[float], list[float]]:
    """Compares the engine's averaged weights with an average that is computed here in fp64.

    A NaN makes the engine skip the step `poisoned`. The average is read after every step, which must not change the training.

    Returns:
        The loss of each step, and for each rank the largest difference of the averages after each step.
    """
    trainer = Trainer(topology, run, {"zero": 0, "accumulation": 4 // topology.world_size, "average": 1.0})
    average = [p.detach().double() for p in trainer.module.parameters()]
    plain, losses, largest_differences = trainer.task.build(), [], []
    for number in range(steps):
        step = trainer.step(poison=number == poisoned and topology.leader)
        losses.append(step.metrics["loss"])
        if number != poisoned:
            weights = [p.detach().double() for p in trainer.module.parameters()]
            average = [DECAY * a + (1 - DECAY) * w for a, w in zip(average, weights, strict=True)]
        trainer.engine.copy_to(plain)
        differences = [(p.detach() - a).abs().max() for p, a in zip(plain.parameters(), average, strict=True)]
        largest_differences.append(float(torch.stack(differences).max()))
        assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), trainer.module.buffers(), strict=True))
    return losses, dist.gather(largest_differences)
