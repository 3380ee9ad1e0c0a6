"""Backbones from a file of the user's."""

import pytest
import torch
from torch import nn

from hpc.errors import UserError
from lesiongen.evaluation.backbone import FeaturesConfig, load_backbone
from lesiongen.evaluation.classifier import small_network


def test_a_torchscript_file_computes_what_its_network_computes(tmp_path):
    torch.manual_seed(0)
    network = small_network().eval()
    torch.jit.script(network).save(str(tmp_path / "net.pt"))
    backbone = load_backbone(FeaturesConfig(str(tmp_path / "net.pt"), size=32), lambda: None).to(torch.device("cpu"))
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        wanted = network((images.float() - 127) / 128)
    assert (backbone.dim(), backbone.name) == (256, "net")
    torch.testing.assert_close(backbone(images), wanted, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in backbone.network.parameters())


def test_a_network_that_returns_no_vectors_is_refused(tmp_path):
    torch.jit.script(nn.Conv2d(3, 2, 1)).save(str(tmp_path / "map.pt"))
    with pytest.raises(UserError, match="returns an array"):
        load_backbone(FeaturesConfig(str(tmp_path / "map.pt"), size=32), lambda: None)
