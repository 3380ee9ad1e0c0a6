"""Checkpoints of the training loop: writing, verifying, finding the newest, converting to another number of ranks.

Invariant: every directory step-N with a MANIFEST.json is complete. All ranks write and fsync files in step-N.tmp. Then rank 0
writes step-N.tmp/MANIFEST.json and renames step-N.tmp to step-N; this rename is the commit. Directories without MANIFEST.json
are ignored.

A checkpoint is sound if all its files match the checksums in its manifest. On a resume, rank 0 picks the newest sound
checkpoint for all ranks. There is no `latest` file.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hpc import dist
from hpc.config import digest
from hpc.data import manifest
from hpc.errors import UserError
from hpc.run.rundir import atomic_write, fsync_dir, read_stage_record
from hpc.train.engine import Engine, EngineConfig

MANIFEST = "MANIFEST.json"


def save(
    folder: Path, step: int, engine: Engine, state: dict, keep: int = 2, best: int | None = None, wait_s: float = 300.0
) -> Path:
    """Writes a checkpoint and deletes old ones. Collective.

    Args:
        folder: The directory of all checkpoints.
        step: Number of the optimizer step; part of the checkpoint's name.
        engine: The engine whose state is saved.
        state: The training loop's state, as plain data for JSON.
        keep: Number of newest checkpoints to keep.
        best: Step of the best checkpoint, which is kept too.
        wait_s: How many seconds the ranks wait for one another before they save.

    Returns:
        The path of the new checkpoint.

    Raises:
        TimeoutError: Only some ranks have called save(); the message names the others.
    """
    dist.meet(f"saving step {step}", wait_s)
    final, temporary = folder / f"step-{step:06d}", folder / f"step-{step:06d}.tmp"
    dist.run_on_leader(_prepare, temporary)
    engine.save(temporary)
    dist.barrier()  # while ranks still write, the directory also holds temporary files
    # Each rank fsyncs and checksums the files that it wrote, so that no rank reads the whole checkpoint.
    mine = [path for path in sorted(temporary.rglob("*")) if path.is_file() and _writer(path) == dist.rank()]
    for path in mine:
        _fsync(path)
    entries = [manifest.describe(path) | {"name": str(path.relative_to(temporary))} for path in mine]
    entries = sorted((entry for part in dist.gather(entries) for entry in part), key=lambda entry: entry["name"])
    header = {"step": step, "world": engine.world_size, "zero": engine.config.zero, "state": state, "files": entries}
    dist.run_on_leader(_commit, temporary, final, header)
    dist.run_on_leader(_delete_old, folder, keep, best)
    return final


def _writer(path: Path) -> int:
    """The rank that wrote a file of a checkpoint: names of files of all ranks hold the rank; rank 0 writes all other files."""
    match = re.search(r"zero_pp_rank_(\d+)_|average-(\d+)", path.name)
    return int(match.group(1) or match.group(2)) if match else 0


def _prepare(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def _commit(temporary: Path, final: Path, header: dict) -> None:
    """Writes the manifest, then renames the directory."""
    missing = [e["name"] for e in header["files"] if not (temporary / e["name"]).exists()]
    assert not missing, f"files that other ranks have written are not visible on rank 0: {missing[:5]}"
    for directory in {path.parent for path in temporary.rglob("*")}:
        fsync_dir(directory)
    header = json.loads(json.dumps(header | {"training": _training(final.parent)}))  # as it is read again
    atomic_write(temporary / MANIFEST, json.dumps(header | {"digest": digest(header)}, indent=1).encode() + b"\n")
    # A checkpoint of this step may exist already: from an earlier save, or a damaged one that the resume skipped.
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    fsync_dir(final.parent)


def _training(folder: Path) -> float | None:
    """Returns what tells the training of a folder of checkpoints from others: when its stage began. None outside a stage."""
    record = read_stage_record(folder.parent)
    return record and record["created"]


def _delete_old(folder: Path, keep: int, best: int | None) -> None:
    for path in committed(folder)[:-keep]:
        if step_of(path) != best:
            delete(path)


def delete(path: Path) -> None:
    """Deletes a checkpoint. A deletion that is interrupted leaves no manifest, so no checkpoint."""
    (path / MANIFEST).unlink()
    shutil.rmtree(path, ignore_errors=True)


def committed(folder: Path) -> list[Path]:
    """Returns the committed checkpoints in a folder, oldest first."""
    paths = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / MANIFEST).exists()]
    return sorted(paths, key=step_of)


def step_of(path: Path) -> int:
    """Returns the optimizer step after which a checkpoint was saved."""
    return int(path.name.removeprefix("step-"))


def read_manifest(path: Path) -> dict:
    """Returns the manifest of a checkpoint: {"step", "world", "zero", "state", "files", "training", "digest" of the rest}."""
    return json.loads((path / MANIFEST).read_text())


def verify(path: Path) -> list[str]:
    """Compares a checkpoint's files with its manifest. Returns one line per problem, [] for a sound checkpoint.

    Raises UserError if a file cannot be read.
    """
    try:
        header = read_manifest(path)
        recorded = header.pop("digest", None)  # manifests of older checkpoints have none
        if recorded not in (None, digest(header)):
            return [f"{path / MANIFEST}: the content has changed"]
        if header.get("training", _training(path.parent)) != _training(path.parent):
            return [f"{path}: it was saved by another training"]
        return manifest.verify(path, header["files"])
    except UserError:  # a file cannot be read
        raise
    except PermissionError as error:
        raise UserError(f"{path / MANIFEST} cannot be read ({error.strerror}). Correct its permissions.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{path / MANIFEST}: {error}"]


def newest_sound(folder: Path) -> Path | None:
    """Returns the newest sound checkpoint in a folder, or None. Rank 0 verifies the files for all ranks. Collective."""
    return dist.run_on_leader(_newest_sound, folder)


def _newest_sound(folder: Path) -> Path | None:
    for leftover in folder.glob("step-*.tmp"):  # of a save that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    for path in reversed(committed(folder)):
        if not (lines := verify(path)):
            return path
        print(f"checkpoint {path.name} is damaged ({lines[0]}); trying the previous checkpoint", file=sys.stderr, flush=True)
    return None


def needs_universal(path: Path, config: EngineConfig, world: int) -> bool:
    """Returns whether a checkpoint must be converted by to_universal() before the engine can load it.

    This is so if the number of ranks or the ZeRO stage has changed. Under ZeRO 0 the number of ranks does not matter, because
    each rank holds the whole state.

    Args:
        path: The checkpoint.
        config: The config of the engine that will load the checkpoint.
        world: The number of ranks that will load the checkpoint.

    Raises:
        UserError: The checkpoint's ZeRO stage cannot be resumed under the engine's. The stages form three groups, 0, 1 and 2,
            and 3; DeepSpeed carries no optimizer state from one group to another.
    """
    header = read_manifest(path)
    saved, group = header["zero"], {0: (0,), 1: (1, 2), 2: (1, 2), 3: (3,)}
    if config.zero not in group[saved]:
        stages = " or ".join(map(str, group[saved]))
        raise UserError(
            f"{path} was saved under ZeRO {saved} and cannot be resumed under ZeRO {config.zero}: DeepSpeed cannot convert it. "
            f"Set train.engine.zero={stages}, or train anew from the start (--fresh)."
        )
    return saved > 0 and (header["world"] != world or saved != config.zero)


def to_universal(path: Path) -> None:
    """Converts a checkpoint's engine state to DeepSpeed's universal format, in the subdirectory universal/. Collective.

    Raises:
        UserError: DeepSpeed's converter fails.
    """
    dist.run_on_leader(_to_universal, path)


def _to_universal(path: Path) -> None:
    header = read_manifest(path)
    target = path / "universal"
    if target.exists():
        return
    temporary = path / "universal.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    converter = "from hpc.train import zero; zero.convert_to_universal()"
    command = [sys.executable, "-c", converter, "--inject_missing_state"]
    command += ["--input_folder", str(path / "engine"), "--output_folder", str(temporary)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(
            f"{path} was saved by {header['world']} ranks under ZeRO {header['zero']}, and DeepSpeed cannot convert it "
            f"({(result.stderr.strip().splitlines() or ['no error message'])[-1]}). Resume with {header['world']} ranks and "
            f"train.engine.zero={header['zero']}."
        )
    temporary.rename(target)
