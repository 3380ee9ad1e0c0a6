"""Fidelity and diversity of samples, measured by a classifier that is trained on real images.

The classifier is applied to samples, held-out images, and the tokenizer's reconstructions of held-out images. The tokenizer
decodes the samples too, so the reconstructions show how much of a loss is due to the tokenizer. The evaluate stage calls
`fidelity_and_diversity`.
"""

import torch

from hpc.run.progress import progress_bar
from lesiongen.data.images import to_float, to_uint8
from lesiongen.evaluation import classifier
from lesiongen.evaluation.image_sets import RealImages, SampleImages
from lesiongen.tokenizers.tokenizer import Tokenizer

PER_CLASS = 200  # images of a class, at most, that are reconstructed, and whose features are compared


def fidelity_and_diversity(
    net: Tokenizer,
    train: RealImages,
    held_out: RealImages,
    samples: SampleImages,
    classes: list[str],
    length: int,
    batch: int,
    seed: int,
) -> tuple[dict, dict]:
    """Measures fidelity and diversity over the classes that samples, held-out images and training images all have.

    Args:
        net: The tokenizer.
        train: Training images of the classifier.
        held_out: Held-out images.
        samples: Generated images.
        classes: Class names in the order of their labels.
        length: Training length of the classifier, in images.
        batch: Images that are reconstructed at once.
        seed: Seed of the classifier.

    Returns:
        Two dicts as `classifier.compare` returns them. If nothing can be measured, each has "ratio" None and a "reason".
    """
    common = sorted(set(samples.labels.tolist()) & set(held_out.labels.tolist()) & set(train.labels.tolist()) - {-1})
    reason = None
    if len(set(train.labels.tolist()) - {-1}) < 2:
        reason = "the training images have fewer than two classes, so there is nothing to tell apart"
    elif not common:
        reason = "no class has both samples and held-out images"
    if reason:
        return {"ratio": None, "reason": reason}, {"ratio": None, "reason": reason}
    device = next(net.parameters()).device
    with progress_bar(length // classifier.BATCH * classifier.BATCH, "classifier") as progress:
        trained = classifier.train_classifier(train.images, train.labels, len(classes), length, seed, progress, device)
    subset = classifier.first_of_each_class(held_out.labels, PER_CLASS)
    reconstructions = _reconstruct(net, held_out, subset, batch)
    images = {"samples": samples.images, "real": held_out.images, "reconstructions": reconstructions}
    labels = {"samples": samples.labels, "real": held_out.labels, "reconstructions": held_out.labels[subset]}
    return classifier.compare(trained, images, labels, classes, common, PER_CLASS)


@torch.no_grad()
def _reconstruct(net: Tokenizer, real: RealImages, indices: torch.Tensor, batch: int) -> torch.Tensor:
    """Returns thumbnails of the reconstructions of the images at `indices`."""
    device, out = next(net.parameters()).device, []
    with progress_bar(len(indices), "reconstruct") as progress:
        for part in indices.split(batch):
            out.append(classifier.shrink(to_uint8(net(to_float(real.full(part).to(device)))[0]).cpu()))
            progress.update(len(part))
    return torch.cat(out)
