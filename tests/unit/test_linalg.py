"""Hadamard matrices, equal-variance rotations and streaming moments against their definitions and NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agglo.nn.linalg import Moments, equalise_variance, hadamard, is_hadamard_order, isotropic_rotation, unit

EXACT = [1, 2, 4, 8, 12, 20, 28, 36, 40, 44, 48, 60, 76, 96, 104, 112, 120, 160, 320, 352, 384, 768, 1024, 1152, 1280]
# 6 and 10 are no multiples of 4; 3^2 = 9 and 5^2 = 25 are 1 mod 4 but not prime; 472 = 8 * 59 has no Paley split.
NONE = [0, -4, 3, 5, 6, 7, 9, 10, 14, 18, 52, 92, 472]


@pytest.mark.parametrize("n", EXACT)
def test_hadamard_is_orthogonal_with_equal_squares(n: int) -> None:
    h = hadamard(n)
    signs = (h * n**0.5).round()
    assert h.dtype == torch.float64 and h.shape == (n, n)
    assert torch.equal(h.abs(), h.abs()[:1, :1].expand(n, n)) and abs(h[0, 0].item() ** 2 * n - 1) < 1e-15
    assert torch.equal(signs.float() @ signs.float().T, n * torch.eye(n))
    assert is_hadamard_order(n)


def test_hadamard_closed_forms() -> None:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    assert torch.equal(hadamard(4) * 2, torch.kron(two, two))
    # Paley I with q = 11: the squares modulo 11 are 1, 3, 4, 5, 9.
    signs = (hadamard(12) * 12**0.5).round()
    row = [1 if (0 - j) % 11 in {0, 1, 3, 4, 5, 9} else -1 for j in range(11)]
    assert signs[1].tolist() == [-1, *row]
    assert signs[0].tolist() == [1] * 12
    # The largest power of two is split off: 24 = 2 * 12, not Paley I of q = 23.
    assert torch.allclose(hadamard(24), torch.kron(hadamard(2), hadamard(12)), atol=1e-15)
    assert torch.allclose(hadamard(1152), torch.kron(hadamard(32), hadamard(36)), atol=1e-15)


@pytest.mark.parametrize("n", NONE)
def test_orders_without_a_construction_are_refused(n: int) -> None:
    assert not is_hadamard_order(n)
    with pytest.raises(ValueError, match="nearest" if n > 0 else "positive"):
        hadamard(n)


def test_hadamard_error_has_the_nearest_orders() -> None:
    with pytest.raises(ValueError, match="nearest: 468, 480"):
        hadamard(472)


def test_hadamard_is_not_shared() -> None:
    hadamard(12).zero_()
    assert hadamard(12).abs().min() > 0


@pytest.mark.parametrize("n", [3, 7, 21, 52])
def test_fallback_rotation_is_orthogonal_deterministic_and_flagged(n: int) -> None:
    rotation, exact = isotropic_rotation(n)
    assert not exact
    assert torch.allclose(rotation @ rotation.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    torch.manual_seed(99)
    assert torch.equal(rotation, isotropic_rotation(n).matrix)


def test_rotation_is_hadamard_where_there_is_one() -> None:
    rotation, exact = isotropic_rotation(20)
    assert exact and torch.equal(rotation, hadamard(20))
    with pytest.raises(ValueError, match="positive"):
        isotropic_rotation(0)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 21, 52])
@pytest.mark.parametrize("rank", [1, 3, 100])
def test_equalise_variance(n: int, rank: int) -> None:
    rng = np.random.default_rng(n * 1000 + rank)
    factor = rng.normal(size=(n, min(n, rank))) * np.exp(rng.normal(size=(1, min(n, rank))) * 2)
    covariance = torch.from_numpy(factor @ factor.T)
    start = isotropic_rotation(n).matrix if n > 2 else torch.eye(n, dtype=torch.float64)
    kept = start.clone()
    rotation = equalise_variance(start, covariance)
    assert torch.equal(start, kept)
    assert torch.allclose(rotation @ rotation.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    spread = (rotation @ covariance @ rotation.T).diagonal()
    assert torch.allclose(spread, covariance.diagonal().mean().expand(n), rtol=1e-11, atol=0)


def test_unit() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    out = unit(x)
    assert torch.allclose(out, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    (out * torch.tensor([1.0, 2.0])).sum().backward()
    # d(v·x/|x|) = (v - (v·x̂) x̂) / |x|, v = (1, 2), x̂ = (0.6, 0.8).
    assert torch.allclose(x.grad, torch.tensor([[(1 - 2.2 * 0.6) / 5, (2 - 2.2 * 0.8) / 5], [0.0, 0.0]]), atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_unit_propagates_non_finite_values(bad: float) -> None:
    out = unit(torch.tensor([[3.0, bad], [3.0, 4.0]]))
    assert out[0].isnan().any()
    assert torch.allclose(out[1], torch.tensor([0.6, 0.8]))


def _data(rows: int, channels: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, channels)) @ rng.normal(size=(channels, channels)) + 50 * rng.normal(size=channels)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=8), st.integers(0, 2**16))
def test_streaming_equals_full_batch_in_any_split(cuts: list[int], seed: int) -> None:
    x = _data(40, 5, seed)
    bounds = [0, *sorted(cuts), 40]
    streamed, left, right = Moments(5), Moments(5), Moments(5)
    for k, (start, stop) in enumerate(itertools.pairwise(bounds)):
        part = torch.from_numpy(x[start:stop])
        streamed.update(part)
        (left if k % 2 else right).update(part)
    left.merge(right)
    for moments in (streamed, left):
        assert moments.count == 40
        np.testing.assert_allclose(moments.mean.numpy(), x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance().numpy(), np.cov(x.T), rtol=1e-9, atol=1e-10)


def test_moments_are_chunked_and_accumulate_in_float64() -> None:
    # Mean 1e4 times the deviation: float32 accumulation of squares would lose the variance.
    rng = np.random.default_rng(1)
    x = (1e4 + rng.normal(size=(40_000, 3))).astype(np.float32)
    moments = Moments(3)
    moments.update(torch.from_numpy(x))
    np.testing.assert_allclose(moments.covariance().numpy(), np.cov(x.T.astype(np.float64)), rtol=1e-9, atol=1e-10)
    assert torch.equal(moments.covariance(), moments.covariance().T)


def test_moments_refuse_bad_input() -> None:
    moments = Moments(3)
    with pytest.raises(ValueError, match="at least 2"):
        moments.covariance()
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        moments.update(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="NaN"):
        moments.update(torch.tensor([[0.0, float("inf"), 0.0]]))
    assert moments.count == 0
    with pytest.raises(ValueError, match="2 channels"):
        moments.merge(Moments(2))
    with pytest.raises(ValueError, match="positive"):
        Moments(0)
    moments.merge(Moments(3))
    assert moments.count == 0
