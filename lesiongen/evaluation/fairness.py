"""Fairness: do the models treat images of every body site, sex, age and skin tone alike?

A slice is all images with one value of one fact. For each slice, fairness() counts the images and measures the tokenizer, the
classifier and the priors on the held-out images of the slice. Images whose value is unknown belong to no slice.

The evaluate stage calls fairness() on rank 0 with columns of the code store and figures of the single held-out images, a few
bytes for each image.

Shapes: N held-out images, T training images, S samples, V values of a fact, K classes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lesiongen.evaluation.intervals import Figure, balanced_accuracy, mean
from lesiongen.evaluation.skin_tone import TONES

SMALLEST = 20  # held-out images of a slice for which figures are given
FACTS = ("site", "sex", "age_band", "skin_tone")

_NOTE = (
    "Images whose value is unknown are left out. Slices with fewer than {smallest} held-out images have no figures. Recall is "
    "the mean over the classes that a slice has, so slices with other classes differ for this reason too."
)
_TONE_NOTE = (
    "Skin tone is the individual typology angle (ITA) of the skin around the lesion. Pixels of dermoscopy tell skin tone badly "
    "(arXiv:2602.10265): lighting and contact fluid move it. Compare the slices with care, and conclude nothing about a person."
)
_UNKNOWN_TONES = (
    "Of {number} held-out images, {unknown} have no skin tone, because the light is too coloured or no skin is seen."
)
_NO_TONES = "Grey images have no skin tone."


class Slices(NamedTuple):
    """A fact of each image, as an index into its values; -1 where it is unknown.

    Attributes:
        values: The values of the fact, V names.
        train_T: Of each training image.
        held_out_N: Of each held-out image.
        samples_S: Of each sample, or None if the samples do not carry the fact.
    """

    values: Sequence[str]
    train_T: np.ndarray
    held_out_N: np.ndarray
    samples_S: np.ndarray | None = None


class HeldOut(NamedTuple):
    """What is known of each held-out image. What was not measured is None.

    Attributes:
        groups_N: The lesion, integers or strings.
        psnr_N: PSNR of the reconstruction, in dB.
        labels_N: The class; -1 for unlabelled images.
        predicted_N: The class that the classifier predicts.
        bits_N: Bits of the image's codes under the priors, all levels together.
    """

    groups_N: np.ndarray
    psnr_N: np.ndarray | None = None
    labels_N: np.ndarray | None = None
    predicted_N: np.ndarray | None = None
    bits_N: np.ndarray | None = None


def fairness(facts: Mapping[str, Slices], held_out: HeldOut, seed: int) -> dict:
    """Compares the slices of the images.

    Args:
        facts: The slices by fact, of FACTS; a fact that no image has may be absent. The values of "skin_tone" are TONES of
            skin_tone.py.
        held_out: Figures of the held-out images.
        seed: Seed of the bootstraps over lesions.

    Returns:
        The part "fairness" of metrics.json: for each fact and value that any image has, the numbers of training and held-out
        images, the share among the samples whose value is known (None without any), the mean "psnr" and "bits", and the
        balanced "recall"; and a "note" that says how to read them.
    """
    slices = {}
    for fact in FACTS:
        if fact in facts and (found := _slices_of(facts[fact], held_out, seed)):
            slices[fact] = found
    return {"slices": slices, "note": " ".join(_notes(facts, slices))}


def tones(train_T: np.ndarray, held_out_N: np.ndarray, samples_S: np.ndarray | None) -> Slices:
    """Returns the slices by skin tone. The arrays are from skin_tone.tone_index()."""
    return Slices(TONES, train_T, held_out_N, samples_S)


def _notes(facts: Mapping[str, Slices], slices: dict) -> list[str]:
    """Returns the sentences of the note."""
    notes = [_NOTE.format(smallest=SMALLEST)]
    if "skin_tone" in slices:
        index_N = facts["skin_tone"].held_out_N
        notes += [_TONE_NOTE, _UNKNOWN_TONES.format(number=len(index_N), unknown=int((index_N < 0).sum()))]
    elif "skin_tone" in facts:
        notes.append(_NO_TONES)
    return notes


def _slices_of(fact: Slices, held_out: HeldOut, seed: int) -> dict[str, dict]:
    """Returns the slices of one fact that have training or held-out images."""
    train_V, held_out_V = _counts(fact.train_T, len(fact.values)), _counts(fact.held_out_N, len(fact.values))
    samples_V = None if fact.samples_S is None else _counts(fact.samples_S, len(fact.values))
    found = {}
    for index, value in enumerate(fact.values):
        if train_V[index] or held_out_V[index]:
            numbers = {"train": int(train_V[index]), "held_out": int(held_out_V[index])}
            has_share = samples_V is not None and samples_V.sum() > 0
            numbers["samples"] = float(samples_V[index] / samples_V.sum()) if has_share else None
            found[value] = numbers | _figures(held_out, np.flatnonzero(fact.held_out_N == index), seed)
    return found


def _counts(index: np.ndarray, values: int) -> np.ndarray:
    """Returns how often each value occurs, [V]."""
    return np.bincount(index[index >= 0], minlength=values)


def _figures(held_out: HeldOut, rows: np.ndarray, seed: int) -> dict[str, Figure | None]:
    """Returns the figures of the held-out images `rows`; None for what was not measured and for small slices."""
    if len(rows) < SMALLEST:
        return {"psnr": None, "recall": None, "bits": None}
    groups = held_out.groups_N[rows]
    psnr, bits = (None if v is None else mean(v[rows], groups, seed) for v in (held_out.psnr_N, held_out.bits_N))
    recall = None
    if held_out.labels_N is not None and held_out.predicted_N is not None:
        labels, predicted = held_out.labels_N[rows], held_out.predicted_N[rows]
        labelled = labels >= 0
        if labelled.sum() >= SMALLEST:
            recall = balanced_accuracy(labels[labelled], predicted[labelled], groups[labelled], seed)
    return {"psnr": psnr, "recall": recall, "bits": bits}
