"""The directory of a stage: the record stage.json and the directory's lock. Also durable writes of small files.

stage.json records the settings and inputs of the result, and whether the stage is done. Invariant: a stage continues in a
directory only if the recorded settings and inputs equal the requested ones; otherwise StageDir.check raises UserError.
lesiongen/stages/base.py locks the directory of a stage and updates its record.
"""

import contextlib
import errno
import fcntl
import getpass
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hpc.config import differences
from hpc.errors import Busy, UserError

# Directories of a run that are stages; "prior" stands for prior-LEVEL, one for each level.
STAGE_KINDS = ("shards", "tokenizer", "codes", "polish", "prior", "samples", "report")
# Files of a stage directory that hold no part of a result.
WITHOUT_RESULT = {"stage.json", "config.yaml", ".lock", "rejected.jsonl", "left_out.jsonl"}
COMMIT_FILE = "commit.txt"  # beside the packages in a copy of the code that a job runs, see launch/snapshot.py
QUIET_WAIT_S = 5.0  # the ranks of a killed run may need a moment to end and free their lock


def fsync_dir(path: Path) -> None:
    """Flushes a directory to the disk, so that new and renamed files in it survive a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path, content: bytes) -> None:
    """Writes a file so that readers see the complete old content or the complete new content, even after a crash.

    The content is written to a temporary file, which is then renamed. If the disk is full, the old file stays.

    Args:
        path: The file; its directory is created if needed.
        content: The new content.
    """
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


def share(path: Path) -> None:
    """Gives a file that a library has written for its owner alone the permissions of an ordinary new file."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def remove_leftovers(path: Path) -> None:
    """Removes the temporary files of atomic_write() that a killed process has left in a directory.

    Call it under the directory's lock, while no other process writes there.

    Args:
        path: The directory; its subdirectories are searched too.
    """
    for leftover in path.rglob(".*.tmp"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)


def environment() -> dict:
    """Returns versions of Python and packages, the git commit, the machine, the user and the command line, for stage.json."""
    versions = {}
    for name in ("lesiongen", "torch", "torchvision", "deepspeed", "webdataset", "submitit", "mlflow", "numpy", "pillow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    versions["commit"] = _commit()
    return {
        "python": platform.python_version(),
        "versions": versions,
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "user": _user(),
        "command": sys.argv,
    }


def _commit() -> str:
    """Returns the git commit of this code; "unknown" if there is no git."""
    copied = Path(__file__).parents[2] / COMMIT_FILE
    if copied.exists():
        return copied.read_text()
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    return "unknown"


def _user() -> str:
    """Returns the user's name; in a container the user may have none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid{os.getuid()}"


@dataclass(frozen=True)
class StageDir:
    """Directory of a stage's result, and what the result must be made from.

    Attributes:
        path: The directory.
        identity: Settings that determine the result, as plain data. Stored in full, not as a digest, so that a message can
            name the setting that differs.
        inputs: Digest of each artefact (result of a stage) that this stage reads, by name; None for an unfinished artefact.
        target: Amount of work after which the stage is done, such as a number of samples. A larger target continues the result.
        as_requested: as_requested(path, recorded, requested) returns the recorded identity, in which the requested values
            replace recorded values of the same meaning, such as another spelling of a path. None replaces nothing.
        adjustable: Dotted keys of the identity that may change when the work has diverged.
        describe: Returns a few words on what is made, such as "gpt 4×192 · 2.0 M". Called once the inputs are finished.
    """

    path: Path
    identity: dict
    inputs: dict
    target: int = 1
    as_requested: Callable[[Path, dict, dict], dict] | None = None
    adjustable: tuple[str, ...] = ()
    describe: Callable[[], str] | None = None

    @property
    def record(self) -> dict | None:
        """Content of stage.json, or None if the file does not exist."""
        return read_stage_record(self.path)

    @property
    def digest(self) -> str | None:
        """Digest of the recorded result, or None if the recorded work is not finished."""
        record = self.record
        return record["digest"] if record and record["done"] else None

    def differences(self) -> list[str]:
        """Lists differences between the recorded and the requested identity and inputs; [] if nothing is recorded."""
        record = self.record
        return [] if record is None or self._holds_nothing(record) else self._differences_of(record)

    def _differences_of(self, record: dict) -> list[str]:
        identity = json.loads(json.dumps(self.identity))  # tuples become lists, as in the record
        recorded = record["identity"]
        if self.as_requested:
            recorded = self.as_requested(self.path, recorded, identity)
        changed = differences(recorded, identity)
        if "diverged" in record:
            changed = [line for line in changed if not line.startswith(tuple(f"{key}: " for key in self.adjustable))]
        return changed + differences(record["inputs"], self.inputs, "input")

    def _holds_nothing(self, record: dict) -> bool:
        """Returns whether a first try failed before it made anything, so that the record binds nothing."""
        files = {p.name for p in self.path.iterdir() if not p.match("stacks-*.txt")}
        return record["digest"] is None and files <= WITHOUT_RESULT

    def done(self) -> bool:
        """Returns whether the stage has finished at least the requested amount of work."""
        record = self.record
        return bool(record and record["done"] and record["target"] >= self.target)

    def check(self) -> None:
        """Raises UserError if the directory holds a result with another identity or other inputs."""
        if changed := self.differences():
            raise UserError(
                f"{self.path} was made with other settings or inputs: {'; '.join(changed[:5])}. Restore them, give the run "
                f"another name, or delete this result and make it again with --fresh {self.path.name}."
            )

    def check_begun(self) -> None:
        """Raises UserError unless begin() was called for this identity and these inputs."""
        record = self.record
        if record is None or self._differences_of(record):
            raise UserError(f"{self.path} is not prepared for these settings and inputs. Submit again.")

    def begin(self, config_yaml: str | None = None) -> None:
        """Records identity and inputs before any work, so that a killed stage can be resumed only with the same ones.

        Args:
            config_yaml: The resolved config, to be written as config.yaml. None writes no file.

        Raises:
            UserError: The directory holds a result with another identity or other inputs.
        """
        self.check()
        record = self.record or {"created": time.time(), "digest": None}
        if record.pop("diverged", None) and (changed := differences(record["identity"], json.loads(json.dumps(self.identity)))):
            record["adjusted"] = [*record.get("adjusted", ()), *changed]
        record.pop("ended", None)
        current = {"identity": self.identity, "inputs": self.inputs, "target": self.target, "environment": environment()}
        current["title"] = self.describe() if self.describe else ""
        self._write(record | current | {"done": False})
        if config_yaml:
            atomic_write(self.path / "config.yaml", config_yaml.encode())

    def mark_diverged(self, reason: str) -> None:
        """Records that the work has diverged: its `adjustable` settings may now change, and the same directory continues."""
        self._write({**(self.record or {}), "diverged": reason})

    def mark_ended(self, how: str, reason: str) -> None:
        """Records that the work has ended before it was done.

        Args:
            how: "failed", or "stopped" if somebody asked for it.
            reason: Why, in one line.
        """
        self._write({**(self.record or {}), "ended": {"how": how, "reason": reason, "time": time.time()}})

    def finish(self, digest: str) -> None:
        """Records that the stage is done, with the digest of its result."""
        self._write({**(self.record or {}), "done": True, "digest": digest, "target": self.target, "finished": time.time()})

    def change(self, digest: str) -> None:
        """Records the digest of a finished result of which a part was removed. What was made from it is stale then."""
        self._write({**(self.record or {}), "digest": digest})

    def delete(self) -> None:
        """Deletes the directory, for --fresh. Does nothing if the directory does not exist.

        Raises:
            UserError: The directory has files but no stage.json, or another process holds its lock.
        """
        if not self.path.exists():
            return
        if self.record is None and any(p.name != ".lock" for p in self.path.iterdir()):
            raise UserError(
                f"{self.path} has no stage.json, so it is not the result of a stage, and --fresh does not delete it. "
                "Delete or move it yourself, or choose another directory."
            )
        # Rename first. If the process is killed during the deletion, no incomplete stage directory remains under this path.
        with lock(self.path):
            removed = self.path.with_name(f".{self.path.name}.removed-{os.getpid()}")
            self.path.rename(removed)
        shutil.rmtree(removed)

    def _write(self, record: dict) -> None:
        atomic_write(self.path / "stage.json", json.dumps(record, indent=1).encode() + b"\n")


def location(path: Path) -> dict:
    """Returns what tells a directory from its copies, for a record inside it: its path and its inode."""
    return {"path": str(path.resolve()), "inode": path.stat().st_ino}


def was_copied(path: Path, recorded: dict) -> bool:
    """Returns whether a directory is a copy of the one whose location() a record in it holds.

    A directory that was moved keeps its inode, and one that was restored keeps its path; a copy has neither.
    """
    return not location(path).items() & recorded.items()


def same_path(one: str | None, other: str | None) -> bool:
    """Returns whether two spellings name one file or folder: relative or absolute, with links, with a slash at the end."""
    return bool(one and other) and os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))


def read_stage_record(path: Path) -> dict | None:
    """Reads stage.json of a stage directory. Returns None if the file does not exist; raises UserError if it is damaged."""
    try:
        return json.loads((path / "stage.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path / 'stage.json'} is damaged ({error}). Make the stage again with --fresh.") from None


def is_locked(path: Path) -> bool:
    """Returns whether a process holds the lock of a directory, on this machine or where the file system shares locks."""
    try:
        with open(path / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@contextlib.contextmanager
def lock(path: Path, wait_s: float = 0.0, shared: bool = False) -> Iterator[None]:
    """Locks a directory inside the block. The operating system frees the lock when the process ends, also when it is killed.

    Args:
        path: The directory; it is created if needed. The lock is on its file .lock, whose text names the locking process.
        wait_s: Seconds to wait for another process to free the lock.
        shared: Whether other processes may hold shared locks at the same time.

    Raises:
        Busy: Another process holds the lock.
        UserError: The file system does not support locks.
    """
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "a+") as file:
        began, announced = time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise UserError(
                        f"{path} cannot be locked ({error.strerror}). Mount its file system with support for flock, or use "
                        "another file system."
                    ) from None
                waited = time.monotonic() - began
                if waited >= wait_s or (waited >= QUIET_WAIT_S and not announced):
                    file.seek(0)
                    in_use = f"{path} is in use by another process ({file.read().strip() or 'unknown'})"
                    if waited >= wait_s:
                        raise Busy(f"{in_use}. Wait until it ends, or stop it. Nothing was changed.") from None
                    print(f"lesiongen: {in_use}; waiting up to {wait_s:.0f} s", file=sys.stderr, flush=True)
                    announced = True
                time.sleep(0.1)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}, job {os.environ.get('SLURM_JOB_ID', 'none')}")
        file.flush()
        yield
