"""tune: the guidance and temperature at which the samples of a trained run are closest to real images, level by level.

This is a command, not a stage of a run. Levels are tuned from the finest to the coarsest. While a level is tuned, the codes of
the coarser levels are those of real training images, and the finer levels are sampled with the settings that were found for
them. So the table also shows which prior is to blame: its first row has all real codes, and each level's rows sample one level
more. Two searches follow one another: guidance with its schedule at temperature 1, then the temperature at the best guidance.

The distance is the KID of the main ruler to images of the validation split; test images stay unseen. Training and validation
images have equal numbers of each class.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml

from hpc.config import digest
from hpc.data.codestore import CodeStore
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run import journal
from hpc.run.progress import progress_bar
from hpc.run.rundir import atomic_write
from lesiongen.data import images
from lesiongen.data.tables import write_csv
from lesiongen.evaluation import feature_cache
from lesiongen.evaluation.backbone import Backbone, load_backbone
from lesiongen.evaluation.classifier import small_recipe, trained_classifier
from lesiongen.evaluation.distances import kid, neighbour_scores
from lesiongen.evaluation.image_sets import RealImages
from lesiongen.evaluation.likeness import draw_repeated
from lesiongen.evaluation.reconstructions import Reconstructions, decode, decode_batches
from lesiongen.experiment import Experiment, LevelSampling, SampleConfig
from lesiongen.priors.level_sampler import LevelSampler
from lesiongen.stages.base import (
    check_codes,
    digest_of,
    load_decoder,
    load_priors,
    model_stages,
    packed,
    packed_locations,
    require,
)

GUIDANCE = ((1.0, "constant"), (1.5, "constant"), (2.0, "constant"), (3.0, "constant"), (2.0, "linear"), (3.0, "linear"))
TEMPERATURES = (0.95, 0.9, 0.85)  # besides 1
SHOWN = 8  # samples of each class in the picture


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        level: The coarsest sampled level; "" if all codes are real.
        guidance, guidance_schedule, temperature: Its settings.
        kid: KID × 1,000 to the validation images.
        precision, recall, density, coverage: As distances.compare() returns them.
    """

    level: str
    guidance: float | None
    guidance_schedule: str | None
    temperature: float | None
    kid: float
    precision: float
    recall: float
    density: float
    coverage: float

    def settings(self) -> LevelSampling:
        """Returns the settings of the level."""
        return LevelSampling(self.temperature, None, None, self.guidance, self.guidance_schedule)


def tune(config: Experiment, number: int, out: Path) -> dict[str, LevelSampling]:
    """Searches the settings of every level. A search that was killed goes on where it stopped.

    Args:
        config: The run's config. `sample` gives the seed, top_k and top_p.
        number: Images on each side.
        out: Directory of trials.jsonl, trials.csv, sampling.yaml (a section for the config) and samples.png.

    Returns:
        The best settings of each level, coarse to fine.

    Raises:
        UserError: A model is not trained, or no class has both training and validation images.
    """
    search = _Search(config, number, out)
    search.measure("", LevelSampling())
    for level in reversed(config.levels):
        trials = [search.measure(level, LevelSampling(1.0, None, None, *guided)) for guided in search.guidance(level)]
        best = min(trials, key=lambda trial: trial.kid).settings()
        trials += [search.measure(level, replace(best, temperature=value)) for value in TEMPERATURES]
        search.found[level] = min(trials, key=lambda trial: trial.kid).settings()
    search.write()
    return {level: search.found[level] for level in config.levels}


class _Search:
    """The images, models and trials of one search.

    Attributes:
        found: The best settings of the levels that have been tuned.
    """

    def __init__(self, config: Experiment, number: int, out: Path):
        self.config, self.out, self.found = config, out, {}
        self.device = Topology().device
        store, shards = CodeStore(require(config, "codes")), packed(config)
        check_codes(config, store)
        self.net, _ = load_decoder(config, self.device)
        self.priors = load_priors(config, self.device)
        train, val = RealImages(shards, ["train"]), RealImages(shards, ["val"])
        self.labels, chosen = equal_classes(train, val, number, config.seed)
        self.names = train.label_names(chosen[0])
        self.real = Reconstructions(store, self.net).codes(train, chosen[0])
        columns = store.all("train", 0, sorted({fact for _, about in self.priors.values() for fact in about["facts"]}))
        self.facts = {fact: column[chosen[0]] for fact, column in columns.items()}
        self.backbone = self._backbone(train).to(self.device)
        self.features = torch.from_numpy(self.backbone.over(val.batches(chosen[1]))).double()
        # Trials of other models, images or fixed settings do not count.
        fixed = {key: getattr(config.sample, key) for key in ("seed", "top_k", "top_p")}
        made_from = {name: digest_of(config, name) for name in ("shards", "codes", *model_stages(config))}
        self.key = digest({"number": number, "seed": config.seed, **fixed, **made_from, "ruler": self.backbone.digest})
        self.trials: list[Setting] = []

    def _backbone(self, train: RealImages) -> Backbone:
        config, shards = self.config.evaluate, packed(self.config)
        cache = feature_cache.cache_folder(packed_locations(self.config)[0], self.config.directory)

        def lesions() -> Backbone:
            recipe = small_recipe(shards.size, config.classifier_samples)
            how = len(shards.classes), self.config.seed, cache, shards.digest(), self.device
            return trained_classifier(recipe, train, *how).backbone

        return load_backbone(config.features, lesions)

    def guidance(self, level: str) -> tuple[tuple[float, str], ...]:
        """Returns the strengths and schedules to try; a prior without facts has nothing to be guided by."""
        _, about = self.priors[level]
        return GUIDANCE if about["facts"] else GUIDANCE[:1]

    def measure(self, level: str, settings: LevelSampling) -> Setting:
        """Measures one setting of a level, unless an earlier attempt has."""
        asked = {"level": level, "guidance": settings.guidance, "guidance_schedule": settings.guidance_schedule}
        asked |= {"temperature": settings.temperature}
        trials = self.out / "trials.jsonl"
        for entry in journal.read(trials, "key", "kid", *asked):
            if entry.pop("key") == self.key and asked.items() <= entry.items():
                trial = Setting(**entry)
                break
        else:
            codes = self._codes(level, settings)
            features = torch.from_numpy(self.backbone.over(decode_batches(self.net, codes, self.names))).double()
            scores = {name: float(values.mean()) for name, values in neighbour_scores(features, self.features).items()}
            trial = Setting(**asked, kid=kid(features, self.features), **scores)
            self.out.mkdir(parents=True, exist_ok=True)
            journal.append(trials, {"key": self.key} | asdict(trial))
        self.trials.append(trial)
        print(_row(trial), flush=True)
        return trial

    def _codes(self, level: str, settings: LevelSampling) -> dict[str, np.ndarray]:
        """Returns codes: real ones above a level, sampled ones of the level and of the finer levels."""
        by_level = self.found | ({level: settings} if level else {})
        sampling = replace(self.config.sample, levels=by_level)
        codes: dict[str, torch.Tensor] = {}
        for index, name in enumerate(self.config.levels):
            if name in by_level:
                codes[name] = self._sampled(sampling, name, index, list(codes.values()))
            else:
                codes[name] = torch.from_numpy(self.real[name]).to(self.device)
        return {name: grid.cpu().numpy() for name, grid in codes.items()}

    def _sampled(self, sampling: SampleConfig, level: str, index: int, upper: list[torch.Tensor]) -> torch.Tensor:
        prior, about = self.priors[level]
        sampler = LevelSampler.of(sampling.at(level), index, prior, self.device)
        names, number = list(about["facts"]), len(self.labels)
        facts = np.stack([self.facts[name] for name in names], 1) if names else np.zeros((number, 0), int)
        parts = []
        with progress_bar(number, f"sample {level}") as progress:
            for first in range(0, number, sampling.batch):
                part = slice(first, first + sampling.batch)
                indices = range(number)[part]
                parts.append(sampler(facts[part].tolist(), [grid[part] for grid in upper], indices))
                progress.update(len(indices))
        return torch.cat(parts)

    def write(self) -> None:
        """Writes the table, the section for the config, and a picture of samples, a row for each class."""
        write_csv(self.out / "trials.csv", asdict(self.trials[0]), (asdict(trial).values() for trial in self.trials))
        levels = {name: {k: v for k, v in asdict(self.found[name]).items() if v is not None} for name in self.config.levels}
        atomic_write(self.out / "sampling.yaml", yaml.safe_dump({"sample": {"levels": levels}}, sort_keys=False).encode())
        codes = self._codes(self.config.levels[0], self.found[self.config.levels[0]])
        shown = np.concatenate([np.flatnonzero(self.labels == label)[:SHOWN] for label in np.unique(self.labels)])
        decoded = decode(self.net, {level: grid[shown] for level, grid in codes.items()}, [self.names[i] for i in shown])
        atomic_write(self.out / "samples.png", images.encode_png(images.tile_images(decoded, SHOWN)))


def equal_classes(train: RealImages, val: RealImages, number: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draws images with equal numbers of each class that both sets have. Images of rare classes are drawn several times.

    Args:
        train, val: The sets.
        number: Images of each set, about.
        seed: Seed of the draws.

    Returns:
        The labels [N], and the indices [N] in each set.

    Raises:
        UserError: No class has images in both sets.
    """
    labels = [image_set.labels.numpy() for image_set in (train, val)]
    common = np.intersect1d(*labels)
    if not len(common):
        raise UserError("No class has both training and validation images, so there is nothing to compare samples with.")
    each, rng = max(1, number // len(common)), np.random.default_rng(seed)
    chosen = [
        np.concatenate([draw_repeated(np.flatnonzero(of_set == label), each, rng) for label in common]) for of_set in labels
    ]
    return np.repeat(common, each), chosen


def _row(trial: Setting) -> str:
    """Returns a trial as a line for the terminal."""
    if not trial.level:
        what = "all codes real"
    else:
        what = f"{trial.level}: guidance {trial.guidance:g} {trial.guidance_schedule}, temperature {trial.temperature:g}"
    return f"{what:58} KID {trial.kid:7.1f}  recall {trial.recall:.2f}  coverage {trial.coverage:.2f}"
