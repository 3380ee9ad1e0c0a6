"""A thread that copies the metrics logs of a run to MLflow while the run goes on; see mlflow_sync.py."""

import math
import sys
import threading
import time
from pathlib import Path

from hpc.run.mlflow_address import without_password
from hpc.run.mlflow_sync import sync

STALE_CLOSE_S = 5.0  # seconds that the end of a stage waits for an MLflow that has failed or hung for some time


class Follower:
    """A daemon thread that syncs a run regularly. Blocks neither the training nor the exit of the process.

    Unsent lines stay in the file, not in memory, so memory does not grow while the server is down.

    Args:
        run_dir: The run's directory.
        uri: The tracking URI.
        interval: Seconds between two syncs. After failures the pause doubles, up to 60 s.

    Attributes:
        failures: Number of syncs that have failed.
    """

    def __init__(self, run_dir: Path, uri: str, interval: float = 5.0):
        self.run_dir, self.uri, self.interval, self.failures = Path(run_dir), uri, interval, 0
        self._succeeded = time.monotonic()  # when the last sync succeeded; at first, when the thread started
        self._stop, self._deadline, self._delivered = threading.Event(), math.inf, False
        self._thread = threading.Thread(target=self._loop, name="mlflow", daemon=True)
        self._thread.start()

    def close(self, deadline: float = 15.0) -> bool:
        """Syncs a last time and returns whether everything was sent. Prints a line if not.

        Args:
            deadline: Seconds after which the last sync is given up; STALE_CLOSE_S if no sync has succeeded for six intervals.
        """
        if time.monotonic() - self._succeeded > 6 * self.interval:
            deadline = min(deadline, STALE_CLOSE_S)
        self._deadline = time.monotonic() + deadline
        self._stop.set()
        self._thread.join(deadline)
        if not self._delivered:
            print_stderr(f"MLflow at {without_password(self.uri)} did not receive the last metrics. The next sync sends them.")
        return self._delivered

    def _loop(self) -> None:
        failed = 0  # failed syncs in a row
        while True:
            closing = self._stop.wait(min(self.interval * 2**failed, 60.0))
            try:
                # At the end, wait for any other process that is syncing this run, to be sure that everything is sent.
                while (busy := sync(self.run_dir, self.uri).busy) and closing and time.monotonic() < self._deadline:
                    time.sleep(0.1)
                if failed:
                    print_stderr(f"MLflow at {without_password(self.uri)} is reachable again.")
                failed, self._delivered, self._succeeded = 0, closing and not busy, time.monotonic()
            except Exception as error:
                self.failures += 1
                failed = min(failed + 1, 8)
                if failed == 1:
                    print_stderr(f"{error}. Training continues. The metrics are sent when MLflow is reachable again.")
            if closing:
                return


def print_stderr(text: str) -> None:
    """Prints a line to stderr at once."""
    print(text, file=sys.stderr, flush=True)
