"""DAMP: what is drawn and when, the gradient, recomputation, compilation, copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agglo.nn.damp import Damp, enable_damp
from agglo.students.vit import ViT


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T * 2


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8, bias=False), nn.GELU(), Doubled(8, 4, bias=False))


def _factors(net: nn.Module) -> list[Tensor]:
    return [layer._damp.factors.clone() for layer in net.modules() if isinstance(layer, nn.Linear)]


def _manual(net: nn.Sequential, x: Tensor, factors: list[Tensor]) -> Tensor:
    """The network with each weight multiplied by hand."""
    a, b, c = (layer for layer in net if isinstance(layer, nn.Linear))
    x = nn.functional.linear(x, a.weight * factors[0], a.bias)
    x = nn.functional.linear(nn.functional.gelu(x), b.weight * factors[1])
    return nn.functional.gelu(x) @ (c.weight * factors[2]).T * 2


def test_every_linear_is_perturbed_with_the_chain_rules_gradient() -> None:
    net, x = _net(), torch.randn(5, 6)
    damp = enable_damp(net, 0.2, seed=1)
    assert damp.names == ("0", "2", "4")
    factors = _factors(net)
    torch.testing.assert_close(net(x), _manual(net, x, factors), rtol=0, atol=1e-6)
    net(x).square().sum().backward()
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    _manual(net, x, factors).square().sum().backward()
    for grad, parameter in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)
    # dL/dW = xi dL/dW_eff
    effective = (net[4].weight * factors[2]).detach().requires_grad_()
    hidden = net[:4](x).detach()
    (hidden @ effective.T * 2).square().sum().backward()
    torch.testing.assert_close(found[-1], factors[2] * effective.grad)


def test_noise_has_the_moments() -> None:
    layer = nn.Linear(400, 500)
    enable_damp(layer, 0.15, seed=3)
    (factors,) = _factors(layer)
    assert factors.mean().item() == pytest.approx(1, abs=4 * 0.15 / 200_000**0.5)
    assert factors.std().item() == pytest.approx(0.15, rel=0.01)
    kurtosis = ((factors - 1) / 0.15).pow(4).mean().item()
    assert kurtosis == pytest.approx(3, abs=0.06)


def test_noise_is_a_function_of_seed_rank_step_micro_and_layer() -> None:
    def drawn(seed: int = 0, rank: int | None = None, step: int = 7, micro: int = 0) -> list[Tensor]:
        net = _net()
        enable_damp(net, 0.1, seed=seed, rank=rank).set_step(step, micro)
        return _factors(net)

    first = drawn()
    for same in (drawn(), drawn(rank=0)):
        assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"rank": 1},
        {"step": 8},
        {"step": 0},
        {"micro": 1},
        {"seed": 7, "step": 0},
    ]
    for other in others:
        for a, b in zip(first, drawn(**other), strict=True):
            assert (a - 1).mul(b - 1).mean().abs() < 0.006 and not torch.equal(a, b)
    assert not torch.equal(first[0].flatten()[:32], first[1].flatten()[:32])


def test_the_global_generator_is_not_used() -> None:
    net = _net()
    state = torch.random.get_rng_state()
    enable_damp(net, 0.1, seed=0).set_step(3)
    assert torch.equal(state, torch.random.get_rng_state())


def test_eval_copies_and_state_are_untouched() -> None:
    net, x = _net(), torch.randn(40, 6)
    keys, before, buffers = list(net.state_dict()), net.eval()(x), len(list(net.buffers()))
    damp = enable_damp(net, 0.5, seed=0)
    assert list(net.state_dict()) == keys and len(list(net.buffers())) == buffers
    assert [type(m) for m in net] == [type(m) for m in _net()]
    assert torch.equal(net(x), before)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), before)
    net.train()
    assert not torch.allclose(net(x), before)
    twin = copy.deepcopy(net)
    assert twin[0].forward.__self__ is twin[0]
    assert torch.equal(twin(x), before) and torch.equal(twin.eval()(x), before)
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.zero_()
    assert twin(x).abs().max() == 0
    assert not torch.allclose(net(x), before)
    damp.disable()
    assert torch.equal(net(x), before) and "forward" not in net[0].__dict__
    enable_damp(net, 0.0, seed=0)
    assert torch.equal(net(x), before)


def test_recomputed_forward_uses_the_same_noise() -> None:
    grads = []
    for recompute in (False, True):
        net, x = _net(), torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
        damp = enable_damp(net, 0.3, seed=0)
        damp.set_step(11)
        y = checkpoint(net, x, use_reentrant=False) if recompute else net(x)
        y.square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_drawing_between_forward_and_backward_raises() -> None:
    net = _net()
    damp = enable_damp(net, 0.1, seed=0)
    y = net(torch.randn(5, 6)).sum()
    damp.set_step(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.backward()


def test_compiled_step_uses_new_noise_without_recompiling() -> None:
    net, x = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(5, 6)
    damp = enable_damp(net, 0.3, seed=0)
    count = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for step in range(4):
        damp.set_step(step)
        torch.testing.assert_close(compiled(x), net(x))
    assert count == 1
    net.eval()
    torch.testing.assert_close(compiled(x), net(x))


def test_a_vit_is_perturbed_everywhere() -> None:
    torch.manual_seed(0)
    vit = ViT((), width=32, depth=2, heads=2, patch=16, max_grid=4, registers=0, pos_dropout=0.0, mlp="swiglu")
    damp = enable_damp(vit, 0.1, seed=0)
    assert len(damp.names) == 1 + 2 * 4 and "patch_generator.embedder" in damp.names
    x = torch.rand(2, 3, 64, 64)
    first = vit(x).summary
    assert torch.equal(first, vit(x).summary)
    damp.set_step(1)
    assert not torch.equal(first, vit(x).summary)


def test_convolution_weights_are_perturbed() -> None:
    """At the perturbed weights, by its own forward: strides, padding and groups stay what they were."""
    layer, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.randn(2, 4, 9, 9)
    weight, before = layer.weight, layer.eval()(x)
    enable_damp(layer, 0.3, seed=0)
    assert torch.equal(layer(x), before)
    factors = layer._damp.factors
    expected = torch.nn.functional.conv2d(x, weight * factors, layer.bias, stride=2, padding=1, groups=2)
    found = layer.train()(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    gradient = layer.weight.grad
    bare = torch.nn.Parameter(weight.detach() * factors)
    torch.nn.functional.conv2d(x, bare, layer.bias, stride=2, padding=1, groups=2).sum().backward()
    torch.testing.assert_close(gradient, factors * bare.grad)  # dL/dW = xi * dL/dW_eff
    assert layer.weight is weight


def test_noise_follows_dtype_changes_and_invalid_calls_raise() -> None:
    net = nn.Sequential(nn.Linear(6, 8))
    damp: Damp = enable_damp(net, 0.1, seed=0)
    with pytest.raises(ValueError, match="already"):
        enable_damp(net, 0.1, seed=0)
    net.double()
    assert net(torch.randn(2, 6).double()).dtype == torch.float64
    damp.set_step(1)
    assert _factors(net)[0].dtype == torch.float64
    net.to("meta")
    with pytest.raises(RuntimeError, match="set_step"):
        net(torch.randn(2, 6, device="meta", dtype=torch.float64))
    damp.set_step(2)
    assert net(torch.randn(2, 6, device="meta", dtype=torch.float64)).shape == (2, 8)
    for sigma in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="sigma"):
            enable_damp(nn.Linear(2, 2), sigma, seed=0)
    with pytest.raises(ValueError, match="no nn"):
        enable_damp(nn.GELU(), 0.1, seed=0)
