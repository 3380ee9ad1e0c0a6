"""The verb `verify`: checks every checksum under a path, for every kind of result that the project writes.

KINDS maps the file that marks a directory as a result to the function that checks the directory.
"""

from pathlib import Path

from hpc.data import manifest
from hpc.data.shards import BadSample, ShardReader, index_path
from hpc.errors import UserError
from hpc.run.progress import progress_bar
from hpc.train import checkpoint, weight_files


def verify_path(path: Path) -> tuple[int, list[str]]:
    """Checks the results in a directory, or in its subdirectories if it is not a result itself.

    Args:
        path: A run, shards, a code store, a checkpoint or an export.

    Returns:
        The number of files that were checked, and one line for each problem.

    Raises:
        UserError: The path does not exist or holds no result.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    folders = [path] if _kind_of(path) else sorted(p for p in path.rglob("*") if p.is_dir() and _kind_of(p))
    if not folders:
        raise UserError(f"{path} holds no shards, code store, checkpoint or export to verify.")
    checked, problems = 0, []
    for folder in folders:
        number, lines = KINDS[_kind_of(folder)](folder)
        checked += number
        problems += lines
    return checked, problems


def _kind_of(folder: Path) -> str | None:
    """Returns the name of the marker file in a directory, None if it holds no result."""
    return next((name for name in KINDS if (folder / name).exists()), None)


def _check_manifest(folder: Path) -> tuple[int, list[str]]:
    """Checks shards or a code store: each file against the manifest, each member of a tar against the shard's index."""
    content = manifest.read(folder)
    shards, problems = content["shards"], manifest.verify(folder, content.get("catalogs", []))
    with progress_bar(sum(shard["bytes"] for shard in shards), str(folder), unit="B") as progress:
        for shard in shards:
            problems += manifest.verify(folder, [shard])
            if shard["name"].endswith(".tar"):
                problems += manifest.verify(folder, [shard["index"]]) + _check_members(folder, shard)
            progress.update(shard["bytes"])
    return len(shards), problems


def _check_members(folder: Path, shard: dict) -> list[str]:
    """Reads every sample of a shard; the reader compares each member with the index. Returns the problems."""
    if not index_path(folder / shard["name"]).exists():
        return []
    reader, problems = ShardReader.local(folder, [shard["name"]]), []
    for ordinal in range(shard["count"]):
        try:
            reader.read(0, ordinal)
        except (BadSample, IndexError) as error:
            problems.append(f"{folder}: {error}")
    return problems


def _check_checkpoint(folder: Path) -> tuple[int, list[str]]:
    problems = checkpoint.verify(folder)
    number = sum(path.is_file() for path in folder.rglob("*"))
    return number, problems


def _check_export(folder: Path) -> tuple[int, list[str]]:
    """Compares exported weights with the digest that the finished stage recorded."""
    from lesiongen.tokenizers.export import changed_since

    number = len(weight_files.files(folder))
    try:
        recorded = changed_since(folder.parent)
    except (OSError, UserError) as error:
        return number, [f"{folder}: {error}"]
    return number, [f"{folder}: these are not the weights that the stage recorded ({recorded})"] if recorded else []


KINDS = {
    manifest.NAME: _check_manifest,
    checkpoint.MANIFEST: _check_checkpoint,
    weight_files.ONE_FILE: _check_export,
    weight_files.INDEX: _check_export,
}
