"""Formats on disk: a run made before a change must resume after it, match its config, and load its weights.

A digest that differs here means that old checkpoints, exports or runs are refused, or loaded wrongly. If that is intended,
put the new digest here.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from hpc.config import digest, from_plain
from hpc.train.loop import State
from lesiongen import priors, tokenizers
from lesiongen.data import augment
from lesiongen.experiment import PriorConfig, TokenizerConfig, load
from lesiongen.stages import stages

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENIZERS = {
    "vqvae ema": "3de8bd1848bb8f9e",
    "vqvae cosine": "3de8bd1848bb8f9e",
    "vqvae gradient": "f5d742cfdd28e319",
    "vqvae fsq": "66cb43cac29696f4",
    "vqvae2 ema": "d4b3dd03a1c6eba7",
    "vqvae2 cosine": "d4b3dd03a1c6eba7",
    "vqvae2 gradient": "cc55e02b0c3a4958",
    "vqvae2 fsq": "8dcc784d0ff98408",
}
PRIORS = {
    "gpt": "31c0c9c7eae07470",
    "pixelcnn": "926179831c78e3d7",
    "gated_pixelcnn": "48a5809222f40fd9",
    "pixelsnail": "af3a7c4c98a09b0c",
}
IDENTITIES = {
    "demo.yaml": "ae6ce52d618e667f",
    "ham10000-cpu.yaml": "c86c3171eb923e72",
    "ham10000-cpu-128.yaml": "4839379a47d4dfa5",
    "ham10000-cpu-vqvae2.yaml": "6b7acc50fda136cb",
    "seeds/report-000.yaml": "5dfe3a770d63ee6b",
    "seeds/report-001.yaml": "e82dd8e3d2815056",
    "seeds/report-002.yaml": "5e8ac0f752f76cff",
    "seeds/report-003.yaml": "234afce16830772a",
    "seeds/report-004.yaml": "bf4b9f9aae5ce0fe",
}


def keys(net: nn.Module) -> str:
    """Digest of the names, shapes and types of all weights, in their order: ZeRO flattens parameters in that order."""
    return digest([[name, list(value.shape), str(value.dtype)] for name, value in net.state_dict().items()])


def test_every_tokenizer_and_prior_is_here():
    assert {name.split()[0] for name in TOKENIZERS} == tokenizers.TOKENIZERS.keys()
    assert PRIORS.keys() == priors.PRIORS.keys()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_weights_of_tokenizers(name):
    kind, quantizer = name.split()
    model = from_plain(TokenizerConfig, {"model": {"kind": kind, "quantizer": quantizer}}).model
    assert keys(tokenizers.make(model, 3, 32)) == TOKENIZERS[name]


@pytest.mark.parametrize("kind", PRIORS)
def test_weights_of_priors(kind):
    model = from_plain(PriorConfig, {"model": {"kind": kind, "layers": 2, "width": 48}}).model
    net = priors.make(model, grid=(8, 8), entries=64, facts={"label": 7, "sex": 2}, upper=((64, (4, 4)),))
    assert keys(net) == PRIORS[kind]


@pytest.mark.parametrize("path", IDENTITIES)
def test_what_a_stage_is_made_from(path):
    """Names and defaults of config fields: with another digest every run made before is stale.

    The report is left out: it costs minutes, and its figures are to change when they become better.
    """
    config = load(str(CONFIGS / path), ["data.images=IMAGES", "data.metadata=null"])
    identities = {name: stage.identity for name, stage in stages(config).items() if name != "report"}
    assert digest(identities) == IDENTITIES[path]


def test_draws_of_a_view():
    """Noise continues the generator where the draws end, so neither their order nor their number may change."""
    names = "side top left symmetry brightness contrast saturation hue angle aspect one_of"
    assert tuple(f"{names} crop dihedral hflip vflip rotate jitter noise".split()) == augment.DRAWS
    rng = torch.Generator().manual_seed(0)
    augment.augment(torch.zeros(3, 16, 16, dtype=torch.uint8), 16, augment.AugmentConfig(), rng)
    assert torch.rand(1, generator=rng).item() == pytest.approx(0.16102945804595947)


def test_a_checkpoint_with_former_names_resumes(tmp_path):
    (tmp_path / "MANIFEST.json").write_text('{"state": {"samples": 96, "patient_from": 32, "ended_for": 96, "best": 1.5}}')
    state = State.resume(tmp_path, length=96)
    assert (state.samples, state.best, state.patience_from, state.ended_length) == (96, 1.5, 32, 96)
    longer = State.resume(tmp_path, length=128)
    assert (longer.patience_from, longer.ended_length) == (96, 0)
