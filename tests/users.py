"""Other users of this machine, for tests that run as root: two members of a group, and one who is no member.

They exist only for the commands that are started here, in a mount namespace of their own: nothing changes on the machine.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import tiny

ROOT = Path(__file__).parents[1]
GROUP = 5000
MEMBERS = {"ada": (5001, GROUP), "ben": (5002, GROUP)}  # name: uid and gid
USERS = MEMBERS | {"stranger": (4321, 4321)}  # the stranger has no entry in the system's list of users, as in containers
# Runs several commands in one process, because the imports take seconds. Prints the exit code of each.
COMMANDS = """
import json, sys
from launch.__main__ import main
from launch.endings import exit_process
for command in json.loads(sys.argv[1]):
    print("rc", main(command), command[0], flush=True)
exit_process(0)
"""


def needs_users() -> pytest.MarkDecorator:
    """Marks tests that must become other users."""
    able = os.getuid() == 0 and all(map(shutil.which, ("unshare", "setpriv", "mount")))
    able = able and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
    return pytest.mark.skipif(not able, reason="needs root, to become other users")


def hidden(path: Path) -> Path | None:
    """Returns the highest folder above a path that other users cannot enter; None if they can enter all."""
    return next((p for p in [*reversed(path.parents), path] if p.stat().st_mode & 0o005 != 0o005), None)


def namespace(folder: Path, read_only: Path | None) -> list[str]:
    """Lines of a shell script that make the users known and Python readable to them, whoever owns its folder."""
    lines = []
    for name, entries in {
        "passwd": [f"{user}:x:{uid}:{gid}::{folder / user}:/bin/sh" for user, (uid, gid) in MEMBERS.items()],
        "group": [f"clinic:x:{GROUP}:ada,ben"],
    }.items():
        (folder / name).write_text(Path(f"/etc/{name}").read_text() + "\n".join(entries) + "\n")
        lines.append(f"mount --bind {folder / name} /etc/{name}")
    needed = sorted(p for p in {ROOT, Path(sys.prefix), Path(sys.base_prefix)} if hidden(p))
    stash = folder / "stash"
    lines += [f"mkdir -p {stash}", f"mount -t tmpfs tmpfs {stash}"]
    lines += [f"mkdir {stash}/{i}; mount --rbind {path} {stash}/{i}" for i, path in enumerate(needed)]
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {path}" for path in sorted({hidden(p) for p in needed})]
    lines += [f"mkdir -p {path}; mount --rbind {stash}/{i} {path}" for i, path in enumerate(needed)]
    if read_only:
        lines += [f"mount --bind {read_only} {read_only}", f"mount -o remount,ro,bind {read_only}"]
    return lines


class Clinic:
    """A folder of photographs that all users can read, and a folder `runs` with the set-group-ID bit for the group."""

    def __init__(self, folder: Path, phantoms: Path):
        self.folder, self.photos, self.runs = folder, folder / "photos", folder / "runs"
        folder.chmod(0o755)
        shutil.copytree(phantoms, self.photos)
        for path in (self.photos, *self.photos.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        self.runs.mkdir()
        os.chown(self.runs, USERS["ada"][0], GROUP)
        self.runs.chmod(0o2775)
        for user, (uid, gid) in USERS.items():
            (folder / user).mkdir()
            os.chown(folder / user, uid, gid)
        able = self.python("stranger", "-c", "import launch, numpy, torch")
        if able.returncode:
            pytest.skip(f"another user cannot read this checkout or its Python: {able.stderr[-300:]}")

    def tiny(self, **more: object) -> list[str]:
        """Returns the overrides of a tiny run in `runs`."""
        return tiny(self.photos, self.runs, **more)

    def python(self, user: str, *arguments: str, umask: str = "002", **more: Path | None) -> subprocess.CompletedProcess:
        """Runs Python as a user, in the user's home folder."""
        uid, gid = USERS[user]
        lines = [
            "set -eu",
            *namespace(self.folder, more.get("read_only")),
            f"umask {umask}",
            f"cd {self.folder / user}",
        ]
        groups = "--init-groups" if user in MEMBERS else "--clear-groups"
        become = ["exec", "setpriv", f"--reuid={uid}", f"--regid={gid}", groups, sys.executable, *arguments]
        script = "\n".join([*lines, shlex.join(become)])
        environment = {k: v for k, v in os.environ.items() if k not in ("USER", "LOGNAME", "LNAME", "USERNAME")}
        environment |= {"HOME": str(self.folder / user), "PYTHONPATH": str(ROOT)}
        command = ["unshare", "--mount", "sh", "-c", script]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    def run(self, user: str, *commands: list[str], **more: Path | None) -> tuple[list[int], str]:
        """Runs commands of lesiongen as a user, in one process. Returns their exit codes and what they printed."""
        words = [[str(word) for word in command] for command in commands]
        done = self.python(user, "-c", COMMANDS, json.dumps(words), **more)
        codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("rc ")]
        assert len(codes) == len(commands), done.stdout + done.stderr
        return codes, done.stdout + done.stderr


def make_clinic(phantoms: Path) -> Iterator[Clinic]:
    """Yields a clinic in a folder that every user can enter, and removes it."""
    folder = Path(tempfile.mkdtemp(prefix="lesiongen-users-"))
    try:
        yield Clinic(folder, phantoms)
    finally:
        shutil.rmtree(folder)
