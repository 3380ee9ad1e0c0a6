"""A small classifier that measures the fidelity and diversity of samples.

The classifier is trained on the training split and applied to samples and to real held-out images. Only the difference between
the two matters, so the classifier need not be very accurate. It sees images at 64 px at most, so that its training takes only
minutes on two cores.

Shapes: images are uint8 [N, C, H, W] with 1 or 3 channels; labels are int64 [N], -1 for unlabelled images; B batch, K classes,
D features.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import functional as T
from tqdm import tqdm

from lesiongen.data.images import to_float

SIDE = 64  # pixels
BATCH = 64


class Classifier(nn.Module):
    """A convolutional network: x [B, C, H, W] in [-1, 1] → logits [B, K], features [B, 256].

    Strided convolutions reduce the image to 1/16 of its side; the features are the mean over what remains.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__()

        def layer(inputs: int, outputs: int, stride: int, kernel: int = 3) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

        self.body = nn.Sequential(
            *layer(channels, 32, 2, 5),
            *layer(32, 64, 2),
            *layer(64, 128, 2),
            *layer(128, 128, 1),
            *layer(128, 256, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(256, classes)

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(x_BCHW.to(memory_format=torch.channels_last))
        return self.head(features), features


def shrink(images_NCHW: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Resizes square images to `side` pixels with antialiasing. Images that are not larger are returned as they are."""
    if images_NCHW.shape[-1] <= side:
        return images_NCHW
    return T.resize(images_NCHW, [side, side], antialias=True)


def train_classifier(
    images_NCHW: torch.Tensor,
    labels_N: torch.Tensor,
    classes: int,
    samples: int,
    seed: int,
    progress: tqdm | None = None,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Trains a classifier on batches that are balanced over the classes. The same seed gives the same classifier.

    Args:
        images_NCHW: Training images.
        labels_N: Their labels. Unlabelled images are not used.
        classes: Number of classes, K.
        samples: Length of the training, in images.
        seed: Seed of the weights, the order and the augmentation.
        progress: A bar that counts images.
        device: Device to train on.

    Returns:
        The classifier, in evaluation mode.

    Raises:
        ValueError: No image has a label.
    """
    labelled = torch.nonzero(labels_N >= 0).flatten()
    if not len(labelled):
        raise ValueError("no training image has a label")
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Classifier(images_NCHW.shape[1], classes)
    net = net.to(device, memory_format=torch.channels_last).train()
    optimizer = _optimizer(net)
    steps = max(1, samples // BATCH)
    order = labelled[balanced_order(labels_N[labelled], steps * BATCH, rng)]
    for step, index in enumerate(order.split(BATCH)):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, steps)
        x = augment_batch(to_float(shrink(images_NCHW[index]).to(device)), rng)
        loss = F.cross_entropy(net(x)[0], labels_N[index].to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress.update(len(index))
    return net.eval()


def _optimizer(net: nn.Module) -> torch.optim.Optimizer:
    """Returns AdamW, which decays weights but not biases and norms."""
    decayed = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}])


def _learning_rate(step: int, steps: int) -> float:
    """Returns the learning rate: a linear warm-up over a tenth of the steps, times a cosine that falls to zero."""
    return 3e-3 * min(1, (step + 1) / (0.1 * steps + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def balanced_order(labels_N: torch.Tensor, number: int, rng: torch.Generator) -> torch.Tensor:
    """Draws a sequence of images in which the classes alternate. Within a class, every image comes once before any comes twice.

    Args:
        labels_N: Labels, all ≥ 0.
        number: Length of the sequence.
        rng: Source of the random order.

    Returns:
        Indices into labels_N, [number].
    """
    present = labels_N.unique().tolist()
    per_class = -(-number // len(present))
    columns = []
    for label in present:
        members = torch.nonzero(labels_N == label).flatten()
        rounds = [members[torch.randperm(len(members), generator=rng)] for _ in range(-(-per_class // len(members)))]
        columns.append(torch.cat(rounds)[:per_class])
    return torch.stack(columns, 1).flatten()[:number]


def augment_batch(x_BCHW: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Applies a random symmetry of the square, a small shift, and random brightness and contrast.

    Each eighth of the batch gets one of the 8 symmetries. The images are shuffled first, so that images of one class do not
    share a symmetry.

    Args:
        x_BCHW: Images in [-1, 1].
        rng: Source of the random numbers.

    Returns:
        Augmented images in the same order.
    """
    out = torch.empty_like(x_BCHW)
    shuffled = torch.randperm(len(x_BCHW), generator=rng)
    reach = max(1, x_BCHW.shape[-1] // 16)
    for symmetry, rows in enumerate(shuffled.tensor_split(8)):
        x = torch.rot90(x_BCHW[rows], symmetry % 4, (-2, -1))
        x = x.flip(-1) if symmetry >= 4 else x
        down, right = (torch.randint(2 * reach + 1, (2,), generator=rng)).tolist()
        x = F.pad(x, [reach] * 4, mode="reflect")
        out[rows] = x[..., down : down + x_BCHW.shape[-2], right : right + x_BCHW.shape[-1]]
    gain, lift = (0.2 * torch.rand(2, len(x_BCHW), 1, 1, 1, generator=rng) - 0.1).to(out.device)
    return out * (1 + gain) + lift


@torch.no_grad()
def predict(net: Classifier, images_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Classifies images.

    Args:
        net: The classifier, in evaluation mode.
        images_NCHW: Images.

    Returns:
        Predicted labels [N] and features [N, D], on the CPU.
    """
    device = next(net.parameters()).device
    outputs = [net(to_float(shrink(part).to(device))) for part in images_NCHW.split(256)]
    if not outputs:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, net.head.in_features)
    logits, features = (torch.cat(parts).cpu() for parts in zip(*outputs, strict=True))
    return logits.argmax(1), features


def confusion(true_N: torch.Tensor, predicted_N: torch.Tensor, classes: int) -> torch.Tensor:
    """Counts predictions by true and predicted class. Images whose true label is unknown are left out.

    Args:
        true_N: True labels.
        predicted_N: Predicted labels.
        classes: Number of classes, K.

    Returns:
        Counts, int64 [K, K]: a row for each true class, a column for each predicted class.
    """
    known = true_N >= 0
    return torch.bincount(true_N[known] * classes + predicted_N[known], minlength=classes**2).view(classes, classes)


def balanced_accuracy(true_N: torch.Tensor, predicted_N: torch.Tensor, classes: int) -> float:
    """Returns the mean recall of the classes that occur in `true_N`, or NaN if none occurs. Chance is 1 / classes.

    Args:
        true_N: True labels.
        predicted_N: Predicted labels.
        classes: Number of classes, K.
    """
    table = confusion(true_N, predicted_N, classes).double()
    present = table.sum(1) > 0
    return float((table.diag() / table.sum(1))[present].mean())


def within_class_diversity(features_ND: torch.Tensor, labels_N: torch.Tensor) -> float:
    """Measures the mean Euclidean distance between two images of a class, averaged over the classes.

    The number of distances grows with the square of the class: pass a subset of a large one.

    Args:
        features_ND: Features.
        labels_N: Labels.

    Returns:
        The mean over classes of two or more images; NaN if there are none.
    """
    groups = [features_ND[labels_N == label] for label in labels_N.unique().tolist() if label >= 0]
    means = [torch.pdist(group.float()).mean() for group in groups if len(group) > 1]
    return float(torch.stack(means).mean()) if means else math.nan


def first_of_each_class(labels_N: torch.Tensor, limit: int) -> torch.Tensor:
    """Returns the indices of the first `limit` images of each class, in order.

    The images of shards are in the order of a hash, so the first ones are a fair sample.
    """
    parts = [torch.nonzero(labels_N == label).flatten()[:limit] for label in labels_N.unique().tolist() if label >= 0]
    return torch.cat(parts).sort().values if parts else torch.empty(0, dtype=torch.int64)


def compare(
    net: Classifier,
    images: dict[str, torch.Tensor],
    labels: dict[str, torch.Tensor],
    classes: list[str],
    common: list[int],
    per_class: int,
) -> tuple[dict, dict]:
    """Measures fidelity and diversity of samples.

    Args:
        net: The classifier.
        images: Images by source: "samples", "real", and any others.
        labels: Labels of the images, by source.
        classes: Class names.
        common: Labels of the classes that every source has. Fidelity is measured on these only, so that all sources are asked
            the same.
        per_class: Images of a class, at most, whose features are compared.

    Returns:
        Fidelity: balanced accuracy by source, their "ratio" (samples / real), recalls, and counts.
        Diversity: spread by source and their "ratio", over the common classes with two samples and two real images.
        A ratio that cannot be computed is None, and "reason" says why.
    """
    predicted, features = {}, {}
    for source in images:
        predicted[source], features[source] = predict(net, images[source])
    return _fidelity(labels, predicted, classes, common), _diversity(labels, features, classes, common, per_class)


def _fidelity(
    labels: dict[str, torch.Tensor], predicted: dict[str, torch.Tensor], classes: list[str], common: list[int]
) -> dict:
    """Returns the first result of `compare`."""
    fidelity, tables = {}, {}
    for source in predicted:
        selected = torch.isin(labels[source], torch.tensor(common))
        true_N, predicted_N = labels[source][selected], predicted[source][selected]
        fidelity[source] = balanced_accuracy(true_N, predicted_N, len(classes))
        tables[source] = confusion(true_N, predicted_N, len(classes))
    fidelity["ratio"] = fidelity["samples"] / fidelity["real"] if fidelity["real"] else None
    fidelity["reason"] = None if fidelity["real"] else "the classifier recognises no real held-out image"
    fidelity["chance"] = 1 / len(classes)
    recall = {source: (table.diag() / table.sum(1)).tolist() for source, table in tables.items()}
    fidelity["recall"] = {classes[label]: {source: r[label] for source, r in recall.items()} for label in common}
    fidelity["confusion"] = tables["samples"].tolist()
    fidelity["number"] = {source: int(table.sum()) for source, table in tables.items()}
    return fidelity


def _diversity(
    labels: dict[str, torch.Tensor], features: dict[str, torch.Tensor], classes: list[str], common: list[int], per_class: int
) -> dict:
    """Returns the second result of `compare`."""
    sources = ("samples", "real")
    paired = [label for label in common if min((labels[source] == label).sum() for source in sources) > 1]
    spread = {}
    for source in sources:
        index = first_of_each_class(labels[source], per_class)
        index = index[torch.isin(labels[source][index], torch.tensor(paired))]
        spread[source] = within_class_diversity(features[source][index], labels[source][index])
    ratio = spread["samples"] / spread["real"] if paired and spread["real"] else None
    reason = None if ratio is not None else "no class has two samples and two held-out images"
    return spread | {"ratio": ratio, "classes": [classes[label] for label in paired], "reason": reason}
