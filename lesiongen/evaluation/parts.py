"""The parts of metrics.json that are measured on the images of a run. Each function takes a Subject and returns one part.

The evaluate stage calls the functions on rank 0. What they compute is described in likeness.py, fidelity.py, utility.py,
fairness.py and the folder privacy/.

Shapes: N images.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from hpc.run.progress import progress_bar
from lesiongen.data.images import to_float, to_unit
from lesiongen.data.similarity import psnr
from lesiongen.evaluation.classifier import Classifier, fit
from lesiongen.evaluation.distances import compare
from lesiongen.evaluation.fairness import FACTS, HeldOut, Slices, fairness, tones
from lesiongen.evaluation.fidelity import diversity
from lesiongen.evaluation.image_sets import BATCH, ArrayImages, ImageSet
from lesiongen.evaluation.likeness import likeness
from lesiongen.evaluation.privacy.audit_rows import choose_rows
from lesiongen.evaluation.privacy.candidates import Candidates
from lesiongen.evaluation.privacy.copies import Copies, measure
from lesiongen.evaluation.privacy.extraction import extraction
from lesiongen.evaluation.privacy.gate import gate_metrics
from lesiongen.evaluation.privacy.membership import membership
from lesiongen.evaluation.privacy.views import TrainingViews
from lesiongen.evaluation.reconstructions import decode_batches
from lesiongen.evaluation.skin_tone import skin_tone, tone_index
from lesiongen.evaluation.subject import Subject
from lesiongen.evaluation.training_sets import Pool, classical_views
from lesiongen.evaluation.utility import Fit, utility
from lesiongen.priors.code_sampler import CodeSampler


def likeness_part(subject: Subject) -> dict:
    """Returns "likeness": how far samples, reconstructions and real images are from one another."""
    about = {name: text for name, (_, text) in subject.rulers.items()}
    groups = {
        "train": subject.train.groups[subject.selection.train],
        "held_out": subject.held_out.groups[subject.selection.held_out],
        "samples": subject.samples.groups[subject.selection.samples],
    }
    labels = subject.selection.labels
    return likeness(subject.features, about, groups, labels, subject.alone, subject.classes, subject.seed)


def diversity_part(subject: Subject) -> dict:
    """Returns "diversity": how varied samples are within a class, by the features of the first ruler."""
    features = next(iter(subject.features.values()))
    sources = {"real": "held_out", "reconstructions": "reconstructed held_out", "samples": "samples"}
    by_source = {source: features[name] for source, name in sources.items()}
    return diversity(by_source, subject.selection.labels, subject.classes, subject.seed)


def utility_part(subject: Subject) -> dict:
    """Returns "utility": whether samples help to train a classifier."""
    config = subject.config.utility
    probes = config.method == "probe"
    train, samples, held_out = subject.train, subject.samples, subject.held_out
    tested = np.flatnonzero(held_out.in_split("test"))

    def items(image_set: ImageSet, indices: np.ndarray) -> np.ndarray:
        batches = image_set.batches(indices)
        return subject.backbone.over(batches) if probes else torch.cat(list(batches)).numpy()

    def views(indices: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        parts = []
        with progress_bar(len(indices), "augmented views") as progress:
            for first in range(0, len(indices), BATCH):
                part = slice(first, first + BATCH)
                drawn = classical_views(train.images(indices[part]), indices[part], numbers[part], subject.seed)
                parts.append(subject.backbone(drawn).numpy() if probes else drawn.numpy())
                progress.update(len(drawn))
        return np.concatenate(parts) if parts else items(train, indices)

    stored = {name: features.gather if probes else None for name, features in subject.stored.items()}
    real = Pool(train.labels.numpy(), train.groups, stored["train"] or partial(items, train))
    made = Pool(samples.labels.numpy(), samples.groups, partial(items, samples))
    of_test = stored["held_out"] or partial(items, held_out)
    test = Pool(held_out.labels.numpy()[tested], held_out.groups[tested], lambda indices: of_test(tested[indices]))
    classifier = {} if probes else {"classifier": partial(_fine_tuned, subject)}
    return utility(real, views, made, test, subject.classes, config, subject.seed, **classifier)


def _fine_tuned(subject: Subject, test_NCHW: np.ndarray, classes: int) -> Fit:
    """Returns a function that trains the judge's network on images and scores the test images."""
    used = subject.judge.recipe
    recipe = replace(used, images=min(used.images, subject.config.utility.fine_tuning_samples))

    def fit_and_score(images_NCHW: np.ndarray, labels_N: np.ndarray, seed: int) -> np.ndarray:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            classifier = Classifier(recipe, str(seed), classes, subject.device)
        images = ArrayImages(torch.from_numpy(images_NCHW), torch.from_numpy(labels_N).long())
        fit(classifier, images, torch.arange(len(images)), seed)
        batches = torch.from_numpy(test_NCHW).split(BATCH)
        return classifier.probabilities(batches, len(test_NCHW), "score test images").numpy()

    return fit_and_score


def copies_of(subject: Subject, views: TrainingViews, candidates: Candidates) -> Copies:
    """Compares the first attempts at all samples, before any gate, with every training view. Collective."""
    codes = candidates.first_attempts().codes
    decoded = decode_batches(subject.net, codes, None)  # as the views
    return measure(views, decoded, codes, subject.seed, subject.topology)


def audit_parts(subject: Subject, code_sampler: CodeSampler) -> dict:
    """Returns "membership" and "extraction": whether the priors reveal training images."""
    groups = subject.train.groups_by_shard() | subject.held_out.groups_by_shard()
    rows = choose_rows(subject.store, groups, subject.config.audited, subject.seed)
    priors = {level: sampler.prior for level, sampler in code_sampler.samplers.items()}
    coarsest = next(iter(priors.values()))
    return {
        "membership": membership(subject.store, priors, rows, groups, subject.device, subject.seed),
        "extraction": extraction(subject.store, coarsest, rows, subject.device, seed=subject.seed),
    }


def gate_part(subject: Subject, candidates: Candidates) -> dict | None:
    """Returns "gate": what the gate has rejected, and how far samples are from real images before and after it."""
    found = gate_metrics(candidates)
    if found is None:
        return None
    backbone, _ = next(iter(subject.rulers.values()))
    features = next(iter(subject.features.values()))
    rows = [subject.samples.rows[i] for i in subject.selection.samples]
    codes = candidates.read({int(row["index"]): 0 for row in rows}).codes
    before = backbone.over(decode_batches(subject.net, codes, [row["label"] for row in rows]))
    groups = subject.samples.groups[subject.selection.samples], subject.held_out.groups[subject.selection.held_out]
    for name, of_samples in (("before", before), ("after", features["samples"])):
        figures = compare(of_samples, features["held_out"], *groups, subject.seed)
        found[name] |= {"likeness": figures}
    return found


def fairness_part(subject: Subject, code_sampler: CodeSampler) -> dict:
    """Returns "fairness": whether the models treat images of every site, sex, age and skin tone alike."""
    watched, vocabularies = subject.watched, subject.shards.vocabularies
    names = [fact for fact in FACTS if vocabularies.get(fact)]
    columns = {name: subject.facts(name, [*names, "label"]) for name in ("train", "held_out")}
    slices = {}
    for fact in names:
        values = vocabularies[fact]
        of_samples = np.array([values.index(row[fact]) if row.get(fact) in values else -1 for row in subject.samples.rows])
        known = of_samples if (of_samples >= 0).any() else None
        slices[fact] = Slices(values, columns["train"][fact], columns["held_out"][fact][watched], known)
    of_samples = [tone_index(skin_tone(batch)) for batch in subject.samples.batches(np.arange(len(subject.samples)))]
    slices["skin_tone"] = tones(subject.tones("train"), subject.tones("held_out")[watched], np.concatenate(of_samples))
    real = subject.judged["real"]
    held_out = HeldOut(
        real.groups,
        _psnr(subject),
        real.labels,
        real.predicted if len(subject.trained_on) > 1 else None,
        _bits(subject, code_sampler, {fact: values[watched] for fact, values in columns["held_out"].items()}),
    )
    return fairness(slices, held_out, subject.seed)


def _psnr(subject: Subject) -> np.ndarray:
    """Returns the PSNR of the reconstruction of each watched image, in dB, [N]."""
    pairs = zip(
        subject.held_out.batches(subject.watched),
        subject.reconstructions.batches(subject.held_out, subject.watched),
        strict=True,
    )
    with progress_bar(len(subject.watched), "PSNR") as progress:
        parts = []
        for real, reconstructed in pairs:
            parts.append(psnr(to_unit(to_float(reconstructed)), to_unit(to_float(real))).numpy())
            progress.update(len(real))
    return np.concatenate(parts)


def _bits(subject: Subject, code_sampler: CodeSampler, facts: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the bits of each watched image's codes under the priors and its own facts, all levels together, [N]."""
    tokens = {level: sampler.prior.length for level, sampler in code_sampler.samplers.items()}
    parts = []
    with progress_bar(len(subject.watched), "held-out bits") as progress:
        for first in range(0, len(subject.watched), BATCH):
            part = slice(first, first + BATCH)
            codes = subject.reconstructions.codes(subject.held_out, subject.watched[part])
            bits = code_sampler.bits(codes, {fact: values[part] for fact, values in facts.items()})
            parts.append(sum(bits[level] * tokens[level] for level in tokens))
            progress.update(len(parts[-1]))
    return np.concatenate(parts)
