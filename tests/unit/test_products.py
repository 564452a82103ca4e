"""The fast products are PyTorch's, to rounding, and are off wherever PyTorch's own operators are needed."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from agglo.nn import products
from agglo.nn.blocks import Block, Mlp
from agglo.nn.packing import Packing
from agglo.students.vit import ViT
from agglo.types import Features

HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every product that goes to oneDNN, which is assumed to be faster here."""
    if not HAS_ONEDNN:
        pytest.skip("this PyTorch has no oneDNN")
    made: list[int] = []
    real = products._product

    def counted(*args: torch.Tensor) -> torch.Tensor:
        made.append(1)
        return real(*args)

    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "MULTIPLICATIONS", 1)
    monkeypatch.setattr(products, "_product", counted)
    return made


@pytest.fixture
def switch() -> Iterator[pytest.MonkeyPatch]:
    """A patch of its own, so that it can be undone in the middle of a test."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 24), (3, 40, 24), (1, 1, 24), (0, 24)])
def test_linear_equals_pytorchs(
    calls: list[int], monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], bias: bool
) -> None:
    monkeypatch.setattr(products, "MULTIPLICATIONS", 64 * 24 * 56)
    layer, x = products.Linear(24, 56, bias=bias), torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    assert bool(calls) == (x.numel() // 24 >= 64)


def test_strided_inputs_give_equal_results(calls: list[int]) -> None:
    layer, x = products.Linear(24, 8), torch.randn(24, 70)
    with torch.no_grad():
        torch.testing.assert_close(layer(x.t()), F.linear(x.t(), layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    assert calls


@pytest.mark.parametrize("length", [300, 363])
def test_tiled_attention_equals_pytorchs(calls: list[int], monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(products, "SCORES", length * length // threads)
    monkeypatch.setattr(products, "TILE", 100 * length // threads)
    monkeypatch.setattr(products, "THREADS", threads)
    q, k, v = torch.randn(2, length, 3, 3, 20).permute(2, 0, 3, 1, 4)
    with torch.inference_mode():
        found, expected = products.attend(q, k, v), F.scaled_dot_product_attention(q, k, v)
        assert len(calls) >= 2 * 2 * 3 * 3
        packed = Packing((length, length)).attend(*(t.transpose(0, 1).flatten(1, 2)[None] for t in (q, k, v)))
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[0].unflatten(1, (2, length)).transpose(0, 1), expected, rtol=1e-5, atol=1e-5)


def test_short_sequences_and_many_threads_use_pytorchs_attention(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    q = k = v = torch.randn(1, 2, 8, 4)
    with torch.inference_mode():
        products.attend(q, k, v)
        monkeypatch.setattr(products, "SCORES", 1)
        monkeypatch.setattr(products, "THREADS", 0)
        products.attend(q, k, v)
    assert not calls


def test_gradients_autocast_counters_and_the_switch_use_pytorchs_operators(
    calls: list[int], switch: pytest.MonkeyPatch
) -> None:
    layer, x = products.Linear(24, 8), torch.randn(64, 24)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.inference_mode():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            layer(x)
        switch.setattr(torch.backends.mkldnn, "enabled", False)
        layer(x)
        switch.undo()
        products.Linear(24, 8, dtype=torch.float64)(x.double())
        products.Linear(24, 8, device="meta")(x.to("meta"))
        traced = torch.jit.trace(layer, x, check_trace=False)
        assert "linear_pointwise" not in str(traced.inlined_graph)  # type: ignore[union-attr]
    assert counter.get_total_flops() == 2 * 64 * 24 * 8
    assert not calls


def test_exported_programs_hold_pytorchs_operators(calls: list[int]) -> None:
    with torch.no_grad():
        program = torch.export.export(Block(32, 2, 64).eval(), (torch.randn(1, 64, 32),))
    assert "linear_pointwise" not in str(program.graph)
    assert not calls


def test_gelu_in_place_preserves_tensors_held_by_hooks() -> None:
    mlp, x = Mlp(8, 16), torch.randn(5, 8)
    expected, given = mlp.fc2(F.gelu(mlp.fc1(x))).detach(), x.clone()
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(x, given)
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, args: object, out: torch.Tensor) -> None:
        kept.append(out)

    mlp.fc1.register_forward_hook(keep)
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(kept[0], F.linear(x, mlp.fc1.weight, mlp.fc1.bias))
    mlp(x).sum().backward()
    assert mlp.fc1.weight.grad is not None


def test_passes_that_reuse_memory_give_equal_results(monkeypatch: pytest.MonkeyPatch) -> None:
    student = ViT(("a", "b"), width=32, depth=2, heads=2, max_grid=8, registers=1).eval()
    images, passes = torch.rand(5, 3, 32, 48), []
    student.blocks[0].register_forward_pre_hook(lambda block, args: passes.append(tuple(args[0].shape[:2])))
    with torch.inference_mode():
        whole = student(images)
        # Nine tokens of 128 channels an image: two images a pass.
        monkeypatch.setattr(products, "REUSED", 20 * 128 * 4)
        cut, alone = student(images), student(images[:1])
        listed = student.forward_list([image[None] for image in images])
    assert passes == [(5, 9), (2, 9), (2, 9), (1, 9), (1, 9), (1, 18), (1, 18), (1, 9)]
    for found in (cut, Features(*(torch.cat(t) for t in zip(*((f.summary, f.spatial) for f in listed), strict=True)))):
        torch.testing.assert_close(found.summary, whole.summary, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.spatial, whole.spatial, rtol=1e-5, atol=1e-5)
    assert cut.spatial.stride() == whole.spatial.stride()
    assert alone.summary.shape == (1, 64)
    student(images)
    assert passes[-1] == (5, 9)  # gradients want it whole


def test_the_library_is_chosen_by_processor() -> None:
    products._onednn_is_faster.cache_clear()
    assert isinstance(products._onednn_is_faster(), bool)
    if "Intel" in products._vendor() or not torch.backends.mkl.is_available():
        assert not products._onednn_is_faster()
    assert isinstance(products.Linear(2, 3), nn.Linear)
