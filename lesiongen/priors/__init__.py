"""Priors: autoregressive models of code grids. The registry below names each kind; a config chooses by `kind`."""

from lesiongen.priors.gated_pixelcnn import GatedPixelCNN, GatedPixelCNNConfig
from lesiongen.priors.gpt import GPT, GPTConfig
from lesiongen.priors.pixelcnn import PixelCNN, PixelCNNConfig
from lesiongen.priors.pixelsnail import PixelSNAIL, PixelSNAILConfig
from lesiongen.priors.prior import Prior, PriorShape

PriorModel = GPTConfig | PixelCNNConfig | GatedPixelCNNConfig | PixelSNAILConfig  # the first kind is the default
PRIORS: dict[str, type[Prior]] = {
    "gpt": GPT,
    "pixelcnn": PixelCNN,
    "gated_pixelcnn": GatedPixelCNN,
    "pixelsnail": PixelSNAIL,
}


def make(config: PriorShape, **shape: object) -> Prior:
    """Builds the prior that a config describes.

    Args:
        config: The model section of a prior's config; `config.kind` names the class.
        **shape: What the data decide: grid, entries, facts and upper, as `Prior.__init__` takes them.
    """
    return PRIORS[config.kind](config, **shape)
