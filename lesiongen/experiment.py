"""The config of an experiment. One YAML file configures all stages of one run.

Every section is a frozen dataclass, defined here or beside the code that it configures; `Experiment` joins the sections. Its
constructor makes all checks that need no data. `load` builds an Experiment from a YAML file and command-line overrides.

Fields declared `volatile` change only where, how fast or how long a stage runs. They are not part of a stage's identity, so a
finished stage stays valid when they change.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from hpc import config as hpc_config
from hpc.config import PathText, added, volatile
from hpc.errors import UserError
from hpc.train.hardware import HardwareConfig
from hpc.train.loop import TrainConfig
from hpc.train.optim import OptimConfig
from lesiongen import presets
from lesiongen.data.augment import AugmentConfig
from lesiongen.data.balance import StreamConfig
from lesiongen.data.config import DataConfig
from lesiongen.data.facts import FACTS
from lesiongen.evaluation.config import EvaluateConfig
from lesiongen.evaluation.privacy.gate import GateConfig
from lesiongen.priors import GPTConfig, PriorModel
from lesiongen.tokenizers import TokenizerModel, VQVAE2Config
from lesiongen.tokenizers.losses import LossConfig
from lesiongen.tokenizers.polish_loss import PolishLossConfig
from lesiongen.tokenizers.texture import TextureConfig


@dataclass(frozen=True)
class InputsConfig:
    """Results of other runs to use. This run then leaves out the stages that would make them."""

    shards: tuple[PathText, ...] = ()  # run directories, directories of shards, or URLs of shards; several are read as one set
    tokenizer: PathText | None = None  # directory of the run whose tokenizer to use
    codes: PathText | None = None  # directory of the run whose codes to use; needs the tokenizer that made them
    polish: PathText | None = None  # directory of the run whose polished decoder to use; needs the tokenizer that it polishes
    # Run or published generator with whose weights tokenizer and priors begin, as far as they fit; null = random weights.
    init_from: PathText | None = None


def _tokenizer_training() -> TrainConfig:
    return TrainConfig(optim=OptimConfig(lr=4e-4, schedule="trapezoid", warmup=2_000))


def _prior_training() -> TrainConfig:
    return TrainConfig(optim=OptimConfig(lr=1e-3, weight_decay=0.1, schedule="cosine", warmup=10_000))


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer stage."""

    model: TokenizerModel = field(default_factory=VQVAE2Config)  # architecture and codebooks; model.kind chooses the class
    loss: LossConfig = field(default_factory=LossConfig)  # weights of the terms of the reconstruction loss
    # Random views of the training images that the tokenizer is trained on.
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(brightness=0.1, contrast=0.1, saturation=0.1))
    stream: StreamConfig = field(default_factory=StreamConfig)  # how often each image, class and set is drawn
    train: TrainConfig = field(default_factory=_tokenizer_training)  # length, batch, optimizer, evaluations, checkpoints


@dataclass(frozen=True)
class EncodeConfig:
    """The encode stage, which turns images into codes."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)  # views that the priors learn; samples look like them
    # Times that each training image is encoded: once unaugmented, then as random views. Held-out images are encoded once.
    draws: int = 8
    batch: int = volatile(64)  # images that a rank encodes at once

    def __post_init__(self):
        if self.draws < 1 or self.batch < 1:
            raise ValueError("draws and batch must be at least 1")


@dataclass(frozen=True)
class PolishOptim(OptimConfig):
    """OptimConfig with other defaults."""

    lr: float = 5e-4
    schedule: Literal["constant", "cosine", "trapezoid", "piecewise"] = "trapezoid"
    warmup: int = 2_000


@dataclass(frozen=True)
class PolishTraining(TrainConfig):
    """TrainConfig with other defaults."""

    samples: int = volatile(200_000)
    optim: PolishOptim = field(default_factory=PolishOptim)


@dataclass(frozen=True)
class PolishAugment(AugmentConfig):
    """AugmentConfig with another default."""

    crop: float = 1.0  # below 1, crops are enlarged to the image's size, which blurs them; 1 = always the centre square


@dataclass(frozen=True)
class PolishConfig:
    """The polish stage: trains the decoder once more by itself, for sharp images with texture. Codes and priors stay valid."""

    texture: TextureConfig = field(default_factory=TextureConfig)  # the network that draws what the codes do not decide
    loss: PolishLossConfig = field(default_factory=PolishLossConfig)  # weights of the loss's terms
    augment: PolishAugment = field(default_factory=PolishAugment)  # views of the training images that the decoder learns
    code_noise: float = 0.3  # in training, up to this share of an image's codes is replaced by similar ones, as samples have
    stream: StreamConfig = field(default_factory=StreamConfig)  # how often each image, class and set is drawn
    train: PolishTraining = field(default_factory=PolishTraining)  # length, batch, optimizer, evaluations, checkpoints

    def __post_init__(self):
        if not 0 <= self.code_noise <= 1:
            raise ValueError(f"code_noise={self.code_noise} must be from 0 to 1")


@dataclass(frozen=True)
class PriorConfig:
    """The prior stage of one level."""

    model: PriorModel = field(default_factory=GPTConfig)  # architecture; model.kind chooses the class
    facts: tuple[str, ...] = ("label",)  # facts of an image that condition the prior, out of label, site, sex, age_band
    # auto = hold all codes in the device's memory if they take at most a quarter of a GPU's free memory, or on a CPU half of
    # this rank's share of the free memory; otherwise read them from files. never = always read them from files.
    resident: Literal["auto", "never"] = volatile("auto")
    stream: StreamConfig = field(default_factory=StreamConfig)  # how often each image, class and set is drawn
    train: TrainConfig = field(default_factory=_prior_training)  # length, batch, optimizer, evaluations, checkpoints

    def __post_init__(self):
        if unknown := [name for name in self.facts if name not in FACTS]:
            raise ValueError(f"facts name the unknown fact '{unknown[0]}'; choose among {', '.join(FACTS)}")
        if len(set(self.facts)) < len(self.facts):
            raise ValueError("facts name a fact twice")


@dataclass(frozen=True)
class LevelSampling:
    """Settings of `sample` that differ for one level; null = the value in `sample`."""

    temperature: float | None = None  # as sample.temperature
    top_k: int | None = None  # as sample.top_k
    top_p: float | None = None  # as sample.top_p
    guidance: float | None = None  # as sample.guidance
    guidance_schedule: Literal["constant", "linear", "cosine"] | None = None  # as sample.guidance_schedule


@dataclass(frozen=True)
class SampleConfig:
    """The sample stage, which generates images."""

    labels: tuple[str, ...] = ()  # labels of the samples, about equally many of each; empty = all classes
    # Facts of every sample, as in {sex: female}; "" = unknown. Facts that are not named here are drawn for each sample from the
    # training images, so they vary as in the data.
    facts: dict[str, str] = field(default_factory=dict)
    number: int = 64  # images to generate, in total
    seed: int = 0  # seed of the samples
    temperature: float = 1.0  # the logits are divided by it; below 1, likely codes become more likely
    top_k: int = 0  # draw each code from the k most likely ones; 0 = from all
    top_p: float = 1.0  # draw each code from the fewest codes whose probabilities sum to at least top_p; 1 = from all
    guidance: float = 1.0  # strength of classifier-free guidance; 1 = none, above 1 = samples follow their facts more closely
    # Guidance from a level's first code to its last. constant = always `guidance`; linear, cosine = rises from 1 to `guidance`.
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    levels: dict[str, LevelSampling] = field(default_factory=dict)  # {level: settings that differ}, as in {top: {top_k: 100}}
    batch: int = 64  # images that a rank generates at once, for any number of ranks, so that the ranks do not change the images
    # Reject samples that are too near to a training image or too unlikely, and draw replacements; null = keep all samples,
    # {} = the default rules.
    gate: GateConfig | None = added(None)
    cuda_graphs: bool = volatile(False)  # on a GPU, record the kernels of one batch and replay them for the other batches

    def __post_init__(self):
        if self.number < 1 or self.batch < 1 or self.top_k < 0 or self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "number and batch must be at least 1, top_k at least 0, temperature above 0, and top_p above 0 and at most 1"
            )
        if "label" in self.facts:
            raise ValueError("facts must not hold 'label'; set sample.labels instead")
        for level in self.levels:
            self.at(level)  # raises ValueError for a wrong setting of the level

    def at(self, level: str) -> "SampleConfig":
        """Returns the settings of one level: these settings, changed by those in `levels`."""
        changes = vars(self.levels.get(level, LevelSampling()))
        return replace(self, levels={}, **{k: v for k, v in changes.items() if v is not None})


@dataclass(frozen=True)
class LocalConfig:
    """How ranks are started on this machine."""

    ranks: int = volatile(1)  # processes to start on this machine for each stage that can use several
    device: Literal["auto", "cpu"] = volatile("auto")  # auto: the GPU where there is one; cpu: the CPU in any case
    join_seconds: float = volatile(300.0)  # seconds to wait until all ranks are connected, here and on a cluster
    hang_minutes: float = volatile(30.0)  # a stage has hung if it makes no progress for so long; trainings: health

    def __post_init__(self):
        if self.ranks < 1 or min(self.join_seconds, self.hang_minutes) <= 0:
            raise ValueError("ranks must be at least 1, and join_seconds and hang_minutes above 0")


@dataclass(frozen=True)
class MLflowConfig:
    """What MLflow shows of the run."""

    # The experiment that the run belongs to, such as the name of the data set; null = the run's name. MLflow compares the runs
    # of an experiment in one table.
    experiment: str | None = volatile(None)
    parent: PathText | None = volatile(None)  # directory of the run under which MLflow lists this run, such as that of a sweep


@dataclass(frozen=True)
class Experiment:
    """The whole config of a run: settings of the run, and a section for each stage."""

    name: str  # name of the run and of its directory; if the config has none, the name of the config file
    runs: PathText = volatile("runs")  # directory that holds the run directories
    seed: int = 0  # seed of everything random, except for the samples (see sample.seed)
    inputs: InputsConfig = field(default_factory=InputsConfig)  # results of other runs to use
    data: DataConfig = field(default_factory=DataConfig)  # images, packing and reading of the shards
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)  # the tokenizer and its training
    encode: EncodeConfig = field(default_factory=EncodeConfig)  # encoding of the images
    polish: PolishConfig | None = None  # training the decoder once more for sharper images; null = leave it out
    priors: dict[str, PriorConfig] = field(default_factory=dict)  # {level: its prior}; levels not named use the defaults
    sample: SampleConfig = field(default_factory=SampleConfig)  # generating images
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)  # measuring the samples
    mlflow: MLflowConfig = volatile(default_factory=MLflowConfig)  # what MLflow shows of the run
    local: LocalConfig = volatile(default_factory=LocalConfig)  # ranks on this machine
    hardware: HardwareConfig = volatile(default_factory=HardwareConfig)  # machines that `lesiongen plan` computes for

    def __post_init__(self):
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(
                f"name '{self.name}' cannot be a directory's name; it must not be empty, hold a '/' or begin with a '.'"
            )
        if not (self.inputs.shards or self.inputs.codes or self.data.images):
            raise ValueError("there are no images; set data.images=FOLDER (and data.metadata=CSV), or inputs.shards=RUN")
        # The tokenizer must have the levels that other sections name, and its strides must divide the image size.
        for section, by_level in (("priors", self.priors), ("sample.levels", self.sample.levels)):
            for level in by_level:
                if level not in self.levels:
                    raise ValueError(f"{section}.{level}: this tokenizer has the levels {', '.join(self.levels)}")
        if not self.inputs.shards:
            self.tokenizer.model.grids(self.data.size)  # raises ValueError
        # Codes need their tokenizer, and a tokenizer needs images.
        if self.inputs.codes and not self.inputs.tokenizer:
            raise ValueError("inputs.codes needs inputs.tokenizer: set it to the run whose tokenizer made the codes")
        if self.inputs.polish and not self.inputs.tokenizer:
            raise ValueError("inputs.polish needs inputs.tokenizer: set it to the run whose tokenizer was polished")
        if self.inputs.tokenizer and not (self.inputs.shards or self.data.images):
            raise ValueError("inputs.tokenizer needs images: set inputs.shards or data.images")
        # The batch of each training must divide among the ranks of this machine.
        for section, train in self.trainings.values():
            try:
                train.engine.micro_batch(train.batch, self.local.ranks)
            except ValueError as error:
                raise ValueError(f"{section}: {error}") from None

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.runs) / self.name

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the tokenizer's levels, coarse to fine. The prior of a level is conditioned on the levels before it."""
        return tuple(reversed(self.tokenizer.model.names))

    @property
    def trainings(self) -> dict[str, tuple[str, TrainConfig]]:
        """For each stage that trains, the key of its training in the config, and the training."""
        found = {"tokenizer": ("tokenizer.train", self.tokenizer.train)}
        if self.polish and not self.inputs.polish:
            found["polish"] = ("polish.train", self.polish.train)
        return found | {f"prior-{level}": (f"priors.{level}.train", self.prior(level).train) for level in self.levels}

    def prior(self, level: str) -> PriorConfig:
        """Returns the config of a level's prior."""
        return self.priors.get(level, PriorConfig())


def load(path: str, overrides: Sequence[str] = (), on_gpu: bool | None = None) -> Experiment:
    """Reads a config file. Relative paths in the config are relative to the working directory; ~ and $VARIABLE are replaced.

    Args:
        path: The YAML file, or the directory of a run. A run's directory may have been renamed or copied: its own name and
            place count, not those in its config.yaml.
        overrides: Values to change, each as "section.key=value".
        on_gpu: Whether the run will have GPUs, for `preset: auto`; None if the config or this machine decides.

    Raises:
        UserError: The file cannot be read, or a key or value is wrong.
    """
    file, folder = Path(path), Path(path).resolve()
    if file.is_dir():
        file = file / "config.yaml"
        if not file.exists():
            raise UserError(f"{path} is not a run directory: it has no config.yaml. Give runs/NAME, or the path of a config.")
        place = {"runs": str(folder.parent), "name": folder.name}
        overrides = [*(f"{key}={json.dumps(value)}" for key, value in place.items()), *overrides]
    data = hpc_config.apply_overrides(hpc_config.read_yaml(file), list(overrides))
    data.setdefault("name", file.stem)
    return make(presets.fill_in(data, on_gpu))


def make(data: dict) -> Experiment:
    """Builds an experiment from dicts and lists, as read from YAML.

    Raises:
        UserError: A key or value is wrong; the message names it.
    """
    return hpc_config.from_plain(Experiment, data)


def check_ranks(train: TrainConfig, ranks: int, section: str) -> None:
    """Checks that a training's batch divides among the ranks of its Slurm job, before anything is queued.

    Args:
        train: The training.
        ranks: Number of ranks of the job.
        section: Key of `train` in the config, for the message.

    Raises:
        UserError: The batch does not divide.
    """
    try:
        train.engine.micro_batch(train.batch, ranks)
    except ValueError as error:
        raise UserError(f"{section}: {error}, or change {section}.engine.accumulation.") from None
