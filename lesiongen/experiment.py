"""One YAML = one experiment, all stages. Sections are dataclasses beside the code they configure; this joins them."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from hpc import config as hpc_config
from hpc.config import volatile
from hpc.errors import UserError
from hpc.train.loop import TrainConfig
from hpc.train.optim import OptimConfig
from lesiongen.data.augment import AugmentConfig
from lesiongen.data.balance import StreamConfig
from lesiongen.data.config import DataConfig
from lesiongen.data.facts import FACTS
from lesiongen.priors import GPTConfig, PriorModel
from lesiongen.tokenizers import TokenizerModel, VQVAE2Config
from lesiongen.tokenizers.losses import LossConfig


@dataclass(frozen=True)
class InputsConfig:
    """Artefacts of another run, by its directory or URL, in place of making them here."""

    shards: tuple[str, ...] = ()  # several packed sets are read as one
    tokenizer: str | None = None
    codes: str | None = None


def _tokenizer_training() -> TrainConfig:
    return TrainConfig(optim=OptimConfig(lr=4e-4, schedule="trapezoid", warmup=2_000))


def _prior_training() -> TrainConfig:
    return TrainConfig(optim=OptimConfig(lr=1e-3, weight_decay=0.1, schedule="cosine", warmup=10_000))


@dataclass(frozen=True)
class TokenizerConfig:
    model: TokenizerModel = field(default_factory=VQVAE2Config)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(brightness=0.1, contrast=0.1, saturation=0.1))
    stream: StreamConfig = field(default_factory=StreamConfig)
    train: TrainConfig = field(default_factory=_tokenizer_training)


@dataclass(frozen=True)
class EncodeConfig:
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    draws: int = 8  # of the training split; draw 0 is unaugmented
    batch: int = volatile(64)  # per rank

    def __post_init__(self):
        if self.draws < 1 or self.batch < 1:
            raise ValueError("draws and batch must be at least 1")


@dataclass(frozen=True)
class PriorConfig:
    model: PriorModel = field(default_factory=GPTConfig)
    facts: tuple[str, ...] = ("label",)  # what the prior is told of an image: label, site, sex, age_band
    resident: Literal["auto", "never"] = volatile("auto")  # whether the codes lie on the device; auto: where they fit
    stream: StreamConfig = field(default_factory=StreamConfig)
    train: TrainConfig = field(default_factory=_prior_training)

    def __post_init__(self):
        if unknown := [name for name in self.facts if name not in FACTS]:
            raise ValueError(f"facts: there is no '{unknown[0]}'; choose among {', '.join(FACTS)}")
        if len(set(self.facts)) < len(self.facts):
            raise ValueError("facts: each is named once")


@dataclass(frozen=True)
class LevelSampling:
    """What is another for one level than in `sample`; null = as there."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance: float | None = None
    guidance_schedule: Literal["constant", "linear", "cosine"] | None = None


@dataclass(frozen=True)
class SampleConfig:
    labels: tuple[str, ...] = ()  # empty = every class in turn
    facts: dict[str, str] = field(default_factory=dict)  # fixed for all, as {sex: female}; others as training images have them
    number: int = 64  # in all
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    guidance: float = 1.0  # 1 = none
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"  # linear and cosine rise from none over the tokens
    levels: dict[str, LevelSampling] = field(default_factory=dict)
    batch: int = 64  # fixed, so that images do not depend on the number of ranks
    cuda_graphs: bool = volatile(False)  # on a GPU: record a batch's kernels and play them for the others

    def __post_init__(self):
        if self.number < 1 or self.batch < 1 or self.top_k < 0 or self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError("number, batch ≥ 1; top_k ≥ 0; temperature > 0; top_p above 0 and at most 1")
        if "label" in self.facts:
            raise ValueError("facts: labels are given in sample.labels")
        for level in self.levels:
            self.at(level)

    def at(self, level: str) -> "SampleConfig":
        """The settings of one level."""
        own = vars(self.levels.get(level, LevelSampling()))
        return replace(self, levels={}, **{k: v for k, v in own.items() if v is not None})


@dataclass(frozen=True)
class EvaluateConfig:
    classifier_samples: int = 60_000  # training length of the classifier behind fidelity and diversity
    batch: int = 64

    def __post_init__(self):
        if self.classifier_samples < 1 or self.batch < 1:
            raise ValueError("classifier_samples and batch must be at least 1")


@dataclass(frozen=True)
class LocalConfig:
    ranks: int = volatile(1)  # processes on this machine
    join_seconds: float = volatile(300.0)  # for all ranks to find one another, here and on a cluster

    def __post_init__(self):
        if self.ranks < 1 or self.join_seconds <= 0:
            raise ValueError("ranks is at least 1 and join_seconds above 0")


@dataclass(frozen=True)
class Experiment:
    name: str
    runs: str = volatile("runs")  # run directories lie here
    seed: int = 0
    inputs: InputsConfig = field(default_factory=InputsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    priors: dict[str, PriorConfig] = field(default_factory=dict)  # by level; levels not named take the defaults
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    local: LocalConfig = volatile(default_factory=LocalConfig)

    def __post_init__(self):
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name '{self.name}' must be usable as a directory's name")
        if not (self.inputs.shards or self.inputs.codes or self.data.images):
            raise ValueError("say where the images are: data.images=FOLDER (and data.metadata=CSV), or inputs.shards=RUN")
        for level in self.priors:
            if level not in self.levels:
                raise ValueError(f"priors.{level}: this tokenizer has the levels {', '.join(self.levels)}")
        for level in self.sample.levels:
            if level not in self.levels:
                raise ValueError(f"sample.levels.{level}: this tokenizer has the levels {', '.join(self.levels)}")
        if not self.inputs.shards:
            self.tokenizer.model.grids(self.data.size)
        if self.inputs.codes and not self.inputs.tokenizer:
            raise ValueError("inputs.codes needs inputs.tokenizer, the one that made the codes")
        if self.inputs.tokenizer and not (self.inputs.shards or self.data.images):
            raise ValueError("inputs.tokenizer needs inputs.shards or data.images")
        trainings = {"tokenizer": self.tokenizer} | {f"priors.{level}": self.prior(level) for level in self.levels}
        for what, part in trainings.items():
            train = part.train
            try:
                train.engine.micro_batch(train.batch, self.local.ranks)
            except ValueError as error:
                raise ValueError(f"{what}.train: {error}") from None

    @property
    def directory(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def levels(self) -> tuple[str, ...]:
        """Coarse to fine: the order in which priors condition on one another."""
        return tuple(reversed(self.tokenizer.model.names))

    def prior(self, level: str) -> PriorConfig:
        return self.priors.get(level, PriorConfig())


def load(path: str, overrides: list[str] = ()) -> Experiment:
    """Reads a config with overrides. Paths in it are taken as they are, from the working directory."""
    data = hpc_config.override(hpc_config.read_yaml(Path(path)), list(overrides))
    data.setdefault("name", Path(path).stem)
    return make(data)


def make(data: dict) -> Experiment:
    """A checked experiment from plain data. Raises UserError that names the key."""
    return hpc_config.build(Experiment, data)


def check_ranks(train: TrainConfig, ranks: int, where: str) -> None:
    """Raises UserError where the batch does not divide among so many ranks; before anything is queued."""
    try:
        train.engine.micro_batch(train.batch, ranks)
    except ValueError as error:
        raise UserError(f"{where}: {error}, or change {where}.engine.accumulation.") from None
