"""Fidelity and diversity: a classifier trained on real images looks at samples, held-out images and reconstructions."""

import torch

from hpc.run.progress import bar
from lesiongen.data.images import to_float, to_uint8
from lesiongen.evaluation import classifier
from lesiongen.evaluation.pictures import Real, Samples
from lesiongen.tokenizers.tokenizer import Tokenizer

PER_CLASS = 200  # held-out images of a class that are reconstructed, and whose features are compared


def fidelity_and_diversity(
    net: Tokenizer, train: Real, held_out: Real, samples: Samples, classes: list[str], length: int, batch: int, seed: int
) -> tuple[dict, dict]:
    """Figures of fidelity and of diversity, over the classes that samples, held-out and training images all have.

    Args:
        net: The tokenizer, whose reconstructions of held-out images are judged beside the samples.
        train: Training images; the classifier learns from them.
        held_out: Held-out images.
        samples: Generated images.
        classes: Class names in the order of their numbers.
        length: Training length of the classifier, in images.
        batch: Images that are reconstructed at once.
        seed: Seed of the classifier.

    Returns:
        Two dicts as `classifier.compare` makes them. Where nothing can be measured, each has "ratio" None and a "reason".
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
    with bar(length // classifier.BATCH * classifier.BATCH, "classifier") as progress:
        judge = classifier.train_classifier(train.images, train.labels, len(classes), length, seed, progress, device)
    some = classifier.first_of_each_class(held_out.labels, PER_CLASS)
    rebuilt = _reconstruct(net, held_out, some, batch)
    pictures = {"samples": samples.images, "real": held_out.images, "reconstructions": rebuilt}
    labels = {"samples": samples.labels, "real": held_out.labels, "reconstructions": held_out.labels[some]}
    return classifier.compare(judge, pictures, labels, classes, common, PER_CLASS)


@torch.no_grad()
def _reconstruct(net: Tokenizer, real: Real, indices: torch.Tensor, batch: int) -> torch.Tensor:
    """Thumbnails of what the tokenizer makes of some images. A classifier cannot recognise samples better than these."""
    device, out = next(net.parameters()).device, []
    with bar(len(indices), "reconstruct") as progress:
        for part in indices.split(batch):
            out.append(classifier.shrink(to_uint8(net(to_float(real.full(part).to(device)))[0]).cpu()))
            progress.update(len(part))
    return torch.cat(out)
