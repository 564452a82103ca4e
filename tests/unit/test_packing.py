"""Several images in one pass: each output equals that of a separate pass."""

import pytest
import torch
import torch.nn.functional as F

from agglo.nn.packing import Layout, Packing
from agglo.students import vit as vit_module
from agglo.students.vit import ViT

SIZES = [(32, 32), (16, 64), (48, 32), (32, 32), (16, 16), (16, 64)]


def test_tokens_attend_to_their_own_sequence_only() -> None:
    torch.manual_seed(0)
    lengths = (3, 3, 5, 2)
    q, k, v = torch.randn(3, 1, 2, 13, 4)
    found = Packing(lengths).attend(q, k, v)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = F.scaled_dot_product_attention(q[:, :, part], k[:, :, part], v[:, :, part])
        torch.testing.assert_close(found[:, :, part], alone)
        start += length


def test_windows_of_a_pack_are_invertible() -> None:
    layout = Layout(2, ((4, 4), (2, 6)), packed=True)
    x = torch.randn(1, sum(layout.lengths), 5)
    prefixes, windows = layout.split_windows(x, 2)
    assert windows.shape == (4 + 3, 4, 5)
    assert [tuple(p.shape) for p in prefixes] == [(1, 2, 5)] * 2
    assert torch.equal(layout.join_windows(prefixes, windows, 2), x)


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(0)
    return ViT(("a", "b"), width=32, depth=4, heads=2, patch=8, max_grid=8, registers=1, num_global=2).eval()


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("budget", [16_384, 20])
def test_pack_equals_single_images(vit: ViT, monkeypatch: pytest.MonkeyPatch, window: int | None, budget: int) -> None:
    monkeypatch.setattr(vit_module, "PACK_TOKENS", budget)
    images = [torch.rand(1, 3, height, width) for height, width in SIZES]
    with torch.no_grad():
        packed = vit.forward_list(images, window=window)
        alone = [vit(image, window=window) for image in images]
    assert len(packed) == len(images)
    for one, other in zip(packed, alone, strict=True):
        assert one.spatial.shape == other.spatial.shape
        torch.testing.assert_close(one.spatial, other.spatial, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.summary, other.summary, rtol=1e-4, atol=1e-5)


def test_passes_respect_the_token_limit_and_cover_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vit_module, "PACK_TOKENS", 10)
    passes = vit_module._passes([2, 0, 1, 3], [6, 5, 4, 30])
    assert passes == [[2, 0], [1], [3]]
    assert vit_module._passes([], []) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="variable-length attention in one call is for CUDA")
@pytest.mark.parametrize("width", [64, 72, 80])
def test_jagged_attention_equals_single_sequences_on_a_gpu(width: int) -> None:
    torch.manual_seed(0)
    lengths = (5, 40, 40, 17)
    q, k, v = torch.randn(3, 1, 4, sum(lengths), width, device="cuda", dtype=torch.bfloat16)
    packing = Packing(lengths)
    torch.testing.assert_close(packing.attend(q, k, v), packing._attend_runs(q, k, v), rtol=2e-2, atol=2e-2)
