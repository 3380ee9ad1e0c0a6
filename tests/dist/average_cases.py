"""What the ranks of the tests of averaged weights do."""

import torch

from hpc import dist
from tests.dist.topology_cases import DECAY, Trainer


def by_hand(topology, run: str, steps: int, poisoned: int) -> tuple[list[float], list[float]]:
    """(losses, distance of the engine's average from one made here in fp64, after each step). One step is left out; the
    average is read after every step, which must leave training as it is."""
    trainer = Trainer(topology, run, {"zero": 0, "accumulation": 4 // topology.world_size, "average": 1.0})
    average = [p.detach().double() for p in trainer.module.parameters()]
    plain, losses, distances = trainer.task.build(), [], []
    for number in range(steps):
        step = trainer.step(poison=number == poisoned and topology.leader)
        losses.append(step.metrics["loss"])
        if number != poisoned:
            weights = [p.detach().double() for p in trainer.module.parameters()]
            average = [DECAY * a + (1 - DECAY) * w for a, w in zip(average, weights, strict=True)]
        trainer.engine.copy_to(plain)
        differences = [(p.detach() - a).abs().max() for p, a in zip(plain.parameters(), average, strict=True)]
        distances.append(float(torch.stack(differences).max()))
        assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), trainer.module.buffers(), strict=True))
    return losses, dist.gather(distances)
