"""Priors: autoregressive models of code grids. The registry maps each `kind` of a config to its class."""

from lesiongen.priors.gated_pixelcnn import GatedPixelCNN, GatedPixelCNNConfig
from lesiongen.priors.gpt import GPT, GPTConfig
from lesiongen.priors.pixelcnn import PixelCNN, PixelCNNConfig
from lesiongen.priors.pixelsnail import PixelSNAIL, PixelSNAILConfig
from lesiongen.priors.prior import BasePriorConfig, Prior

PriorModel = GPTConfig | PixelCNNConfig | GatedPixelCNNConfig | PixelSNAILConfig  # the first kind is the default
PRIORS: dict[str, type[Prior]] = {
    "gpt": GPT,
    "pixelcnn": PixelCNN,
    "gated_pixelcnn": GatedPixelCNN,
    "pixelsnail": PixelSNAIL,
}


def make(config: BasePriorConfig, **shape: object) -> Prior:
    """Builds the prior that a config describes.

    Args:
        config: The model section of a prior's config; `config.kind` names the class.
        **shape: The arguments of `Prior.__init__` that follow from the data: grid, entries, facts and upper.
    """
    return PRIORS[config.kind](config, **shape)
