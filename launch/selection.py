"""Which stages `run` and `submit` delete and make: the options --fresh, --from, --until and --yes."""

import argparse
import sys
from collections.abc import Collection

from hpc.errors import UserError
from launch import pipeline
from lesiongen.experiment import Experiment
from lesiongen.stages import stages
from lesiongen.stages.base import Stage, stage_dir_of


def fresh_and_todo(
    config: Experiment, options: argparse.Namespace, awaited: Collection[str] = ()
) -> tuple[tuple[str, ...], list[Stage]]:
    """Returns the stages to delete and those to make, by the options --fresh, --from and --until.

    Stages that were made from those of --fresh are deleted too: they would not fit the new results.

    Args:
        config: The run's config.
        options: The parsed options.
        awaited: Names of results of other runs that need not be finished yet.

    Raises:
        UserError: An option names no stage of this run, or a stage before --from is not done.
    """
    names = list(stages(config))
    for option, name in (("--from", options.first), ("--until", options.until)):
        if name and name not in names:
            raise UserError(f"{option} {name}: there is no such stage here. The stages are {', '.join(names)}.")
    first = names.index(options.first) if options.first else 0
    last = names.index(options.until) if options.until else len(names) - 1
    if first > last:
        raise UserError(f"--from {options.first} comes after --until {options.until}.")
    if missing := [status.stage.name for status in pipeline.stage_statuses(config)[:first] if status.state != "done"]:
        raise UserError(f"--from {options.first} needs {', '.join(missing)}, which is not done.")
    considered, others = tuple(names[first : last + 1]), stages_made_from(config, tuple(options.fresh))
    again = (*options.fresh, *(name for name in others if name in considered))
    return (*options.fresh, *others), pipeline.stages_to_do(config, again, considered, awaited)


def confirm_fresh(options: argparse.Namespace, fresh: tuple[str, ...]) -> None:
    """Asks before stages are deleted that the user has not named. Raises UserError if the user does not agree."""
    others = fresh[len(options.fresh) :]
    if not others or options.yes:
        return
    text = f"--fresh {' --fresh '.join(options.fresh)} also deletes what was made from it: {', '.join(others)}."
    if not (sys.stdin and sys.stdin.isatty()):
        raise UserError(f"{text} Add --yes to agree.")
    if input(f"{text} Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("Nothing was deleted.")


def stages_made_from(config: Experiment, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the stages that have begun with results of the stages `names`, upstream first. They do not fit new results."""
    affected = set(names)
    for stage in stages(config).values():
        if affected & set(stage.needs):
            affected.add(stage.name)
    begun = (stage.name for stage in stages(config).values() if stage_dir_of(config, stage).record is not None)
    return tuple(name for name in begun if name in affected and name not in names)
