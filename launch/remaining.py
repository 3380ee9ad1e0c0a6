"""How long the trainings of a run still take, which `run` says at the beginning of each stage."""

import contextlib
import statistics
from functools import cached_property

from hpc.errors import UserError
from hpc.run import metrics_log
from launch.cost import Training, trainings
from lesiongen.experiment import Experiment


class TrainingTime:
    """Estimates how long trainings still take, once one of the run's trainings has begun. The other stages are not counted.

    A training that has begun goes on at its own speed, the others at the speed of those, in operations per second.
    """

    def __init__(self, config: Experiment):
        self.config = config

    def left(self, stages: list[str]) -> float | None:
        """Returns the seconds that the trainings among some stages still take; None if none trains or the speed is unknown.

        Args:
            stages: Names of the stages.
        """
        if not self.config.trainings.keys() & set(stages):
            return None
        measured = {training.name: speed for training in self._trainings if (speed := self._speed(training))}
        if not measured:
            return None
        usual = statistics.median(measured.values())
        waiting = [training for training in self._trainings if training.name in stages]
        return sum(self._operations_left(training) / measured.get(training.name, usual) for training in waiting)

    @cached_property
    def _trainings(self) -> list[Training]:
        with contextlib.suppress(UserError):  # a loss needs a file that is missing; the stage that needs it will say so
            return list(trainings(self.config))
        return []

    def _speed(self, training: Training) -> float | None:
        """Returns the speed of a training so far in operations per second; None if it has not begun."""
        rows = metrics_log.read_metrics(self.config.directory / training.name)
        speeds = [row["images_per_second"] for row in rows if row.get("images_per_second")]
        return statistics.median(speeds) * training.flops if speeds else None

    def _operations_left(self, training: Training) -> float:
        seen = metrics_log.samples_seen(self.config.directory / training.name)
        return max(0, training.train.samples - seen) * training.flops
