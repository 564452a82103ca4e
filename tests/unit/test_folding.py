"""Folding BatchNorm layers into convolutions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from agglo.config import build
from agglo.nn.folding import fold_batch_norms, fuse_fixed_norms


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


def learner() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4, affine=False),
    )  # fmt: skip
    for norm in net:
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = torch.randn(norm.num_features)
            norm.running_var = torch.rand(norm.num_features) + 0.5
            if norm.affine:
                norm.weight.data, norm.bias.data = torch.randn(2, norm.num_features)
    return net.eval()


def fuse(net: nn.Module, images: Tensor) -> int:
    return fuse_fixed_norms(net, lambda: {"out": net(images)})


def test_fused_norms_learn_as_before() -> None:
    """Outputs, gradients of every parameter, names, and a copy that learns by itself."""
    images = torch.rand(2, 3, 16, 18)
    plain, fused = learner(), learner()
    assert fuse(fused, images) == 3
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert fused.state_dict().keys() == plain.state_dict().keys()
    copied = copy.deepcopy(fused)
    for net in (plain, fused, copied):
        net(images).square().sum().backward()
    for (name, expected), found, again in zip(
        plain.named_parameters(), fused.parameters(), copied.parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(again.grad, found.grad) and again is not found
    with torch.no_grad():
        copied[0].weight.zero_()
    assert not torch.equal(copied(images), fused(images))


def test_fused_norms_save_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = learner(), torch.rand(1, 3, 16, 16)
    assert fuse(net, images) == 3
    calls: list[bool] = []
    original = torch.nn.functional.batch_norm
    monkeypatch.setattr("torch.nn.functional.batch_norm", lambda *a, **k: (calls.append(True), original(*a, **k))[1])
    net(images)
    assert not calls
    with torch.no_grad():
        net(images)
    assert len(calls) == 3  # the folded weights of a large network cost more than the norms of one image


def test_fused_norms_in_training_mode_use_the_batch() -> None:
    images = torch.rand(4, 3, 16, 16)
    plain, fused = learner(), learner()
    fuse(fused, images)
    torch.testing.assert_close(fused.train()(images), plain.train()(images))
    for expected, found in zip(plain.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_convolution_with_two_readers_is_not_fused() -> None:
    net = randomize(Branch())
    before = list(net.modules())
    assert fuse(net, torch.rand(1, 3, 8, 8)) == 0
    assert list(net.modules()) == before


def test_parametrised_convolutions_are_not_fused() -> None:
    net = learner()
    torch.nn.utils.parametrizations.orthogonal(net[5])
    assert fuse(net, torch.rand(1, 3, 16, 16)) == 2
