"""What is evaluated: the images and models of one run, and the networks that judge them.

The evaluate stage makes a Subject on every rank. Networks and features are made when they are first needed.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from hpc import dist
from hpc.data.codestore import CodeStore
from hpc.dist import Topology
from hpc.run.progress import progress_bar
from lesiongen.data.efficientnet_lite import has_lite
from lesiongen.data.packed import Packed
from lesiongen.evaluation import feature_cache
from lesiongen.evaluation.backbone import Backbone, load_backbone
from lesiongen.evaluation.classifier import Classifier, Recipe, fine_tuning_recipe, small_recipe, trained_classifier
from lesiongen.evaluation.config import EvaluateConfig
from lesiongen.evaluation.feature_cache import Columns, Features, cached_columns
from lesiongen.evaluation.fidelity import Judged
from lesiongen.evaluation.image_sets import RealImages, SampleImages, refuse_shared
from lesiongen.evaluation.likeness import CLASS_FROM, Selection, select
from lesiongen.evaluation.reconstructions import Reconstructions
from lesiongen.evaluation.skin_tone import skin_tone, tone_index
from lesiongen.tokenizers.tokenizer import Tokenizer

WATCHED = 5_000  # held-out images, at most, that the classifier judges and whose reconstructions are measured one by one


def _columns(backbone: Backbone, images_BCHW: torch.Tensor) -> Columns:
    """Computes what is stored of each real image: features of the first ruler, and the skin tone in degrees."""
    return {"features": backbone(images_BCHW).to(torch.float16).numpy(), "tone": skin_tone(images_BCHW).astype(np.float32)}


class Subject:
    """The images and models of one run.

    Attributes:
        config: Settings of the evaluation.
        seed: Seed of everything random.
        topology: This process among the ranks.
        shards: The packed sets.
        store: The code store.
        net: The tokenizer.
        before_polish: The tokenizer with the decoder that it had before it was polished; None if it was not.
        train, held_out, samples: The images. The held-out images are those of val and test.
        reconstructions: Decodes the codes of real images.
        backbone: The network of the first ruler.
        stored: Its features of the real images and their skin tones, by "train" and "held_out".
    """

    def __init__(
        self,
        config: EvaluateConfig,
        seed: int,
        topology: Topology,
        shards: Packed,
        locations: Sequence[str | Path],
        store: CodeStore,
        net: Tokenizer,
        samples: Path,
        run: Path,
        before_polish: Tokenizer | None = None,
    ):
        """Opens the images and computes the features of the real ones, unless they are stored. Collective.

        Args:
            config: Settings of the evaluation.
            seed: Seed of everything random.
            topology: This process among the ranks.
            shards: The packed sets.
            locations: Directory or URL of each packed set.
            store: The code store.
            net: The tokenizer.
            samples: Directory of the samples.
            run: Directory of the run.
            before_polish: The tokenizer before its decoder was polished; None if it was not.

        Raises:
            UserError: A lesion is in two splits, or the backbone cannot be loaded.
        """
        self.config, self.seed, self.topology, self.device = config, seed, topology, topology.device
        self.shards, self.store, self.net, self.before_polish = shards, store, net, before_polish
        self.train = RealImages(shards, ["train"])
        self.held_out = RealImages(shards, [split for split in shards.splits if split != "train"])
        refuse_shared(self.train, self.held_out)
        self.samples = SampleImages(samples, shards.classes, shards.size, shards.channels)
        self.reconstructions = Reconstructions(store, net)
        self.classes = shards.classes
        self.trained_on = sorted(set(self.train.labels.tolist()) - {-1})
        self.cache = feature_cache.cache_folder(locations[0], run)
        if config.features.resolved() == "lesions":
            dist.run_on_leader(lambda: self.small and None)  # the other ranks load what rank 0 has trained
        self.backbone: Backbone = load_backbone(config.features, lambda: self.small.backbone).to(self.device)
        self.stored: dict[str, Features] = {
            name: cached_columns(
                *image_set.sources(locations, run),
                partial(_columns, self.backbone),
                f"{self.backbone.digest}-tone",
                topology,
                f"features of {image_set.name}",
            )
            for name, image_set in (("train", self.train), ("held_out", self.held_out))
        }

    @cached_property
    def small(self) -> Classifier:
        """The small classifier, trained on the training images."""
        return self._classifier(small_recipe(self.shards.size, self.config.classifier_samples))

    @cached_property
    def judge(self) -> Classifier:
        """The classifier that judges whether images show their class: the fine-tuned one, or the small one without weights."""
        if not has_lite(0) or self.config.features.resolved() == "lesions":
            return self.small
        return self._classifier(fine_tuning_recipe(self.config.features, self.shards.size, self.config.fine_tuning_samples))

    def _classifier(self, recipe: Recipe) -> Classifier:
        digest = self.shards.digest()
        return trained_classifier(recipe, self.train, len(self.classes), self.seed, self.cache, digest, self.device)

    @cached_property
    def selection(self) -> Selection:
        """The images of each set that the rulers compare."""
        return select(self.train, self.held_out, self.samples, self.seed)

    @cached_property
    def alone(self) -> list[int]:
        """Labels of the classes that have enough images to be compared by themselves."""
        counts = [self.held_out.labels.numpy(), self.selection.labels]
        return [c for c in range(len(self.classes)) if min((labels == c).sum() for labels in counts) > CLASS_FROM]

    @cached_property
    def rulers(self) -> dict[str, tuple[Backbone, str]]:
        """The networks whose features are compared, and what they are, in words."""
        found = {}
        kind = self.config.features.resolved()
        if kind != "lesions":
            name = "imagenet" if kind == "lite0" else self.backbone.name
            found[name] = self.backbone, f"{self.backbone.name}, images at {self.backbone.size} px"
        if self.trained_on or not found:
            trained = "trained on the classes of this run's training images" if self.trained_on else "with random weights"
            found["lesions"] = self.small.backbone, f"a small network, {trained}, images at {self.small.recipe.size} px"
        return found

    @cached_property
    def features(self) -> dict[str, dict[str, np.ndarray]]:
        """For each ruler the features of the selected images of each set, and of their reconstructions, [N, D]."""
        sets = {"train": (self.train, self.selection.train), "held_out": (self.held_out, self.selection.held_out)}
        found: dict[str, dict[str, np.ndarray]] = {}
        for ruler, (backbone, _) in self.rulers.items():
            stored = backbone is self.backbone
            batches = {"samples": self.samples.batches(self.selection.samples)}
            for name, (image_set, indices) in sets.items():
                batches[f"reconstructed {name}"] = self.reconstructions.batches(image_set, indices)
                if not stored:
                    batches[name] = image_set.batches(indices)
            found[ruler] = {name: self.stored[name].gather(indices) for name, (_, indices) in sets.items() if stored}
            with progress_bar(len(batches) * len(self.selection.samples), f"ruler {ruler}") as progress:
                for name, of_set in batches.items():
                    found[ruler][name] = backbone.over(of_set, progress)
        return found

    @cached_property
    def watched(self) -> np.ndarray:
        """Indices of the held-out images that are judged one by one, at most WATCHED, drawn by the seed."""
        return np.sort(np.random.default_rng(self.seed).permutation(len(self.held_out))[:WATCHED])

    @cached_property
    def judged(self) -> dict[str, Judged]:
        """The judge's view of the watched held-out images ("real"), their "reconstructions", and the "samples".

        If the decoder was polished, also of the reconstructions "before_polish", and of those decoded "without_label".
        """
        watched, everything = self.watched, np.arange(len(self.samples))
        batches = {
            "real": (self.held_out, watched, self.held_out.batches(watched)),
            "reconstructions": (self.held_out, watched, self.reconstructions.batches(self.held_out, watched)),
            "samples": (self.samples, everything, self.samples.batches(everything)),
        }
        if self.before_polish is not None:
            unpolished = Reconstructions(self.store, self.before_polish).batches(self.held_out, watched)
            batches["before_polish"] = self.held_out, watched, unpolished
            without_label = self.reconstructions.batches(self.held_out, watched, with_labels=False)
            batches["without_label"] = self.held_out, watched, without_label
        found = {}
        for source, (image_set, indices, of_source) in batches.items():
            probabilities = self.judge.probabilities(of_source, len(indices), f"judge {source}").numpy()
            found[source] = Judged(image_set.labels.numpy()[indices], probabilities, image_set.groups[indices])
        return found

    def tones(self, name: str) -> np.ndarray:
        """Returns the skin tone of each image of "train" or "held_out", as skin_tone.tone_index() gives it, [N]."""
        features = self.stored[name]
        angles = [features.column(index, "tone") for index in range(len(features.paths))]
        return tone_index(np.concatenate(angles))

    def facts(self, name: str, split_facts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns facts of each image of "train" or "held_out", as indices of their values; -1 for unknown, int16 [N]."""
        splits = [split.split for split in {"train": self.train, "held_out": self.held_out}[name].splits]
        parts = [self.store.all(split, 0, list(split_facts)) for split in splits]
        return {fact: np.concatenate([part[fact] for part in parts]) for fact in split_facts}
