"""Two maps on one grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agglo.nn.geometry import align, resample

sides = st.integers(1, 24)


def brute_axis(values: np.ndarray, n_out: int) -> np.ndarray:
    """docs/method.md, D-11, in one dimension, point by point, float64."""
    n_in = len(values)
    points = math.ceil(n_in / n_out)
    out = []
    for cell in range(n_out):
        total = 0.0
        for j in range(points):
            p = (cell + (j + 0.5) / points) * n_in / n_out - 0.5
            total += np.interp(p, np.arange(n_in), values)
        out.append(total / points)
    return np.array(out)


def test_equal_grids_return_the_same_objects() -> None:
    a, b = torch.randn(2, 3, 5, 7), torch.randn(1, 4, 5, 7)
    one, two = align(a, b)
    assert one is a
    assert two is b


def test_the_smaller_grid_is_chosen_for_each_axis() -> None:
    a, b = align(torch.randn(1, 2, 8, 3), torch.randn(1, 5, 4, 6))
    assert a.shape == (1, 2, 4, 3)
    assert b.shape == (1, 5, 4, 3)


@given(sides, sides, st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_integer_ratio_is_the_block_mean(h: int, w: int, fy: int, fx: int) -> None:
    x = torch.randn(2, 3, h * fy, w * fx, dtype=torch.float64)
    expected = x.numpy().reshape(2, 3, h, fy, w, fx).mean((3, 5))
    np.testing.assert_allclose(resample(x, (h, w)).numpy(), expected, atol=1e-12)


@given(sides, sides, sides, sides)
@settings(max_examples=60, deadline=None)
def test_equals_brute_force(h: int, w: int, h2: int, w2: int) -> None:
    x = np.random.default_rng(h * 1000 + w).standard_normal((h, w))
    expected = np.apply_along_axis(brute_axis, 1, np.apply_along_axis(brute_axis, 0, x, h2), w2)
    np.testing.assert_allclose(resample(torch.tensor(x)[None, None], (h2, w2))[0, 0].numpy(), expected, atol=1e-12)


@given(sides, sides, sides, sides)
@settings(max_examples=30, deadline=None)
def test_constant_maps_are_preserved(h: int, w: int, h2: int, w2: int) -> None:
    out = resample(torch.full((1, 1, h, w), 2.5, dtype=torch.float64), (h2, w2))
    torch.testing.assert_close(out, torch.full((1, 1, h2, w2), 2.5, dtype=torch.float64))


@pytest.mark.parametrize(("n_in", "n_out", "border"), [(16, 4, 0), (24, 8, 0), (9, 8, 1), (32, 9, 1), (14, 6, 1)])
def test_ramp_keeps_its_value_at_cell_centres(n_in: int, n_out: int, border: int) -> None:
    ramp = (torch.arange(n_in, dtype=torch.float64) + 0.5).expand(1, 1, n_in, n_in)
    centres = (torch.arange(n_out, dtype=torch.float64) + 0.5) * n_in / n_out
    found = resample(ramp, (n_out, n_out))[0, 0]
    inner = slice(border, n_out - border)
    torch.testing.assert_close(found[:, inner], centres[inner].expand(n_out, -1), atol=1e-12, rtol=0)


def test_upsampling_is_bilinear_interpolation() -> None:
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(x, size=(9, 11), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resample(x, (9, 11)), expected, atol=1e-12, rtol=0)


def test_no_aliasing() -> None:
    stripes = torch.tensor([0.0, 1.0]).repeat(12).expand(1, 1, 24, 24)
    assert resample(stripes, (7, 7)).sub(0.5).abs().max() < 0.2  # plain bilinear sampling gives up to 0.5
    plain = torch.nn.functional.interpolate(stripes, size=(7, 7), mode="bilinear", align_corners=False)
    assert plain.sub(0.5).abs().max() > 0.4


def test_gradient_and_dtype_survive_autocast() -> None:
    x = torch.randn(1, 2, 9, 9, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = resample(x, (4, 4))
    assert out.dtype == torch.float32
    out.sum().backward()
    assert x.grad is not None
    # Every cell's weights sum to one, so the gradient of the sum over 4x4 cells and 2 channels adds up to 32.
    assert float(x.grad.sum()) == pytest.approx(32, abs=1e-4)


@pytest.mark.parametrize("shape", [(3, 4, 4), (4, 4), (1, 1, 1, 4, 4)])
def test_aligning_other_shapes_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        align(torch.zeros(shape), torch.zeros(1, 1, 2, 2))


def test_empty_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one cell"):
        resample(torch.zeros(1, 1, 2, 2), (0, 2))
