"""Checkpoints by two-phase commit: a directory without a valid manifest does not exist.

`step-N.tmp/` → every rank writes and fsyncs → barrier → rank 0 writes MANIFEST.json, renames, fsyncs the parent. There
is no `latest` file: the newest directory whose files all verify is chosen by rank 0 and broadcast.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hpc import dist
from hpc.data import manifest
from hpc.errors import UserError
from hpc.run.rundir import atomic_write, fsync_dir
from hpc.train.engine import Engine, EngineConfig

MANIFEST = "MANIFEST.json"


def save(folder: Path, step: int, engine: Engine, state: dict, keep: int = 2, best: int | None = None) -> Path:
    """Writes checkpoint `step` with the loop's plain state, then removes all but the newest `keep` and the `best`.
    Collective."""
    final, temporary = folder / f"step-{step:06d}", folder / f"step-{step:06d}.tmp"
    dist.run_on_leader(_prepare, temporary)
    engine.save(temporary)
    for path in temporary.rglob("*"):
        if path.is_file() and (dist.rank() == 0 or f"rank_{dist.rank()}_" in path.name):
            _fsync(path)
    dist.barrier()
    facts = {"step": step, "world": engine.world, "zero": engine.config.zero, "state": state}
    dist.run_on_leader(_commit, temporary, final, facts)
    dist.run_on_leader(_retain, folder, keep, best)
    return final


def _prepare(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def _commit(temporary: Path, final: Path, facts: dict) -> None:
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    entries = [manifest.describe(p) | {"name": str(p.relative_to(temporary))} for p in files]
    atomic_write(temporary / MANIFEST, json.dumps(facts | {"files": entries}, indent=1).encode() + b"\n")
    shutil.rmtree(final, ignore_errors=True)  # a damaged one of this name, fallen back from
    temporary.rename(final)
    fsync_dir(final.parent)


def _retain(folder: Path, keep: int, best: int | None) -> None:
    for old in found(folder)[:-keep]:
        if _step(old) != best:
            shutil.rmtree(old, ignore_errors=True)


def found(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    committed = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / MANIFEST).exists()]
    return sorted(committed, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def read(path: Path) -> dict:
    return json.loads((path / MANIFEST).read_text())


def problems(path: Path) -> list[str]:
    """What differs from the manifest, a line each; empty for a sound checkpoint."""
    try:
        return manifest.verify(path, read(path)["files"])
    except (OSError, ValueError, KeyError) as error:
        return [f"{path / MANIFEST}: {error}"]


def choose(folder: Path) -> Path | None:
    """The newest sound checkpoint, or None. Rank 0 verifies, every rank hears the same. Collective."""
    return dist.run_on_leader(_choose, folder)


def _choose(folder: Path) -> Path | None:
    for path in reversed(found(folder)):
        if not (wrong := problems(path)):
            return path
        print(f"checkpoint {path.name} is damaged ({wrong[0]}); falling back to the one before", file=sys.stderr, flush=True)
    return None


def needs_universal(path: Path, config: EngineConfig, world: int) -> bool:
    """Whether the engine's state must be converted because ranks or ZeRO stage differ from those that saved it."""
    facts = read(path)
    if facts["zero"] > 0 and config.zero == 0:
        raise UserError(f"{path} was saved under ZeRO {facts['zero']} and cannot be continued under ZeRO 0; use 1, 2 or 3.")
    same = facts["world"] == world and facts["zero"] == config.zero
    return not same and (facts["zero"] > 0 or config.zero > 0)


def to_universal(path: Path) -> None:
    """Makes DeepSpeed's universal format beside the engine's state. Raises UserError where its converter cannot. Collective."""
    dist.run_on_leader(_to_universal, path)


def _to_universal(path: Path) -> None:
    facts = read(path)
    if facts["zero"] == 0:
        raise UserError(
            f"{path} was saved under ZeRO 0 and cannot be continued under another ZeRO stage. Set train.engine.zero=0."
        )
    target = path / "universal"
    if target.exists():
        return
    making = path / "universal.tmp"
    shutil.rmtree(making, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(path / "engine"), "--output_folder", str(making)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{path} was saved by {facts['world']} ranks under ZeRO {facts['zero']}, and DeepSpeed cannot convert it "
            f"({(done.stderr.strip().splitlines() or ['no reason given'])[-1]}). Resume with {facts['world']} ranks."
        )
    making.rename(target)
