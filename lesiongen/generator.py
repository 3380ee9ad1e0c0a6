"""A trained generator in Python: sample, encode, decode, and the likelihood of images.

    import lesiongen

    generator = lesiongen.load("runs/ham10000")
    samples = generator.sample("mel", n=4, guidance=2, seed=0)
    samples.pictures()[0].show()

A generator gives the images that `lesiongen sample` writes with the same settings, if the config has no gate. There is no gate
here: the samples have to pass one (`lesiongen sample CONFIG sample.gate={}`) before they are shared.

Shapes: N images, C channels, h × w codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hpc.dist import Topology
from hpc.errors import UserError
from lesiongen import experiment
from lesiongen.data import images
from lesiongen.data.images import to_float
from lesiongen.data.prepare import Preparation
from lesiongen.evaluation.reconstructions import decode
from lesiongen.experiment import Experiment, LevelSampling, SampleConfig
from lesiongen.priors.code_sampler import CodeSampler
from lesiongen.stages.base import load_decoder, load_priors
from lesiongen.stages.sample import draw_facts

Picture = str | Path | Image.Image
SETTINGS = (*(f.name for f in fields(LevelSampling)), "batch")  # of `sample` in the config, that sample() takes


@dataclass(frozen=True)
class Samples:
    """Sampled images.

    Attributes:
        images: uint8 [N, C, size, size].
        facts: What each image shows, as {"label": "mel", "sex": …}; "" for unknown.
        codes: Codes of each level, [N, h, w].
        bits: For each level the mean bits per token of each image, float32 [N].
    """

    images: torch.Tensor
    facts: list[dict[str, str]]
    codes: dict[str, np.ndarray]
    bits: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.images)

    def pictures(self) -> list[Image.Image]:
        """Returns the images as PIL images."""
        return [images.to_image(image) for image in self.images]


class Generator:
    """The models of a run. Made by lesiongen.load().

    Attributes:
        config: The run's config; `config.sample` has the settings that sample() uses unless it is given others.
        size: Side of the images, in pixels.
        labels: The labels that can be asked for.
        facts: The values of each fact that can be asked for, the label among them.
        about: What the tokenizer's export says of itself: training images, licences, held-out metrics.
    """

    def __init__(self, config: Experiment, device: torch.device):
        """Loads the models of a run. Raises UserError if one is not finished."""
        self.config, self.device = config, device
        self._net, self.about = load_decoder(config, device)
        self._priors = load_priors(config, device)
        self._prepare = Preparation(self.about)
        self.size: int = self.about["size"]
        code_sampler = self._code_sampler(config.sample)
        self.facts = {name: values for prior in code_sampler.facts.values() for name, values in prior.values.items()}
        self.labels = next((p.trained_labels() for p in code_sampler.facts.values() if "label" in p.values), [])

    @classmethod
    def of_run(cls, path: str | Path, device: str | None = None) -> "Generator":
        """Loads the models of a run; see lesiongen.load()."""
        return cls(experiment.load(str(path)), torch.device(device) if device else Topology().device)

    def _code_sampler(self, sampling: SampleConfig) -> CodeSampler:
        return CodeSampler.of(self._priors, {level: sampling.at(level) for level in self._priors}, self.device)

    def sample(
        self, label: str | None = None, n: int = 1, *, seed: int = 0, facts: dict[str, str] | None = None, **settings: object
    ) -> Samples:
        """Samples images.

        Args:
            label: Label of the images; None for about equally many of each label.
            n: Number of images.
            seed: Seed. Equal arguments give equal images, whatever else was sampled.
            facts: Other facts of the images, such as {"sex": "female"}. Facts that are left out are drawn as they occur in
                the training images.
            **settings: Settings of `sample` in the config: guidance, guidance_schedule, temperature, top_k, top_p, batch.

        Raises:
            UserError: The priors do not know the label or a fact, or a setting is wrong.
        """
        wanted = {"number": n, "seed": seed, "labels": (label,) if label else (), "facts": facts or {}}
        for name in settings:
            if name not in SETTINGS:
                raise UserError(f"There is no setting '{name}' of sampling; there are {', '.join(SETTINGS)}.")
        # What is asked for here wins over what the config says for one level.
        given = {name: None for name in settings if name != "batch"}
        levels = {level: replace(of_level, **given) for level, of_level in self.config.sample.levels.items()}
        try:
            sampling = replace(self.config.sample, **wanted, **settings, levels=levels)
        except ValueError as error:
            raise UserError(f"{error}.") from None
        code_sampler = self._code_sampler(sampling)
        drawn = draw_facts(sampling, list(code_sampler.facts.values()))
        batches = [range(first, min(first + sampling.batch, n)) for first in range(0, n, sampling.batch)]
        parts = [code_sampler.sample([drawn[i] for i in batch], batch) for batch in batches]
        labels = [[drawn[i]["label"] for i in batch] for batch in batches]
        decoded = [decode(self._net, part.codes, names, n) for part, names in zip(parts, labels, strict=True)]
        codes = {level: np.concatenate([part.codes[level] for part in parts]) for level in self._priors}
        bits = {level: np.concatenate([part.bits[level] for part in parts]) for level in self._priors}
        return Samples(torch.cat(decoded), drawn, codes, bits)

    def prepare(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Resizes and crops image files or PIL images as the training images were. Returns uint8 [N, C, size, size].

        Raises:
            UserError: An image cannot be used.
        """
        prepared = []
        for number, picture in enumerate(pictures):
            try:
                prepared.append(self._prepare(picture))
            except (OSError, images.BadImage) as error:
                name = f"image {number}" if isinstance(picture, Image.Image) else picture
                raise UserError(f"{name} cannot be used: {error}.") from None
        if not prepared:
            raise UserError("There is no image.")
        return torch.stack(prepared)

    @torch.no_grad()
    def encode(self, pictures: Sequence[Picture] | torch.Tensor) -> dict[str, np.ndarray]:
        """Encodes images to codes of each level, int64 [N, h, w], coarse to fine.

        Args:
            pictures: Image files, PIL images, or a tensor as prepare() returns it.
        """
        prepared = pictures if isinstance(pictures, torch.Tensor) else self.prepare(pictures)
        parts = [self._net.encode(to_float(part.to(self.device))) for part in prepared.split(self.config.encode.batch)]
        return {level: torch.cat([part[level] for part in parts]).cpu().numpy() for level in self.config.levels}

    def decode(self, codes: dict[str, np.ndarray], labels: Sequence[str] | None = None) -> torch.Tensor:
        """Decodes codes of each level, [N, h, w], to images, uint8 [N, C, size, size].

        Args:
            codes: The codes, as encode() returns them or samples have them.
            labels: The label of each image, "" for none, which a polished decoder uses; None if no label is known. The images
                of samples are decoded with `[facts["label"] for facts in samples.facts]`.

        Raises:
            UserError: There is not one label for each image, or the decoder does not know a label.
        """
        number, asked = len(next(iter(codes.values()))), labels or []
        if labels is not None and (isinstance(labels, str) or len(labels) != number):
            raise UserError(f"labels must be a list with a label for each of the {number} images.")
        known = self.about.get("classes", asked)
        if unknown := [label for label in asked if label and label not in known]:
            raise UserError(f"'{unknown[0]}' is not a label that the decoder knows; choose among {', '.join(known) or 'none'}.")
        return decode(self._net, codes, labels, self.config.encode.batch)

    def log_likelihood(self, codes: dict[str, np.ndarray], facts: Sequence[dict[str, str]] | None = None) -> np.ndarray:
        """Returns the natural logarithm of the probability of codes under the priors, the sum over all levels, float64 [N].

        It is about codes, not about pixels: the values of different tokenizers cannot be compared.

        Args:
            codes: Codes of each level, [N, h, w], as encode() returns them.
            facts: What each image shows, such as {"label": "mel"}; None for unknown.

        Raises:
            UserError: The priors do not know a value.
        """
        number = len(next(iter(codes.values())))
        indices = {name: np.array([self._index(name, f.get(name)) for f in facts or [{}] * number]) for name in self.facts}
        bits = self._code_sampler(SampleConfig()).bits(codes, indices)
        tokens = {level: prior.length for level, (prior, _) in self._priors.items()}
        return -np.log(2) * sum(bits[level].astype(np.float64) * tokens[level] for level in bits)

    def _index(self, name: str, value: str | None) -> int:
        """Returns the index of a fact's value; -1 for unknown. Raises UserError for a value that the priors do not know."""
        if value and value not in self.facts[name]:
            raise UserError(f"'{value}' is not a known value of {name}; choose among {', '.join(self.facts[name])}.")
        return self.facts[name].index(value) if value else -1
