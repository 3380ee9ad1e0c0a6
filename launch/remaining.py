"""How long the trainings of a run still take, which `run` says at the beginning of each stage."""

import statistics

from hpc.run import metrics_log
from hpc.train.hardware import machines
from launch.cost import Training, trainings
from lesiongen.experiment import Experiment


class TrainingTime:
    """Estimates how long trainings still take. The other stages are not counted.

    A training that has begun goes on at its own speed. The others run at the speed of the run's trainings so far, in operations
    per second; before there is one, at the speed that `lesiongen plan` assumes.
    """

    def __init__(self, config: Experiment):
        self.config, self.trainings = config, list(trainings(config))

    def left(self, stages: list[str]) -> float | None:
        """Returns the seconds that the trainings among some stages still take; None if none trains or the speed is unknown.

        Args:
            stages: Names of the stages.
        """
        waiting = {training.name: self._operations_left(training) for training in self.trainings if training.name in stages}
        if not waiting:
            return None
        measured = {training.name: speed for training in self.trainings if (speed := self._measured(training))}
        usual = statistics.median(measured.values()) if measured else self._planned()
        return sum(operations / measured.get(name, usual) for name, operations in waiting.items()) if usual else None

    def _measured(self, training: Training) -> float | None:
        """Returns the speed of a training so far in operations per second; None if it has not begun."""
        rows = metrics_log.read_metrics(self.config.directory / training.name)
        speeds = [row["images_per_second"] for row in rows if row.get("images_per_second")]
        return statistics.median(speeds) * training.flops if speeds else None

    def _planned(self) -> float | None:
        """Returns the operations per second that a plan assumes of this machine; None for a GPU of unknown speed."""
        where = machines(self.config.hardware, self.config.local.ranks)
        return where.peak_flops and where.peak_flops * where.ranks * self.config.hardware.utilisation

    def _operations_left(self, training: Training) -> float:
        seen = metrics_log.samples_seen(self.config.directory / training.name)
        return max(0, training.train.samples - seen) * training.flops
