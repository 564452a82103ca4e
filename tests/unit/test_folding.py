"""Folding BatchNorm layers into convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from agglo.config import build
from agglo.nn.folding import fold_batch_norms


def randomize(net: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine maps that are far from the identity."""
    random = torch.Generator().manual_seed(seed)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = torch.randn(norm.num_features, generator=random)
            norm.running_var = torch.rand(norm.num_features, generator=random) + 0.5
            norm.weight.data = torch.randn(norm.num_features, generator=random)
            norm.bias.data = torch.randn(norm.num_features, generator=random)
    return net.eval()


def fold(net: nn.Module, images: Tensor) -> int:
    return fold_batch_norms(net, lambda: {"out": net(images)})


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


class Branch(nn.Module):
    """A convolution whose output is also read beside its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        found = self.convolution(images)
        return self.norm(found) + found


class Reader(Branch):
    """A network that reads an attribute of its norm."""

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.convolution(images)) * self.norm.eps


@pytest.mark.parametrize("bias", [False, True])
def test_folded_convolution_equals_the_formula(bias: bool) -> None:
    net = randomize(nn.Sequential(nn.Conv2d(3, 5, 3, bias=bias), nn.BatchNorm2d(5), nn.ReLU()))
    images = torch.rand(2, 3, 8, 8)
    before, weight, norm = net(images), net[0].weight.clone(), net[1]
    assert fold(net, images) == 1
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(net[0].weight, weight * scale.view(-1, 1, 1, 1))
    assert norms(net) == 0
    torch.testing.assert_close(net(images), before, rtol=1e-5, atol=1e-5)


def test_norm_without_a_convolution_before_it_stays() -> None:
    net = randomize(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)))
    assert fold(net, torch.rand(1, 3, 4, 4)) == 0
    assert norms(net) == 2


def test_convolution_that_runs_twice_keeps_its_norms() -> None:
    shared = nn.Conv2d(3, 3, 1)
    net = randomize(nn.Sequential(shared, nn.BatchNorm2d(3), shared, nn.BatchNorm2d(3)))
    assert fold(net, torch.rand(1, 3, 4, 4)) == 0
    assert norms(net) == 2


def test_norm_in_training_mode_stays() -> None:
    net = randomize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    net[1].train()
    assert fold(net, torch.rand(2, 3, 4, 4)) == 0


@pytest.mark.parametrize("kind", [Branch, Reader])
def test_network_that_folding_changes_is_restored(kind: type[Branch]) -> None:
    net, images = randomize(kind()), torch.rand(2, 3, 4, 4)
    before, weight, bias = net(images), net.convolution.weight, net.convolution.bias
    assert fold(net, images) == 0
    assert net.convolution.weight is weight and net.convolution.bias is bias
    assert torch.equal(net(images), before)


@pytest.mark.weights
@pytest.mark.parametrize("model", ["tf_efficientnet_lite0", "resnet18", "regnety_002"])
def test_timm_teacher_keeps_its_features(model: str) -> None:
    teacher = build("teachers", {"kind": "timm", "model": model, "weights": "random"})
    images = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        before = teacher(images)
        folded = fold_batch_norms(teacher, lambda: vars_of(teacher(images)))
        after = teacher(images)
    assert folded > 15 and norms(teacher) == 0
    for name, value in vars_of(before).items():
        torch.testing.assert_close(vars_of(after)[name], value, rtol=0, atol=1e-4 * float(value.abs().max()))


def vars_of(features: object) -> dict[str, Tensor]:
    return {name: getattr(features, name) for name in ("summary", "spatial")}
