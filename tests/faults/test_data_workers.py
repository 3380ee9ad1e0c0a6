"""An error in a data worker ends the process: workers ignore SIGTERM, and Python would wait for them without end."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpc.data.shards import computed_ahead
from hpc.data.storage import StorageError
from launch.endings import exit_process


class Failing(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 9

    def __getitem__(self, number: int) -> int:
        if number == 5:
            raise StorageError("the disk is gone")
        return number


def fail() -> None:
    """The main program: keeps the error, and with it the workers, alive until the end."""
    try:
        list(computed_ahead(Failing(), 2))
    except StorageError as error:
        kept.append(error)
    print("failed", flush=True)
    exit_process(3)


kept: list[Exception] = []


@pytest.mark.timeout(120)
def test_a_process_whose_worker_failed_ends():
    done = subprocess.run(
        [sys.executable, "-c", "from tests.faults.test_data_workers import fail\nif __name__ == '__main__': fail()"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 3 and "failed" in done.stdout, done.stderr
