"""Classifiers of real images, which judge whether samples show their class.

There are two: EfficientNet-Lite0, fine-tuned on the training split, and a small network that is trained on the training split
from random weights. The features of the small network are also a ruler: unlike those of the first, they have learned from
lesions alone. Trained classifiers are kept beside the shards and used again.

Shapes: images are uint8 [N, C, H, W] with 1 or 3 channels; labels are int64 [N], -1 for unlabelled images; B batch, K classes,
D features.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hpc.config import digest
from hpc.run.progress import progress_bar
from lesiongen.data.efficientnet_lite import lite_network
from lesiongen.evaluation.backbone import Backbone, FeaturesConfig
from lesiongen.evaluation.feature_cache import read_arrays, write_arrays
from lesiongen.evaluation.image_sets import ImageSet

BATCH = 32
SMALL_SIDE = 64  # pixels; larger images are reduced, so that the training takes only minutes on two cores
FEATURES = 256  # of the small network


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained.

    Attributes:
        name: "small" or "fine-tuned".
        size: Side of the images, in pixels.
        mean, std: As FeaturesConfig.mean and std.
        rate: Learning rate.
        images: Length of the training, in images.
    """

    name: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rate: float
    images: int

    def network(self) -> nn.Module:
        """Returns the network before training: images → features."""
        return small_network() if self.name == "small" else lite_network(0)


def small_recipe(size: int, images: int) -> Recipe:
    """Returns the recipe of the small network, for real images of `size` px."""
    return Recipe("small", min(size, SMALL_SIDE), (127.5,), (127.5,), 3e-3, images)


def fine_tuning_recipe(config: FeaturesConfig, size: int, images: int) -> Recipe:
    """Returns the recipe that fine-tunes EfficientNet-Lite0.

    Images of 64 px or less are enlarged to 96 px only, which nearly halves the time of training.

    Args:
        config: The settings of the backbone.
        size: Side of the real images, in pixels.
        images: Length of the training, in images.
    """
    side = min(config.size, 96) if size <= SMALL_SIDE else config.size
    return Recipe("fine-tuned", side, config.mean, config.std, 1e-3, images)


def small_network() -> nn.Module:
    """Returns the small network: strided convolutions to 1/16 of the side, then the mean; [B, 3, H, W] → [B, FEATURES]."""

    def layer(inputs: int, outputs: int, stride: int, kernel: int = 3) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *layer(3, 32, 2, 5),
        *layer(32, 64, 2),
        *layer(64, 128, 2),
        *layer(128, 128, 1),
        *layer(128, FEATURES, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class Classifier:
    """A trained classifier.

    Attributes:
        recipe: How it was trained.
        backbone: The trained network, which computes features.
        head: Linear layer, features → logits.
    """

    def __init__(self, recipe: Recipe, weights: str, classes: int, device: torch.device):
        """Builds the classifier with random weights, or ImageNet weights.

        Args:
            recipe: How it is trained.
            weights: Digest of the trained weights.
            classes: Number of classes, K.
            device: The device that computes.
        """
        self.recipe = recipe
        network = recipe.network()
        self.backbone = Backbone(recipe.name, network, recipe.size, recipe.mean, recipe.std, weights).to(device)
        self.head = nn.Linear(self.backbone.dim(), classes).to(device)

    def module(self) -> nn.Module:
        """Returns network and head as one module: prepared images → logits."""
        return nn.Sequential(self.backbone.network, self.head)

    @torch.inference_mode()
    def probabilities(self, batches: Iterable[torch.Tensor], number: int, what: str) -> torch.Tensor:
        """Computes the probability of each class, as the mean over the four rotations of an image.

        Args:
            batches: Batches of images, uint8.
            number: Number of images, for the progress bar.
            what: Text of the progress bar.

        Returns:
            [N, K] on the CPU.
        """
        parts = [torch.empty(0, self.head.out_features)]
        with progress_bar(number, what) as progress:
            for batch in batches:
                x = self.backbone.prepare(batch)
                logits = [self.head(self.backbone.network(torch.rot90(x, k, (-2, -1)))) for k in range(4)]
                parts.append(torch.stack(logits).softmax(-1).mean(0).cpu())
                progress.update(len(batch))
        return torch.cat(parts)


def trained_classifier(
    recipe: Recipe, train: ImageSet, classes: int, seed: int, cache: Path, shards: str, device: torch.device
) -> Classifier:
    """Returns a classifier of the training images, from the cache or after training it.

    Args:
        recipe: How it is trained.
        train: The training images.
        classes: Number of classes, K.
        seed: Seed of the weights, the order and the augmentation.
        cache: Folder in which trained classifiers are kept.
        shards: Digest of the shards that the images are from.
        device: The device that computes.

    Returns:
        The classifier. If no image has a label, it keeps its first weights.
    """
    key = digest({"recipe": vars(recipe), "seed": seed, "shards": shards, "classes": classes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = Classifier(recipe, key, classes, device)
    path = cache / f"classifier-{recipe.name}-{key}.safetensors"
    stored = read_arrays(path)
    if stored is not None:
        classifier.module().load_state_dict({name: torch.from_numpy(array) for name, array in stored.items()})
        return classifier
    if (train.labels >= 0).any():
        fit(classifier, train, torch.arange(len(train)), seed)
    write_arrays(path, {name: weights.cpu().numpy() for name, weights in classifier.module().state_dict().items()})
    return classifier


def fit(classifier: Classifier, train: ImageSet, members: torch.Tensor, seed: int) -> None:
    """Trains a classifier on batches that are balanced over the classes. The same seed gives the same classifier.

    Args:
        classifier: The classifier; its weights change.
        train: The images.
        members: Indices of the images to train on. Unlabelled images are not used; one must have a label.
        seed: Seed of the order and the augmentation.
    """
    members = members[train.labels[members] >= 0]
    recipe, module = classifier.recipe, classifier.module().requires_grad_(True).train()
    rng = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(module)
    steps = max(1, recipe.images // BATCH)
    order = members[balanced_order(train.labels[members], steps * BATCH, rng)]
    with torch.random.fork_rng(), progress_bar(steps * BATCH, f"classifier {recipe.name}") as progress:
        torch.manual_seed(seed)  # dropout draws from the global generator
        for step, index in enumerate(order.split(BATCH)):
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(recipe.rate, step, steps)
            x = augment_batch(classifier.backbone.prepare(train.images(index)), rng)
            loss = F.cross_entropy(module(x), train.labels[index].to(x.device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.update(len(index))
    module.eval().requires_grad_(False)


def _optimizer(net: nn.Module) -> torch.optim.Optimizer:
    """Returns AdamW, which decays weights but not biases and norms."""
    decayed = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}])


def _learning_rate(rate: float, step: int, steps: int) -> float:
    """Returns the learning rate: a linear warm-up over a tenth of the steps, times a cosine that falls to zero."""
    return rate * min(1, (step + 1) / (0.1 * steps + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


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
