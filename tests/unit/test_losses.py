"""The four losses against closed forms and NumPy float64, with masks, gradients and degenerate vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from agglo.losses._reduce import Pointwise
from agglo.losses.angular import Angular
from agglo.losses.base import Loss
from agglo.losses.cosine import Cosine
from agglo.losses.mse import MSE
from agglo.losses.smooth_l1 import SmoothL1
from support.losses import check_masked_positions_have_no_effect
from support.models import random_pair


def _np_cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 1 - (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)


def _np_smooth_l1(x: np.ndarray, y: np.ndarray, beta: float = 1.0) -> np.ndarray:
    d = np.abs(x - y)
    return np.where(d < beta, d * d / (2 * beta), d - beta / 2).mean(1)


# Loss, and its distance per position in NumPy: (B, D, ...) twice to (B, ...).
CASES: dict[str, tuple[Callable[[], Loss], Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "cosine": (Cosine, _np_cosine),
    "mse": (MSE, lambda x, y: ((x - y) ** 2).mean(1)),
    "smooth_l1": (SmoothL1, _np_smooth_l1),
    "smooth_l1_2": (lambda: SmoothL1(beta=2.0), lambda x, y: _np_smooth_l1(x, y, 2.0)),
    "angular": (lambda: Angular(dispersion=False), lambda x, y: np.arccos(1 - _np_cosine(x, y)) ** 2),
}
every = pytest.mark.parametrize("name", CASES)
DIRECTIONAL = ["cosine", "angular"]


@every
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 2, 5)])
def test_equals_numpy_with_and_without_mask(name: str, shape: tuple[int, ...]) -> None:
    build, reference = CASES[name]
    loss = build()
    x, y = random_pair(shape)
    per_position = reference(x.double().numpy(), y.double().numpy())
    assert loss(x, y).item() == pytest.approx(per_position.mean(), rel=1e-5)
    mask = torch.rand(shape[0], 1, *shape[2:], generator=torch.Generator().manual_seed(1)) > 0.4
    assert loss(x, y, mask).item() == pytest.approx(per_position[mask[:, 0].numpy()].mean(), rel=1e-5)


@every
def test_is_zero_at_equality_and_float32(name: str) -> None:
    loss = CASES[name][0]()
    x, y = random_pair((4, 7))
    assert loss(x, x).item() == 0
    assert loss(x.bfloat16(), y.bfloat16()).dtype == torch.float32
    assert loss(x.double(), y.double()).dtype == torch.float32
    assert loss(x, y).shape == ()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(x, y)
    assert torch.equal(inside, loss(x, y))


@every
def test_all_masked_is_zero_with_zero_gradient(name: str) -> None:
    x, y = random_pair((2, 3, 4, 4))
    x.requires_grad_()
    value = CASES[name][0]()(x, y, torch.zeros(2, 1, 4, 4, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


@every
def test_masked_positions_have_no_effect_even_as_nan(name: str) -> None:
    check_masked_positions_have_no_effect(CASES[name][0]())


class _Affine(Pointwise):
    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 7 + torch.einsum("bchw,bchw->bhw", prediction, target)


def test_masked_mean_of_distances_that_are_not_zero_at_zero() -> None:
    x, y = random_pair((2, 3, 4, 4))
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    mask[1, 0, 2, 3] = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = _Affine()(x, y, mask)
    assert value.item() == pytest.approx(7 + (x[1, :, 2, 3] @ y[1, :, 2, 3]).item(), rel=1e-6)


@every
def test_gradient_equals_finite_differences_of_numpy(name: str) -> None:
    build, reference = CASES[name]
    x, y = random_pair((5, 6), seed=3)
    y[1] = x[1] * 1.0005 + 0.0005  # nearly parallel, where arccos is ill-conditioned
    y[2] = -x[2] + 0.01  # nearly opposite
    a, b, step = x.double().numpy(), y.double().numpy(), 1e-5
    expected = np.zeros_like(a)
    for index in np.ndindex(*a.shape):
        up, down = a.copy(), a.copy()
        up[index] += step
        down[index] -= step
        expected[index] = (reference(up, b).mean() - reference(down, b).mean()) / (2 * step)
    x.requires_grad_()
    y.requires_grad_()
    build()(x, y).backward()
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=2e-3, atol=1e-5)
    assert y.grad is None


@every
def test_degenerate_vectors_have_finite_gradients(name: str) -> None:
    zero, e, tiny = torch.zeros(3), torch.tensor([1.0, 2.0, -2.0]), torch.full((3,), 1e-30)
    x = torch.stack([e, e, zero, e, zero, tiny, 1e15 * e, e]).requires_grad_()
    y = torch.stack([e, -e, e, zero, zero, e, e, 3 * e])
    value = CASES[name][0]()(x, y)
    value.backward()
    assert math.isfinite(value.item())
    assert torch.isfinite(x.grad).all()
    if name in DIRECTIONAL:
        assert torch.equal(x.grad[2], zero) and torch.equal(x.grad[4], zero)


@every
def test_shapes_are_checked(name: str) -> None:
    loss = CASES[name][0]()
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="differ"):
        loss(x, torch.zeros(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\)"):
        loss(x, x, torch.ones(2, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(B, D\)"):
        loss(x[0], x[0])


@pytest.mark.parametrize("name", DIRECTIONAL)
def test_directional_losses_ignore_lengths(name: str) -> None:
    loss = CASES[name][0]()
    x, y = random_pair((6, 8))
    assert loss(5 * x, y / 7).item() == pytest.approx(loss(x, y).item(), rel=1e-5)


def test_closed_forms() -> None:
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert Cosine()(x, y).item() == pytest.approx(1)
    assert Cosine()(x, -x).item() == pytest.approx(2)
    assert Angular(dispersion=False)(x, y).item() == pytest.approx((math.pi / 2) ** 2)
    assert Angular(dispersion=False)(x, -x).item() == pytest.approx(math.pi**2)
    assert MSE()(x, y).item() == pytest.approx(5)  # (1 + 9) / 2
    assert SmoothL1()(x, y).item() == pytest.approx(1.5)  # (0.5 + 2.5) / 2
    assert SmoothL1(beta=0.0)(x, y).item() == pytest.approx(2)
    with pytest.raises(ValueError, match="beta"):
        SmoothL1(beta=-1.0)


def test_small_angles_keep_their_precision() -> None:
    """arccos in float32 does not resolve 1e-4 radians from 0; atan2 does."""
    for angle in (1e-1, 1e-3, 1e-5):
        x = torch.tensor([[1.0, 0.0]], requires_grad=True)
        value = Angular(dispersion=False)(x, torch.tensor([[math.cos(angle), math.sin(angle)]]))
        value.backward()
        assert value.item() == pytest.approx(angle**2, rel=1e-2)
        assert x.grad[0, 1].item() == pytest.approx(-2 * angle, rel=1e-2)


def _cone(angle: float, count: int, width: int) -> Tensor:
    """``count`` vectors at exactly ``angle`` radians around the first axis, balanced, of one length."""
    rng = np.random.default_rng(0)
    side = rng.normal(size=(count // 2, width - 1))
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    side = np.concatenate([side, -side])
    return torch.from_numpy(np.concatenate([np.full((count, 1), math.cos(angle)), math.sin(angle) * side], 1)).float()


@pytest.mark.parametrize("angle", [0.1, 0.8327, 1.4])
def test_dispersion_of_a_cone(angle: float) -> None:
    loss = Angular()
    assert loss.needs_statistics
    cone = 3 * _cone(angle, 20_000, 5)
    loss.fit(cone)
    assert loss.dispersion.item() == pytest.approx(angle**2, rel=1e-5)
    # Predicting the mean direction costs 1: that is what the division is for.
    axis = torch.tensor([[1.0, 0, 0, 0, 0]]).expand(20_000, 5)
    assert loss(axis, cone).item() == pytest.approx(1, rel=1e-4)


def test_dispersion_takes_the_mean_of_raw_targets() -> None:
    rng = np.random.default_rng(2)
    y = rng.normal(size=(500, 6)) * np.exp(rng.normal(size=(500, 1))) + 0.5
    mean = y.mean(0) / np.linalg.norm(y.mean(0))
    theta = np.arccos(np.clip(y @ mean / np.linalg.norm(y, axis=1), -1, 1))
    loss = Angular()
    loss.fit(torch.from_numpy(y))
    assert loss.dispersion.item() == pytest.approx((theta**2).mean(), rel=1e-6)
    x, t = random_pair((4, 6))
    assert loss(x, t).item() == pytest.approx(Angular(dispersion=False)(x, t).item() / (theta**2).mean(), rel=1e-5)


def test_dispersion_is_saved_and_required() -> None:
    x, y = random_pair((8, 3))
    loss = Angular()
    with pytest.raises(RuntimeError, match="fit"):
        loss(x, y)
    loss.fit(y)
    loaded = Angular()
    loaded.load_state_dict(loss.state_dict())
    assert torch.equal(loaded(x, y), loss(x, y))
    loss.load_state_dict(Angular().state_dict())
    with pytest.raises(RuntimeError, match="fit"):
        loss(x, y)
    plain = Angular(dispersion=False)
    assert not plain.needs_statistics
    plain.load_state_dict(loaded.state_dict())
    assert plain(x, y).item() == pytest.approx(loaded(x, y).item() * loaded.dispersion.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(0, 3), "N and D positive"),
        (torch.zeros(3), "N and D positive"),
        (torch.tensor([[1.0, float("nan")]] * 9), "NaN or infinity"),
        (torch.ones(1, 3), r"at least 2 targets and 8 for a usable estimate, got 1.*estimate_images"),
        (torch.ones(10, 3), r"all 10 targets have the same direction.*weights are loaded.*dispersion: false"),
        (torch.rand(9, 1) * torch.ones(9, 3), "have the same direction"),
    ],
)
def test_fit_refuses_bad_targets(bad: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Angular().fit(bad)


def test_a_dispersion_from_few_targets_says_how_many_are_needed() -> None:
    with pytest.warns(UserWarning, match=r"from 4 targets.*1/4 too small.*at least 8"):
        Angular().fit(random_pair((4, 3))[1])
    Angular().fit(random_pair((8, 3))[1])  # a warning would be an error here
