"""Which values of a metrics log MLflow lacks, and where to go on reading the log."""

import zlib
from collections.abc import Callable
from pathlib import Path

from hpc.run import journal
from hpc.run.metrics_log import numbers

Value = tuple[str, float, int, int]  # name of the metric, value, Unix time in milliseconds, samples seen
MAX_VALUES = 1000  # the most that MLflow accepts in one request


class NewLines:
    """Sends the new values of one metrics.jsonl, and moves the cursor in mlflow.json after each batch that MLflow accepted.

    A value is new if its number of samples is above the latest step that MLflow stores for its metric. MLflow handles a request
    as one transaction: it stores either all values of a request or none. The comparison is therefore exact, even if MLflow
    stored the last request but its answer was lost.
    """

    def __init__(self, path: Path, entry: dict, latest: dict[str, int], send: Callable[[list[Value]], None]):
        """
        Args:
            path: The metrics log.
            entry: The stage's entry in mlflow.json, which holds the cursor.
            latest: Samples of the latest value of each metric that MLflow has.
            send: Sends at most MAX_VALUES values in one request.
        """
        self.path, self.entry, self._send = path, entry, send
        self.batch: list[Value] = []
        self.sent = 0
        known = entry.get("last", {})
        self.last: dict[str, int] = known | {name: max(samples, known.get(name, -1)) for name, samples in latest.items()}
        self.offset = entry.get("offset", 0)
        # Another checksum means that a resume has cut the file back, and the file may have grown since. Read it from the start.
        if _checksum_before(path, self.offset) != entry.get("tail", 0):
            self.offset = 0

    def send(self) -> int:
        """Sends everything new and returns the number of values."""
        if not self.path.exists():
            return 0
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # the stage is still writing this line
                self._add(line)
            self._send_batch()
        return self.sent

    def _add(self, line: bytes) -> None:
        """Adds the new values of a line to the batch of values. If the batch would become too large, sends it first."""
        row = numbers(journal.parse(line))
        # Each value gets the time of its line. If a value arrives twice with the same time, MLflow stores it once.
        samples, time_ms = row.get("samples", -1), int(row.pop("time", 0) * 1000)
        new = {name: float(value) for name, value in row.items() if samples > self.last.get(name, -1)}
        if len(self.batch) + len(new) > MAX_VALUES:
            self._send_batch()
        self.batch += [(name, value, time_ms, samples) for name, value in new.items()]
        self.last |= dict.fromkeys(new, samples)
        self.offset += len(line)

    def _send_batch(self) -> None:
        for i in range(0, len(self.batch), MAX_VALUES):
            self._send(self.batch[i : i + MAX_VALUES])
        self.sent += len(self.batch)
        tail = _checksum_before(self.path, self.offset)
        self.entry.update(offset=self.offset, tail=tail, last=dict(self.last))
        self.batch.clear()


def _checksum_before(path: Path, offset: int) -> int:
    """Returns the checksum of the 256 bytes before an offset. They include a line's time, so a rewritten file differs."""
    if not offset:
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, offset - 256))
        return zlib.crc32(file.read(min(256, offset)))
