"""Tokenizers: images ⇄ grids of integer codes. The registry maps each `kind` of a config to its class."""

from lesiongen.tokenizers.tokenizer import Tokenizer
from lesiongen.tokenizers.vqvae import VQVAE, VQVAEConfig
from lesiongen.tokenizers.vqvae2 import VQVAE2, VQVAE2Config

TokenizerModel = VQVAE2Config | VQVAEConfig  # the first kind is the default
TOKENIZERS: dict[str, type[Tokenizer]] = {"vqvae": VQVAE, "vqvae2": VQVAE2}


def make(config: TokenizerModel, channels: int, batch: int) -> Tokenizer:
    """Builds the tokenizer that a config describes.

    Args:
        config: The model section of a tokenizer's config; `config.kind` names the class.
        channels: Colour channels of the images, 1 or 3.
        batch: Global batch size. It decides how many revival candidates each sample gives to the quantizers.
    """
    return TOKENIZERS[config.kind](config, channels, batch)
