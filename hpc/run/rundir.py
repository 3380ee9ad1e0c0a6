"""Stage directories: lock, what they were made from, whether they are done; durable writes."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hpc.config import differences
from hpc.errors import UserError


def fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path, content: bytes) -> None:
    """Readers see the old file or the new one, whole, also after a crash or on a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def environment() -> dict:
    """Versions, code and machine, for the record beside a result."""
    versions = {}
    for name in ("lesiongen", "torch", "torchvision", "deepspeed", "webdataset", "submitit", "mlflow", "numpy", "pillow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        versions["commit"] = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    return {
        "python": platform.python_version(),
        "versions": versions,
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "command": sys.argv,
    }


@dataclass(frozen=True)
class StageDir:
    """One stage's directory and what it must have been made from.

    identity: plain data that makes the result another thing (the fingerprint, kept readable so a difference is named)
    inputs:   digest of each artefact upstream
    target:   how much work makes it done (samples, draws …); more of it continues, it is no other thing
    """

    path: Path
    identity: dict
    inputs: dict
    target: int = 1

    @property
    def record(self) -> dict | None:
        return read_stage_record(self.path)

    @property
    def digest(self) -> str | None:
        record = self.record
        return record["digest"] if record and record["done"] else None

    def stale(self) -> list[str]:
        """Differences between what is there and what is asked for; empty if none or nothing is there."""
        record = self.record
        if record is None:
            return []
        return differences(record["identity"], json.loads(json.dumps(self.identity))) + differences(
            record["inputs"], self.inputs, "input"
        )

    def done(self) -> bool:
        record = self.record
        return bool(record and record["done"] and record["target"] >= self.target)

    def check(self) -> None:
        """Raises UserError where the directory was made from something else."""
        if changed := self.stale():
            raise UserError(
                f"{self.path} was made from another configuration: {'; '.join(changed[:5])}. Change it back, give the run "
                f"another name, or make this stage anew with --fresh {self.path.name}."
            )

    def begin(self, config_yaml: str | None = None) -> None:
        """Records the identity before any work, so that a killed stage is resumed only as the same thing."""
        self.check()
        record = self.record or {"created": time.time(), "digest": None}
        now = {"identity": self.identity, "inputs": self.inputs, "target": self.target, "environment": environment()}
        self._write(record | now | {"done": False})
        if config_yaml:
            atomic_write(self.path / "config.yaml", config_yaml.encode())

    def finish(self, digest: str) -> None:
        self._write({**(self.record or {}), "done": True, "digest": digest, "target": self.target, "finished": time.time()})

    def clear(self) -> None:
        """--fresh: the stage's directory goes, under its lock. A rename first, so that a kill leaves none half there."""
        if not self.path.exists():
            return
        if self.record is None and any(p.name != ".lock" for p in self.path.iterdir()):
            raise UserError(f"{self.path} is no stage's directory (it has no stage.json); --fresh will not delete it.")
        with lock(self.path):
            doomed = self.path.with_name(f".{self.path.name}.removed-{os.getpid()}")
            self.path.rename(doomed)
        shutil.rmtree(doomed)

    def _write(self, record: dict) -> None:
        atomic_write(self.path / "stage.json", json.dumps(record, indent=1).encode() + b"\n")


def read_stage_record(path: Path) -> dict | None:
    """stage.json of a stage directory, None where there is none."""
    try:
        return json.loads((path / "stage.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path / 'stage.json'} is damaged ({error}). Make the stage anew with --fresh.") from None


@contextlib.contextmanager
def lock(path: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Exclusive use of a directory; freed by the system when its holder dies. Raises UserError while another holds it."""
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "a+") as file:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise UserError(f"{path} cannot be locked ({error.strerror}); mount its file system with flock.") from None
                if time.monotonic() >= deadline:
                    file.seek(0)
                    raise UserError(
                        f"{path} is in use by another process ({file.read().strip() or 'unknown'}). Wait for it to end, "
                        "or stop it; nothing was changed."
                    ) from None
                time.sleep(0.1)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}, job {os.environ.get('SLURM_JOB_ID', 'none')}")
        file.flush()
        yield
