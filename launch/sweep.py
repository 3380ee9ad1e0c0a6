"""The verb `sweep`: runs every combination of some settings, and compares the results.

The config itself is the base run. Stages that no setting of the grid changes are made once, in the base run, and the runs of
the sweep name them as inputs. A sweep that is started again goes on with what is unfinished.
"""

import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from hpc import errors
from hpc.config import read_yaml
from hpc.errors import UserError
from hpc.run.metrics_log import read_held_out
from hpc.run.rundir import atomic_write
from launch import executors, pipeline, slurm
from launch.before_queue import check_before_queue
from launch.cluster import ClusterConfig
from lesiongen import experiment
from lesiongen.data.tables import write_csv
from lesiongen.evaluation import plots
from lesiongen.experiment import Experiment
from lesiongen.stages import stages
from lesiongen.stages.base import Stage

SHARED = ("shards", "tokenizer", "codes", "polish")  # the stages whose results another run can name in `inputs`
# What runs are ranked by, the first that all have: name of the column, and whether lower is better.
RANKED_BY = (("kid", True), ("bits_per_image", True), ("psnr", False))


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        values: The values of the grid's keys, as text.
        config: The run's config.
    """

    values: dict[str, str]
    config: Experiment


class Sweep:
    """A sweep: the base run and its trials.

    Attributes:
        base: The config that the sweep varies.
        shared: Names of the base run's stages that all trials use.
        trials: The runs, in the order of the grid.
        until: Name of the last stage of each trial.
    """

    def __init__(self, base: Experiment, shared: tuple[str, ...], trials: list[Trial], until: str):
        self.base, self.shared, self.trials, self.until = base, shared, trials, until

    @classmethod
    def of(
        cls, path: str, overrides: list[str], grid: list[str], until: str | None = None, on_gpu: bool | None = None
    ) -> "Sweep":
        """Plans a sweep.

        Args:
            path: The config file.
            overrides: Values to change in all runs, each as "section.key=value".
            grid: Values to combine, each as "section.key=value,value,…".
            until: Name of the last stage of each run; None for all stages.
            on_gpu: Whether the runs will have GPUs; None if the config or this machine decides.

        Raises:
            UserError: A key or value is wrong, or `until` is no stage.
        """
        base = experiment.load(path, overrides, on_gpu)
        axes = [_axis(text) for text in grid]
        keys = [key for key, _ in axes]
        combinations = [dict(zip(keys, values, strict=True)) for values in itertools.product(*(found for _, found in axes))]
        changes = [[*overrides, *(f"{key}={value}" for key, value in values.items())] for values in combinations]
        shared = _shared(base, [experiment.load(path, changed, on_gpu) for changed in changes])
        place = str(base.directory)
        common = {f"inputs.{name}": [place] if name == "shards" else place for name in shared}
        common |= {"mlflow.experiment": base.mlflow.experiment or base.name, "mlflow.parent": place}
        trials = []
        for values, changed in zip(combinations, changes, strict=True):
            own = common | {"name": f"{base.name}-{_slug(values)}"}
            own = [f"{key}={json.dumps(value)}" for key, value in own.items()]
            trials.append(Trial(values, experiment.load(path, [*changed, *own], on_gpu)))
        names = list(stages(trials[0].config))
        if until and until not in names:
            raise UserError(f"--until {until}: the runs have no such stage. Their stages are {', '.join(names)}.")
        return cls(base, shared, trials, until or names[-1])

    def described(self) -> list[str]:
        """Returns a line for what is shared, and one for each run."""
        lines = [f"{self.base.directory}: {', '.join(self.shared) or 'nothing'} for all runs"]
        for trial in self.trials:
            todo = ", ".join(self._names(trial))
            lines.append(f"{trial.config.directory}: {' '.join(f'{k}={v}' for k, v in trial.values.items())}: {todo}")
        return lines

    def run(self) -> int:
        """Runs everything that is unfinished on this machine, one run after another. A run that fails does not end the sweep.

        Returns:
            The exit code: that of the last run that failed, or 0.
        """
        if code := pipeline.run_stages(self.base, self._todo_of_base()):
            return code
        result = errors.DONE
        for number, trial in enumerate(self.trials, 1):
            print(f"run {number} of {len(self.trials)}: {trial.config.name}", flush=True)
            code = pipeline.run_stages(trial.config, pipeline.stages_to_do(trial.config, only=self._names(trial)))
            if code == errors.RESUMABLE:
                return code
            result = code or result
        return result

    def submit(self, cluster: ClusterConfig, parallel: int) -> int:
        """Submits everything that is unfinished as Slurm jobs.

        Args:
            cluster: The content of the cluster file.
            parallel: Number of runs whose jobs may be active at once. A further run waits until an earlier one has ended.

        Returns:
            The exit code.
        """
        before = self._todo_of_base()
        check_before_queue(self.base, before, cluster)
        if before and not slurm.active_jobs(self.base.directory, self.shared):
            pipeline.write_config(self.base)
            executors.Submission(self.base, cluster).stages(before)
        last: list[str] = []
        for trial in self.trials:
            awaited = executors.awaited_jobs(trial.config)
            todo = pipeline.stages_to_do(trial.config, only=self._names(trial), awaited=awaited)
            if not todo or slurm.active_jobs(trial.config.directory, self._names(trial)):
                continue
            check_before_queue(trial.config, todo, cluster)
            pipeline.write_config(trial.config)
            after = (last[-parallel],) if len(last) >= parallel else ()
            jobs = executors.Submission(trial.config, cluster).stages(todo, awaited, after=after)
            last.append(list(jobs.values())[-1])
            print(f"{trial.config.name}: jobs {', '.join(jobs.values())}", flush=True)
        return errors.DONE

    def compare(self) -> str:
        """Writes sweep.csv and sweep.png into the base run, and returns the table of the runs, the best first."""
        rows = [self._row(trial) for trial in self.trials]
        ranked_by, lower = next((ranked for ranked in RANKED_BY if all(ranked[0] in row for row in rows)), ("", True))
        if ranked_by:
            rows.sort(key=lambda row: row[ranked_by] if lower else -row[ranked_by])
        columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        write_csv(self.base.directory / "sweep.csv", columns, ([row.get(name, "") for name in columns] for row in rows))
        text = [[_text(row.get(name)) for name in columns] for row in rows]
        widths = [max(map(len, column)) for column in zip(columns, *text, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [columns, *text]]
        if ranked_by:
            atomic_write(self.base.directory / "sweep.png", _plot(rows, ranked_by))
            lines.append(f"best by {ranked_by}: {rows[0]['run']}; see {self.base.directory / 'sweep.png'}")
        return "\n".join([*lines, f"table: {self.base.directory / 'sweep.csv'}"])

    def _names(self, trial: Trial) -> tuple[str, ...]:
        """Returns the names of the stages that a trial makes itself."""
        names = list(stages(trial.config))
        return tuple(names[: names.index(self.until) + 1]) if self.until in names else tuple(names)

    def _todo_of_base(self) -> list[Stage]:
        return pipeline.stages_to_do(self.base, only=self.shared) if self.shared else []

    def _row(self, trial: Trial) -> dict[str, str | float]:
        """Returns the row of a trial in the table: its name, its values, its state, its figures."""
        config, names = trial.config, self._names(trial)
        statuses = {s.stage.name: s.state for s in pipeline.stage_statuses(config) if s.stage.name in names}
        unfinished = [f"{name} {state}" for name, state in statuses.items() if state != "done"]
        row: dict[str, str | float] = {"run": config.name, **trial.values, "state": unfinished[0] if unfinished else "done"}
        report = read_held_out(config.directory / "report")[1] if "report" in names else {}
        row |= {name: report[name] for name in ("kid", "recall", "recognised", "trained_on_samples") if name in report}
        priors = [f"prior-{level}" for level in config.levels]
        if "tokenizer" not in names and all(statuses.get(name) == "done" for name in priors):  # of the same codes
            row["bits_per_image"] = sum(_bits_per_image(config.directory / name) for name in priors)
        if "tokenizer" in names and (psnr := read_held_out(config.directory / "tokenizer")[1].get("psnr")):
            row["psnr"] = psnr
        return row


def _bits_per_image(folder: Path) -> float:
    """Returns the held-out bits of all codes of an image, from the export of a prior."""
    export = read_yaml(folder / "export" / "config.yaml")
    return export["held_out"]["bits_per_token"] * math.prod(export["shape"]["grid"])


def _axis(text: str) -> tuple[str, list[str]]:
    """Parses one --grid: returns its key and its values. Raises UserError if it has no key or fewer than two values."""
    key, _, values = text.partition("=")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if not key or len(found) < 2:
        raise UserError(f"--grid {text}: write a key and at least two values, as in priors.top.model.layers=4,8.")
    return key, found


def _slug(values: dict[str, str]) -> str:
    """Returns a name for a combination, such as "layers8-width256": the last words of the keys, with as many as they need."""
    words = 1
    while len({tuple(key.split(".")[-words:]) for key in values}) < len(values):
        words += 1
    parts = (f"{'-'.join(key.split('.')[-words:])}{value}" for key, value in values.items())
    return re.sub(r"[^\w.-]+", "_", "-".join(parts))


def _shared(base: Experiment, configs: list[Experiment]) -> tuple[str, ...]:
    """Returns the names of the base run's stages that are the same in all configs, with all stages that they need."""
    shared: list[str] = []
    for name, stage in stages(base).items():
        if name not in SHARED or any(need not in shared for need in stage.needs if need in stages(base)):
            continue
        if all(name in (own := stages(config)) and own[name].identity == stage.identity for config in configs):
            shared.append(name)
    return tuple(shared)


def _text(value: str | float | None) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def _plot(rows: list[dict], ranked_by: str) -> bytes:
    """Draws the figure that the runs are ranked by, the best run in another colour. Returns a PNG."""
    figure, [axis] = plots.new_figure(7, 1.2 + 0.3 * len(rows))
    values = [row[ranked_by] for row in rows]
    colours = [plots.HELD_OUT, *[plots.TRAIN] * (len(rows) - 1)]
    axis.scatter(values, range(len(rows)), c=colours, zorder=3)
    axis.set_yticks(range(len(rows)), [row["run"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(ranked_by.replace("_", " ") + (" (lower is better)" if dict(RANKED_BY)[ranked_by] else ""))
    spread = (max(values) - min(values)) or abs(values[0]) or 1.0
    axis.set_xlim(min(values) - 0.1 * spread, max(values) + 0.1 * spread)
    return plots.to_png(figure)
