"""The verb `withdraw`: removes the images of a patient or a lesion, and names what was made from them.

The images are removed from the shards. What holds them or their codes is deleted: the code store, caches of features, pictures
of real images, the report. Models and samples cannot forget images: they are named, so that their owner can train again, or
recall them.
"""

import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc.data.storage import is_remote
from hpc.errors import UserError
from hpc.run import journal, rundir
from hpc.run.rundir import StageDir, read_stage_record
from lesiongen.evaluation.feature_cache import FOLDER
from lesiongen.experiment import Experiment
from lesiongen.ingest import withdraw as shards
from lesiongen.stages.base import packed_locations
from lesiongen.stages.publish import PUBLISHED

PICTURES = ("tokenizer", "polish", "prior-*", "report")  # stages whose images/ may show real images


@dataclass(frozen=True)
class Withdrawal:
    """What is to be removed.

    Attributes:
        images: For each directory of shards, the catalog rows of the images.
        holders: Folders that hold the images or their codes, and are deleted.
        made_from_them: Models and samples that were made from the images, each with what it is.
    """

    images: dict[Path, list[dict[str, str]]]
    holders: list[Path]
    made_from_them: dict[str, str]

    def lines(self, deleted: bool) -> list[str]:
        """Returns what the user reads."""
        lines = []
        for folder, found in self.images.items():
            splits = Counter(row["split"] for row in found)
            shares = ", ".join(f"{number} {split}" for split, number in splits.items())
            lines.append(f"{'removed' if deleted else 'found'} {len(found)} images ({shares}) in {folder}")
        lines += [f"{'deleted' if deleted else 'would be deleted'}: {path}" for path in self.holders]
        if self.made_from_them:
            lines.append("made from them, and not forgotten by removing them; train again (--fresh), or recall:")
            lines += [f"  {path}: {what}" for path, what in self.made_from_them.items()]
        lines.append(
            "Also remove the files from data.images, or the next packing adds them again; and MLflow may hold pictures."
        )
        return lines if deleted else [*lines, "Nothing was changed. To do it: --delete"]


def plan(config: Experiment, ids: Collection[str]) -> Withdrawal:
    """Finds the images and everything that was made from them, in the run and in the runs beside it.

    Args:
        config: The run's config.
        ids: Ids of images, lesions or patients.

    Raises:
        UserError: The shards are remote, or an id occurs nowhere.
    """
    if remote := [place for place in packed_locations(config) if is_remote(place)]:
        raise UserError(f"{remote[0]} is remote. Withdraw from the original of these shards, and copy them again.")
    folders = [Path(place) for place in packed_locations(config)]
    found = {}
    for folder in folders:
        if rows := shards.find(folder, ids):
            found[folder] = rows
    seen = {row.get(column) for rows in found.values() for row in rows for column in shards.ID_COLUMNS}
    if unknown := [name for name in ids if name not in seen]:
        where = folders[0] / "catalog.csv"
        raise UserError(f"There is no image, lesion or patient {unknown[0]!r} in the shards. Their ids are in {where}.")
    holders, made = [], {}
    for folder in found:
        digest = (read_stage_record(folder) or {}).get("digest")
        for path, record in descendants(config.directory.parent, digest):
            kind = path.name.partition("-")[0]
            if kind in ("codes", "report"):
                holders.append(path)
            else:
                made[str(path)] = " · ".join(
                    filter(None, (record.get("title"), "finished" if record.get("done") else "unfinished"))
                )
                holders += (
                    [path / "images"] if any(path.match(name) for name in PICTURES) and (path / "images").exists() else []
                )
        holders += [cache for cache in (folder / FOLDER,) if cache.exists()]
    for run in {Path(path).parent for path in made}:
        made |= {entry["folder"]: "published" for entry in journal.read(run / PUBLISHED, "folder")}
        holders += [run / FOLDER] if (run / FOLDER).exists() else []
    return Withdrawal(found, list(dict.fromkeys(holders)), made)


def descendants(runs: Path, digest: str | None) -> Iterator[tuple[Path, dict]]:
    """Yields the directory and record of each stage that was made, directly or not, from the result with a digest."""
    records = {path.parent: json.loads(path.read_text()) for path in sorted(runs.glob("*/*/stage.json"))}
    made_from, grown = {digest} - {None}, True
    while grown:
        new = {r["digest"] for r in records.values() if made_from & set((r.get("inputs") or {}).values()) and r.get("digest")}
        grown, made_from = bool(new - made_from), made_from | new
    for path, record in records.items():
        if made_from & set((record.get("inputs") or {}).values()):
            yield path, record


def withdraw(config: Experiment, ids: Collection[str], delete: bool) -> str:
    """Lists what a withdrawal means, and carries it out if `delete` is true.

    Returns:
        Lines for the user.

    Raises:
        Busy: Another process works in one of the directories.
        UserError: As for plan(), or no image would be left in a split.
    """
    planned = plan(config, ids)
    if delete:
        for folder, found in planned.images.items():
            with rundir.lock(folder, rundir.QUIET_WAIT_S):
                digest = shards.remove(folder, {row["image_id"] for row in found})
                if read_stage_record(folder):
                    StageDir(folder, {}, {}).change(digest)
        for path in planned.holders:
            with rundir.lock(path.parent, rundir.QUIET_WAIT_S):
                shutil.rmtree(path)
    return "\n".join(planned.lines(delete))
