"""verify: every checksum under a path, whatever kind of artefact it is."""

import json
from pathlib import Path

from hpc.data import manifest
from hpc.data.shards import BadSample, ShardReader, index_path
from hpc.errors import UserError
from hpc.run.progress import bar
from hpc.train import checkpoint


def walk(path: Path) -> tuple[int, list[str]]:
    """Files checked, and a line for each problem. Raises UserError where there is nothing to verify."""
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    roots = [path] if _kind(path) else sorted(p for p in path.rglob("*") if p.is_dir() and _kind(p))
    if not roots:
        raise UserError(f"{path} holds no shards, code store, checkpoint or export to verify.")
    checked, problems = 0, []
    for root in roots:
        number, found = KINDS[_kind(root)](root)
        checked += number
        problems += found
    return checked, problems


def _kind(path: Path) -> str | None:
    return next((name for name in KINDS if (path / name).exists()), None)


def _manifest(folder: Path) -> tuple[int, list[str]]:
    facts = manifest.read(folder)
    entries, problems = facts["shards"], manifest.verify(folder, facts.get("catalogs", []))
    with bar(sum(e["bytes"] for e in entries), str(folder), unit="B") as progress:
        for entry in entries:
            problems += manifest.verify(folder, [entry])
            if entry["name"].endswith(".tar"):
                problems += manifest.verify(folder, [entry["index"]]) + _members(folder, entry)
            progress.update(entry["bytes"])
    return len(entries), problems


def _members(folder: Path, entry: dict) -> list[str]:
    """Every member against the index."""
    if not index_path(folder / entry["name"]).exists():
        return []
    reader, problems = ShardReader.local(folder, [entry["name"]]), []
    for ordinal in range(entry["count"]):
        try:
            reader.read(0, ordinal)
        except (BadSample, IndexError) as error:
            problems.append(f"{folder}: {error}")
    return problems


def _checkpoint(folder: Path) -> tuple[int, list[str]]:
    return len(checkpoint.read(folder)["files"]), checkpoint.problems(folder)


def _export(folder: Path) -> tuple[int, list[str]]:
    from lesiongen.tokenizers.export import export_digest

    record = json.loads((folder.parent / "stage.json").read_text())
    if record["done"] and export_digest(folder) != record["digest"]:
        return 1, [f"{folder}: the weights are not those the stage recorded ({record['digest']})"]
    return 1, []


KINDS = {manifest.NAME: _manifest, checkpoint.MANIFEST: _checkpoint, "model.safetensors": _export}
