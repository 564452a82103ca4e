"""Convolutions with SAME padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from agglo.nn.same_padding import SameConv2d, replace_same_convolutions

timm = pytest.importorskip("timm")
Conv2dSame = timm.layers.Conv2dSame


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("geometry", [(3, 2, 1), (5, 2, 1), (2, 2, 1), (3, 1, 1), (3, 3, 1), (3, 2, 2), (1, 2, 1)])
@pytest.mark.parametrize("size", [(16, 16), (17, 23), (16, 21), (2, 3), (1, 1)])
def test_outputs_and_gradients_equal_those_of_timm(
    size: tuple[int, int], geometry: tuple[int, int, int], depthwise: bool, learns: bool
) -> None:
    torch.manual_seed(0)
    kernel, stride, dilation = geometry
    reference = Conv2dSame(6, 6, kernel, stride, dilation=dilation, groups=6 if depthwise else 1)
    ours = SameConv2d(reference)
    results = []
    for layer in (reference, ours):
        images = torch.rand(2, 6, *size, generator=torch.Generator().manual_seed(1), requires_grad=learns)
        with torch.set_grad_enabled(learns):
            out = layer(images)
        gradients = torch.autograd.grad(out.square().sum(), [images, layer.weight, layer.bias]) if learns else []
        results.append([out, *gradients])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_inference_of_depthwise_layers_makes_no_padded_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SameConv2d(Conv2dSame(4, 4, 3, 2, groups=4))
    padded: list[torch.Size] = []
    original = torch.nn.functional.pad
    monkeypatch.setattr("agglo.nn.same_padding.F.pad", lambda x, *a: (padded.append(x.shape), original(x, *a))[1])
    images = torch.rand(1, 4, 8, 8)
    with torch.no_grad():
        layer(images)
    assert padded == [layer.weight.shape]
    layer(images)
    assert padded[1:] == [images.shape]


def test_networks_keep_the_names_of_their_parameters_and_export() -> None:
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    images, state = torch.rand(2, 3, 64, 96), net.state_dict()
    with torch.no_grad():
        expected = net(images)
        assert replace_same_convolutions(net, Conv2dSame) == 5
        assert not any(type(module) is Conv2dSame for module in net.modules())
        assert net.state_dict().keys() == state.keys()
        torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-6)
        sides = {2: 32 * torch.export.Dim("height", min=2, max=8), 3: 32 * torch.export.Dim("width", min=2, max=8)}
        program = torch.export.export(net, (images,), dynamic_shapes=(sides,)).module()
        larger = torch.rand(2, 3, 128, 160)
        torch.testing.assert_close(program(larger), net(larger), rtol=1e-4, atol=1e-5)


def test_other_classes_are_left_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3), timm.layers.StdConv2dSame(3, 3, kernel_size=3))
    assert replace_same_convolutions(net, Conv2dSame) == 0
