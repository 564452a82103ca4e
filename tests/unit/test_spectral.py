"""Spectral reparametrisation: the start, one iteration a forward, the files' arithmetic, copies, DAMP on top."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agglo.checkpoints.spectral import materialized
from agglo.nn.damp import enable_damp
from agglo.nn.spectral import enable_spectral, materialize
from agglo.students.vit import ViT


def _vit(mlp: Any = "swiglu") -> ViT:
    torch.manual_seed(0)
    return ViT(
        (), width=32, depth=2, heads=2, patch=16, max_grid=4, registers=0, pos_dropout=0.0, mlp=mlp, mlp_hidden=48
    )


def _linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5))


def test_keys_are_the_official_ones() -> None:
    vit = _vit()
    plain = vit.state_dict()
    names = enable_spectral(vit)
    assert len(names) == 8 and not any("patch_generator" in name for name in names)
    state = vit.state_dict()
    prefix = "blocks.0.attn.proj.parametrizations.weight."
    assert state[f"{prefix}original"].shape == (32, 32)
    assert {k.removeprefix(prefix) for k in state if k.startswith(prefix)} == {
        "original", "0.scale", "0._u", "0._v", "0._sn_version",
    }  # fmt: skip
    for layer, count in (("attn.qkv", 3), ("mlp.w12", 2)):
        parts = [k for k in state if k.startswith(f"blocks.1.{layer}.parametrizations.weight.0.parts.")]
        assert len(parts) == 4 * count
    assert state[f"{prefix}0.scale"].shape == (1, 1) and state[f"{prefix}0._sn_version"] == 2
    assert {k for k in plain if k not in state} == {f"{name}.weight" for name in names}


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_nothing_changes_at_the_start(mlp: str) -> None:
    vit = _vit(mlp)
    plain = {k: v.clone() for k, v in vit.state_dict().items()}
    images = torch.rand(2, 3, 64, 64)  # as large as the table: no random viewport in training
    before = vit.eval()(images)
    enable_spectral(vit)
    for name, layer in vit.named_modules():
        if isinstance(layer, nn.Linear):
            torch.testing.assert_close(layer.weight, plain[f"{name}.weight"], rtol=2e-6, atol=1e-8)
    after = vit(images)
    torch.testing.assert_close(after.spatial, before.spatial, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vit.train()(images).spatial, vit(images).spatial, rtol=0, atol=0.02)


def test_effective_weight_in_closed_form() -> None:
    """A matrix with a known leading singular pair: W_eff has (softplus(s) + 0.05) as its largest singular value."""
    left, right = torch.linalg.qr(torch.randn(8, 8))[0], torch.linalg.qr(torch.randn(6, 6))[0]
    values = torch.tensor([3.0, 1.0, 0.5, 0.2, 0.1, 0.05])
    layer = nn.Linear(6, 8)
    with torch.no_grad():
        layer.weight.copy_(left[:, :6] * values @ right.T)
    enable_spectral(layer)
    state = layer.parametrizations["weight"][0]
    assert torch.nn.functional.softplus(state.scale).item() + 0.05 == pytest.approx(3, rel=1e-5)
    assert abs(state._u @ left[:, 0]).item() == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        state.scale.fill_(0.7)
    top = torch.linalg.matrix_norm(layer.weight, 2).item()
    assert top == pytest.approx(torch.nn.functional.softplus(torch.tensor(0.7)).item() + 0.05, rel=1e-5)


def test_gradient_in_closed_form() -> None:
    layer = nn.Linear(6, 8, bias=False)
    enable_spectral(layer)
    state, upstream = layer.parametrizations["weight"][0], torch.randn(8, 6)
    (layer.weight * upstream).sum().backward()
    weight = layer.parametrizations["weight"].original.detach()
    sigma = state._u @ weight @ state._v + 1e-6
    gain = torch.nn.functional.softplus(state.scale.detach()) + 0.05
    inner = (upstream * weight).sum()
    expected = gain / sigma * (upstream - inner / sigma * torch.outer(state._u, state._v))
    torch.testing.assert_close(layer.parametrizations["weight"].original.grad, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state.scale.grad, inner / sigma * torch.sigmoid(state.scale.detach()))


def test_one_iteration_per_training_forward_and_none_in_eval() -> None:
    net, x = _linear(), torch.randn(40, 6)
    enable_spectral(net, n_power_iterations=2)
    state = net[2].parametrizations["weight"][0]
    with torch.no_grad():
        net[2].parametrizations["weight"].original.copy_(torch.randn(5, 8))
    weight, v = net[2].parametrizations["weight"].original.detach(), state._v.clone()
    net.eval()(x)
    assert torch.equal(state._v, v)
    net.train()(x)
    for _ in range(2):
        u = nn.functional.normalize(weight @ v, dim=0)
        v = nn.functional.normalize(weight.T @ u, dim=0)
    torch.testing.assert_close(state._u, u)
    torch.testing.assert_close(state._v, v)


def test_recomputation_uses_the_same_weights() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, recompute: bool) -> None:
            super().__init__()
            self.net, self.recompute = _linear(), recompute

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False) if self.recompute else self.net(x)

    found = []
    for recompute in (False, True):
        model = Checkpointed(recompute)
        enable_spectral(model)
        with torch.no_grad():
            model.net[0].parametrizations["weight"].original.copy_(torch.arange(48.0).sin().view(8, 6))
        model(torch.arange(12.0).cos().view(2, 6)).square().sum().backward()
        found.append([p.grad for p in model.parameters()] + list(model.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_autocast_does_not_reach_the_iteration() -> None:
    nets, x = [_linear(), _linear()], torch.randn(2, 6)
    for net, enabled in zip(nets, (True, False), strict=True):
        enable_spectral(net)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            net(x)
            assert net[0].weight.dtype == torch.float32
    for a, b in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
        assert torch.equal(a, b)


def test_two_forwards_before_a_backward() -> None:
    net = _linear()
    enable_spectral(net)
    (net(torch.randn(2, 6)).sum() + net(torch.randn(2, 6)).sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_materialized_weights_equal_those_read_from_the_file(training: bool) -> None:
    vit = _vit()
    enable_spectral(vit)
    optimizer = torch.optim.SGD(vit.parameters(), lr=0.5)
    for _ in range(3):
        vit(torch.rand(2, 3, 32, 32)).spatial.square().mean().backward()
        optimizer.step()
    vit.train(training)
    file = materialized(vit.state_dict(), {"spectral_reparam": True})
    expected = {key: file[key].clone() for key in file}
    assert materialize(vit) is vit
    state = vit.state_dict()
    assert set(state) == set(expected) == set(_vit().state_dict())
    for key, value in state.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)
    assert not vit._forward_pre_hooks
    assert [type(m) for m in vit.modules()] == [type(m) for m in _vit().modules()]
    _vit().load_state_dict(state)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in vit.parameters())
    vit(torch.rand(1, 3, 32, 32))


def test_reads_a_golden_checkpoint_of_the_reference(shared: Path) -> None:
    path = shared / "golden/radio/vit_spectral.weights.safetensors"
    if not path.exists():
        pytest.skip("no golden vectors here")
    from safetensors.torch import load_file

    tensors = load_file(path)
    prefix = "base_model.blocks.0."
    block = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    vit = ViT((), width=64, depth=1, heads=4, max_grid=4, registers=0, mlp_hidden=128)
    enable_spectral(vit, eps=1e-6)
    vit.blocks[0].load_state_dict(block)
    expected = materialized(block, {"spectral_reparam": True})
    materialize(vit)
    for key, value in vit.blocks[0].state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)


def test_materializing_a_copy_leaves_the_original() -> None:
    net, x = _linear(), torch.randn(3, 6)
    enable_spectral(net)
    average = copy.deepcopy(net).eval()
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    before = net.eval()(x)
    materialize(average)
    assert torch.equal(net(x), before)
    torch.testing.assert_close(average(x), before, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(v, buffers[k]) for k, v in net.named_buffers())
    net.train()(x)
    assert any(not torch.equal(v, buffers[k]) for k, v in net.named_buffers())
    names = {name.rsplit(".", 1)[1] for name in buffers}
    assert names == {"_u", "_v", "_sn_version"}


def _perturbed(net: nn.Sequential, x: Tensor) -> Tensor:
    """What DAMP makes of the network of :func:`_linear`, by hand."""
    weights = [(layer.weight * layer._damp.factors, layer.bias) for layer in (net[0], net[2])]
    return nn.functional.linear(nn.functional.gelu(nn.functional.linear(x, *weights[0])), *weights[1])


@pytest.mark.parametrize("damp_first", [True, False])
def test_damp_multiplies_the_spectral_weights(damp_first: bool) -> None:
    net, x = _linear(), torch.randn(3, 6)
    steps = [lambda: enable_damp(net, 0.3, seed=0), lambda: enable_spectral(net)]
    for step in steps if damp_first else reversed(steps):
        step()
    found = net(x)
    torch.testing.assert_close(found, _perturbed(net, x))
    assert not torch.allclose(found, net.eval()(x))
    materialize(net)
    torch.testing.assert_close(net.train()(x), _perturbed(net, x))


def test_a_compiled_step_is_the_eager_one() -> None:
    nets, x = [_linear(), _linear()], torch.randn(5, 6)
    for net in nets:
        enable_spectral(net)
        enable_damp(net, 0.1, seed=0)
    compiled = torch.compile(nets[1], backend="aot_eager", fullgraph=True)
    for _ in range(2):
        a, b = nets[0](x), compiled(x)
        torch.testing.assert_close(a, b)
        a.sum().backward()
        b.sum().backward()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for p, q in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
        torch.testing.assert_close(p, q)


def test_low_precision_meta_and_the_global_generator() -> None:
    state = torch.random.get_rng_state()
    net = _linear()
    after = torch.random.get_rng_state()
    net.bfloat16()
    before = [net[0].weight.clone(), net[2].weight.clone()]
    enable_spectral(net)
    assert torch.equal(after, torch.random.get_rng_state()) and not torch.equal(state, after)
    for weight, layer in zip(before, (net[0], net[2]), strict=True):
        assert layer.weight.dtype == torch.bfloat16
        torch.testing.assert_close(layer.weight, weight)
    with torch.device("meta"):
        meta = _linear()
    enable_spectral(meta)
    assert meta(torch.empty(2, 6, device="meta")).shape == (2, 5)


def test_invalid_modules_are_refused() -> None:
    net = _linear()
    with torch.no_grad():
        net[2].weight.mul_(1e-3)
    with pytest.raises(ValueError, match=r"of 2 is not above 0.05.*skip=\('patch_generator', '2'\)"):
        enable_spectral(net)
    assert "2.weight" in net.state_dict()
    assert enable_spectral(net, skip=("2",)) == ("0",)
    with pytest.raises(ValueError, match="0 is parametrised already"):
        enable_spectral(net)
    with pytest.raises(ValueError, match="no nn"):
        enable_spectral(nn.GELU())
    with pytest.raises(ValueError, match="3 matrices"):
        enable_spectral(nn.ModuleDict({"qkv": nn.Linear(4, 10)}))
    nn.utils.parametrize.register_parametrization(net[0], "bias", nn.Identity())
    with pytest.raises(ValueError, match="further"):
        materialize(net)
    assert materialize(nn.GELU()) is not None
