"""The verb `withdraw`: removes the images of a patient or a lesion, and names what was made from them.

The images are removed from the shards. What holds them or their codes is deleted: the code store, caches of features, pictures
of real images, the report. Models and samples cannot forget images: they are named, so that their owner can train again, or
recall them.
"""

import shutil
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hpc.data.storage import is_remote
from hpc.errors import UserError
from hpc.run import journal, rundir
from hpc.run.rundir import StageDir, read_stage_record
from lesiongen import experiment
from lesiongen.evaluation.feature_cache import FEATURES_FOLDER
from lesiongen.experiment import Experiment
from lesiongen.ingest import withdraw as shards
from lesiongen.stages import stages
from lesiongen.stages.base import artefact, model_stages, packed_locations
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
    if unknown := [name for name in ids if not name or name not in seen]:
        where = folders[0] / "catalog.csv"
        raise UserError(f"There is no image, lesion or patient {unknown[0]!r} in the shards. Their ids are in {where}.")
    holders, made = [folder / FEATURES_FOLDER for folder in found], {}
    for path in results_made_from(list(found), config.directory.parent):
        if path.name in ("codes", "report"):
            holders.append(path)
            continue
        record = _record(path)
        made[str(path)] = " · ".join(filter(None, (record.get("title"), "finished" if record.get("done") else "unfinished")))
        holders += [path / "images"] if any(path.match(name) for name in PICTURES) else []
        holders.append(path.parent / FEATURES_FOLDER)
    for run in {Path(path).parent for path in made}:
        made |= {entry["folder"]: "published" for entry in journal.read(run / PUBLISHED, "folder")}
    return Withdrawal(found, [path for path in dict.fromkeys(holders) if path.exists()], made)


def results_made_from(folders: list[Path], runs: Path) -> list[Path]:
    """Returns the directory of each result that was made, directly or not, from shards in these folders.

    Goes by the directories that the runs' configs name, because shards to which images were appended have another digest than
    those that an older model was made from; and by digests, because runs may have been moved or copied.

    Args:
        folders: Directories of shards.
        runs: Directory of the runs to look through.
    """
    configs = [experiment.load(str(path.parent)) for path in sorted(runs.glob("*/config.yaml"))]
    affected, grown = {folder.resolve() for folder in folders}, True
    digests = {_record(folder).get("digest") for folder in folders}
    found: list[Path] = []
    while grown:
        grown = False
        for config in configs:
            for path, sources in _results(config).items():
                record = _record(path)
                inputs = {digest for digest in record.get("inputs", {}).values() if digest}
                if record and path not in affected and (affected & sources or digests & inputs):
                    affected.add(path)
                    digests.add(record["digest"])
                    found.append(path)
                    grown = True
            # A published folder holds copies of the models.
            if any(path.parent == config.directory.resolve() for path in affected):
                for entry in journal.read(config.directory / PUBLISHED, "folder"):
                    affected |= {Path(entry["folder"]).resolve() / name for name in model_stages(config)}
    return found


def _record(path: Path) -> dict:
    return read_stage_record(path) or {}


def _results(config: Experiment) -> dict[Path, set[Path]]:
    """Returns the directory of each result of a run, with the directories that it is made from."""
    found = {}
    for stage in stages(config).values():
        sources = {artefact(config, name).resolve() for name in stage.needs if name != "shards"}
        if "shards" in stage.needs:
            sources |= {Path(place).resolve() for place in packed_locations(config) if not is_remote(place)}
        if config.inputs.init_from:
            sources.add((Path(config.inputs.init_from) / stage.name).resolve())
        found[(config.directory / stage.name).resolve()] = sources
    # Samples with settings of their own lie in further directories of the run.
    models = {artefact(config, name).resolve() for name in model_stages(config)}
    others = {path.parent.resolve() for path in config.directory.glob("*/stage.json")} - found.keys()
    return found | dict.fromkeys(others, models)


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
        withdrawn = {folder: {row["image_id"] for row in found} for folder, found in planned.images.items()}
        for folder, names in withdrawn.items():
            shards.refuse_empty(folder, names)
        # The shards come last: until then, the same command finds everything again after a kill.
        for path in planned.holders:
            with rundir.lock(path.parent, rundir.QUIET_WAIT_S):
                shutil.rmtree(path)
        for folder, names in withdrawn.items():
            with rundir.lock(folder, rundir.QUIET_WAIT_S):
                digest = shards.remove(folder, names)
                if read_stage_record(folder):
                    StageDir(folder, {}, {}).change(digest)
    return "\n".join(planned.lines(delete))
