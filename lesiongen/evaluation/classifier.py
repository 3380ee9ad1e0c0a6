"""A small classifier, trained on the training split, behind the figures of fidelity and diversity.

Pictures are uint8 [N, C, H, W] with 1 or 3 channels; the net looks at them at 64 px at most, so that it is trained in
minutes on two cores. It is a ruler, not a product: what counts is a figure of samples beside that of real held-out
pictures, both taken with the same ruler.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import functional as T

SIDE = 64
BATCH = 64


class Classifier(nn.Module):
    """Convolutions down to 1/16, mean over the rest: x [B, C, H, W] in [-1, 1] → logits [B, K], features [B, 256]."""

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
    """Square uint8 pictures at `side` px at most, antialiased."""
    if images_NCHW.shape[-1] <= side:
        return images_NCHW
    return T.resize(images_NCHW, [side, side], antialias=True)


def train_classifier(
    images_NCHW: torch.Tensor,
    labels_N: torch.Tensor,
    classes: int,
    samples: int,
    seed: int,
    progress=None,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Trains on `samples` draws, balanced over the classes that are there; the same seed gives the same net.

    labels: int64 [N], -1 for unlabelled pictures, which are left out. progress: a bar with update(), or None.
    Raises ValueError where no picture has a label.
    """
    labelled = torch.nonzero(labels_N >= 0).flatten()
    if not len(labelled):
        raise ValueError("no training picture has a label")
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Classifier(images_NCHW.shape[1], classes)
    net = net.to(device, memory_format=torch.channels_last).train()
    decayed = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}])
    steps = max(1, samples // BATCH)
    order = labelled[balanced_order(labels_N[labelled], steps * BATCH, rng)]
    for step, index in enumerate(order.split(BATCH)):
        for group in optimizer.param_groups:  # warm-up over a tenth, then down along a cosine
            group["lr"] = 3e-3 * min(1, (step + 1) / (0.1 * steps + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        x = augment_batch(to_float(shrink(images_NCHW[index]).to(device)), rng)
        loss = F.cross_entropy(net(x)[0], labels_N[index].to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress.update(len(index))
    return net.eval()


def balanced_order(labels_N: torch.Tensor, number: int, rng: torch.Generator) -> torch.Tensor:
    """Indices [number]: classes take turns, and each member of a class comes once before any comes twice."""
    present = labels_N.unique().tolist()
    turns = -(-number // len(present))
    columns = []
    for label in present:
        members = torch.nonzero(labels_N == label).flatten()
        rounds = [members[torch.randperm(len(members), generator=rng)] for _ in range(-(-turns // len(members)))]
        columns.append(torch.cat(rounds)[:turns])
    return torch.stack(columns, 1).flatten()[:number]


def to_float(images_NCHW: torch.Tensor) -> torch.Tensor:
    return images_NCHW.float() / 127.5 - 1


def augment_batch(x_BCHW: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Random symmetry of the square, small shift, brightness and contrast. CodeRows are shuffled first, then each eighth of
    the batch takes one symmetry: pictures of one class do not share it."""
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
    """Of uint8 pictures: predicted labels int64 [N] and features float [N, D], on the CPU."""
    device = next(net.parameters()).device
    found = [net(to_float(shrink(part).to(device))) for part in images_NCHW.split(256)]
    if not found:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, net.head.in_features)
    logits, features = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    return logits.argmax(1), features


def confusion(true_N: torch.Tensor, predicted_N: torch.Tensor, classes: int) -> torch.Tensor:
    """Counts int64 [classes, classes], rows true; pictures without a label (-1) are left out."""
    known = true_N >= 0
    return torch.bincount(true_N[known] * classes + predicted_N[known], minlength=classes**2).view(classes, classes)


def balanced_accuracy(true_N: torch.Tensor, predicted_N: torch.Tensor, classes: int) -> float:
    """Mean recall over the classes that occur in `true`; nan where none does. Chance is 1 / classes."""
    table = confusion(true_N, predicted_N, classes).double()
    present = table.sum(1) > 0
    return float((table.diag() / table.sum(1))[present].mean())


def within_class_diversity(features_ND: torch.Tensor, labels_N: torch.Tensor) -> float:
    """Mean Euclidean distance between two members of a class, averaged over classes with two or more; nan without any.
    Takes N²/2 distances per class: subsample large ones."""
    groups = [features_ND[labels_N == label] for label in labels_N.unique().tolist() if label >= 0]
    means = [torch.pdist(group.float()).mean() for group in groups if len(group) > 1]
    return float(torch.stack(means).mean()) if means else math.nan


def first_of_each_class(labels_N: torch.Tensor, limit: int) -> torch.Tensor:
    """Indices of the first `limit` pictures of each class; shards lie in hash order, so the first are a fair draw."""
    kept = [torch.nonzero(labels_N == label).flatten()[:limit] for label in labels_N.unique().tolist() if label >= 0]
    return torch.cat(kept).sort().values if kept else torch.empty(0, dtype=torch.int64)


def compare(
    net: Classifier,
    pictures: dict[str, torch.Tensor],
    labels: dict[str, torch.Tensor],
    classes: list[str],
    common: list[int],
    per_class: int,
) -> tuple[dict, dict]:
    """Figures of fidelity and of diversity, of pictures {"samples", "real", …: uint8 [N, C, H, W]}.

    Over the classes in `common`, so that all are asked the same; diversity over those with two members in samples and
    real pictures each, from the first `per_class` of each. Where none has, its ratio is None and "reason" says why.
    """
    fidelity, tables, features = {}, {}, {}
    for what, images in pictures.items():
        kept = torch.isin(labels[what], torch.tensor(common))
        predicted, features[what] = predict(net, images)
        fidelity[what] = balanced_accuracy(labels[what][kept], predicted[kept], len(classes))
        tables[what] = confusion(labels[what][kept], predicted[kept], len(classes))
    fidelity["ratio"] = fidelity["samples"] / fidelity["real"] if fidelity["real"] else None
    fidelity["reason"] = None if fidelity["real"] else "the classifier recognises no real held-out image"
    fidelity["chance"] = 1 / len(classes)
    recall = {what: (table.diag() / table.sum(1)).tolist() for what, table in tables.items()}
    fidelity["recall"] = {classes[c]: {what: r[c] for what, r in recall.items()} for c in common}
    fidelity["confusion"] = tables["samples"].tolist()
    fidelity["number"] = {what: int(table.sum()) for what, table in tables.items()}

    paired = [c for c in common if min((labels[what] == c).sum() for what in ("samples", "real")) > 1]
    spread = {}
    for what in ("samples", "real"):
        index = first_of_each_class(labels[what], per_class)
        index = index[torch.isin(labels[what][index], torch.tensor(paired))]
        spread[what] = within_class_diversity(features[what][index], labels[what][index])
    ratio = spread["samples"] / spread["real"] if paired and spread["real"] else None
    reason = None if ratio is not None else "no class has two samples and two held-out images"
    return fidelity, spread | {"ratio": ratio, "classes": [classes[c] for c in paired], "reason": reason}
