"""The picture that the training of a prior draws at each evaluation, with the label of each row.

What it can show depends on the priors of the other levels:
    samples      every level has a prior: whole images are sampled, coarse to fine, and decoded
    completions  the prior of a coarser level is missing: held-out images' coarse codes, with the finer codes sampled
    code-map     the prior of a finer level is missing, so nothing can be decoded: the codes of this level, a shade for each
"""

from itertools import takewhile

import numpy as np
import torch

from hpc import dist
from hpc.data.codestore import CodeStore
from hpc.data.order import contiguous_share
from lesiongen.data import facts, images
from lesiongen.data.facts import PriorFacts
from lesiongen.data.sheets import TILE, sheet
from lesiongen.evaluation.figures import code_maps
from lesiongen.evaluation.reconstructions import decode
from lesiongen.experiment import Experiment, SampleConfig
from lesiongen.priors.code_sampler import CodeSampler
from lesiongen.priors.export import load_prior
from lesiongen.priors.prior import Prior
from lesiongen.stages.base import artefact, decoder_stage, digest_of, require
from lesiongen.tokenizers.export import load_tokenizer

IMAGES, PER_ROW = 32, 8  # images in the picture, and in a row


class PriorPicture:
    """Draws the picture of one level's prior. The task of the stage owns one.

    Attributes:
        levels: Names of all levels, coarse to fine.
        level: Name of the level whose prior is being trained.
    """

    def __init__(self, config: Experiment, store: CodeStore, level: str, device: torch.device):
        """Prepares the picture.

        Args:
            config: The run's config.
            store: The run's codes.
            level: Name of the level.
            device: The device that computes.
        """
        self.config, self.store, self.level, self.device = config, store, level, device
        self.levels = [entry["name"] for entry in store.levels]
        names = config.prior(level).facts
        self.about = {"facts": facts.vocabularies(store, names), "training_facts": facts.count_combinations(store, names)}

    def draw(self, net: Prior) -> dict[str, bytes]:
        """Draws the picture with the prior as it is now. Collective: every rank samples its share of the images.

        Returns:
            {what the picture shows: PNG} on every rank.
        """
        finished = dist.run_on_leader(self._finished)
        priors = {
            name: (net, self.about) if name == self.level else load_prior(require(self.config, f"prior-{name}"), self.device)
            for name in self.levels
            if name == self.level or name in finished
        }
        coarser = self.levels[: self.levels.index(self.level)]
        given = coarser if any(name not in priors for name in coarser) else []
        sampled = list(takewhile(priors.__contains__, self.levels[len(given) :]))
        shown, codes = self._held_out(given) if given else (self._drawn([priors[name][1] for name in sampled]), {})

        # Sample this rank's share. With more ranks than images, some ranks have none.
        settings = SampleConfig(seed=self.config.seed)
        sampler = CodeSampler.of({name: priors[name] for name in sampled}, dict.fromkeys(sampled, settings), self.device)
        mine = contiguous_share(len(shown), dist.rank(), dist.world_size())
        part = None
        if len(mine):
            start = {name: codes[name][mine.start : mine.stop] for name in given}
            part = start | sampler.sample([shown[i] for i in mine], mine, given=start).codes
        parts = [part for part in dist.gather(part) if part is not None]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return dist.run_on_leader(self._picture, whole, [fact.get("label", "") for fact in shown], bool(given)) or {}

    def _finished(self) -> list[str]:
        """Returns the other levels whose priors are trained."""
        return [name for name in self.levels if name != self.level and digest_of(self.config, f"prior-{name}") is not None]

    def _drawn(self, abouts: list[dict]) -> list[dict[str, str]]:
        """Returns the facts of new images: equally many of each label, the other facts as those of training images."""
        priors = [PriorFacts(about["facts"], about["training_facts"]) for about in abouts]
        labels = next((prior.trained_labels() for prior in priors if "label" in prior.values), [])[:IMAGES]
        labels = labels or [""] * (IMAGES // PER_ROW)  # a label for each row
        shown = [{"label": label} for label in labels for _ in range(max(1, min(PER_ROW, IMAGES // len(labels))))]
        for i, sample in enumerate(shown):
            for prior in priors:
                sample |= prior.complete(sample, (i + 0.5) / len(shown))
        return shown

    def _held_out(self, given: list[str]) -> tuple[list[dict[str, str]], dict[str, np.ndarray]]:
        """Returns the facts of held-out images, label after label, and their codes [B, h, w] of the levels `given`."""
        rows = [(0, entry["shard"], i) for entry in self.store.shards("val") for i in range(entry["count"])]
        names = [name for name, values in self.store.manifest["vocabularies"].items() if values]
        values = {name: self.store.manifest["vocabularies"][name] for name in names}
        columns = self.store.gather_rows("val", rows, [*names, *(f"codes.{name}" for name in given)])
        label = columns["label"] if "label" in columns else np.zeros(len(rows), int)
        present = sorted(set(label.tolist()))
        in_a_row = max(1, min(PER_ROW, IMAGES // len(present)))
        chosen = np.concatenate([np.flatnonzero(label == value)[:in_a_row] for value in present])[:IMAGES]
        shown = [
            {name: values[name][columns[name][i]] if columns[name][i] >= 0 else "" for name in names} for i in chosen.tolist()
        ]
        return shown, {name: columns[f"codes.{name}"][chosen] for name in given}

    def _picture(self, codes: dict[str, np.ndarray], labels: list[str], completed: bool) -> dict[str, bytes]:
        """Decodes the images, or draws the codes if a level is missing. Returns {what the picture shows: PNG}."""
        if len(codes) == len(self.levels):
            decoder = decoder_stage(self.config)
            decoder = decoder if digest_of(self.config, decoder) is not None else "tokenizer"
            net, _ = load_tokenizer(artefact(self.config, decoder), self.device)
            pictures, name = decode(net, codes, labels), "completions" if completed else "samples"
        else:
            name = "code-map"
            entries = self.store.levels[self.levels.index(self.level)]["K"]
            pictures = code_maps(torch.from_numpy(codes[self.level].astype(np.int64)), entries, TILE)
        rows: list[tuple[str, list]] = []
        for label, picture in zip(labels, map(images.to_image, pictures), strict=True):
            if not rows or rows[-1][0] != label or len(rows[-1][1]) == PER_ROW:
                rows.append((label, []))
            rows[-1][1].append(picture)
        return {name: sheet(rows)}
