"""AM-RADIO's dense loss and the three relational losses against brute force in NumPy float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agglo.losses._reduce import Relation
from agglo.losses.am_radio import AMRadio
from agglo.losses.base import Loss
from agglo.losses.contrastive import Contrastive
from agglo.losses.gram import Gram
from agglo.losses.relational import Relational
from support.losses import check_masked_positions_have_no_effect
from support.models import random_pair

Array = np.ndarray[Any, np.dtype[np.float64]]
# Two groups of vectors (N, D) to the sum over what counts, and how many count.
Group = Callable[[Array, Array], tuple[float, int]]


def _unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _np_gram(x: Array, y: Array) -> tuple[float, int]:
    x, y = _unit(x), _unit(y)
    return sum((x[i] @ x[j] - y[i] @ y[j]) ** 2 for i in range(len(x)) for j in range(len(x))), len(x) ** 2


def _np_relational(x: Array, y: Array, *, asymmetric: bool = True, angle: bool = False) -> tuple[float, int]:
    n = len(x)
    off = [(i, j) for i in range(n) for j in range(n) if i != j]
    if not off:
        return 0.0, 0

    def relative(z: Array) -> dict[tuple[int, int], float]:
        z = _unit(z) if angle else z
        apart = {(i, j): math.acos(z[i] @ z[j]) if angle else float(np.linalg.norm(z[i] - z[j])) for i, j in off}
        mean = sum(apart.values()) / len(off)
        return {pair: value / mean for pair, value in apart.items()}

    student, teacher = relative(x), relative(y)
    median = sorted(teacher.values())[(len(off) - 1) // 2]
    total = 0.0
    for pair in off:
        shrink, expand = student[pair] - teacher[pair], teacher[pair] - student[pair]
        if asymmetric:
            d = max(shrink if teacher[pair] < median else expand, 0.0)
        else:
            d = abs(shrink)
        total += d * d / 2 if d < 1 else d - 0.5
    return total, len(off)


def _np_contrastive(
    x: Array, y: Array, *, hard: bool = False, tau: float = 0.07, teacher: float = 0.07
) -> tuple[float, int]:
    x, y = _unit(x), _unit(y)
    total = 0.0
    for i in range(len(x)):
        q = np.exp([x[i] @ y[j] / tau for j in range(len(x))])
        p = np.exp([y[i] @ y[j] / teacher for j in range(len(x))])
        q, p = q / q.sum(), p / p.sum()
        total += -math.log(q[i]) if hard else float((p * np.log(p / q)).sum())
    return total, len(x)


CASES: dict[str, tuple[Callable[[], Loss], Group]] = {
    "gram": (Gram, _np_gram),
    "arkd": (Relational, _np_relational),
    "arkd_angle": (lambda: Relational(metric="angle"), lambda x, y: _np_relational(x, y, angle=True)),
    "rkd": (lambda: Relational(asymmetric=False), lambda x, y: _np_relational(x, y, asymmetric=False)),
    "soft": (Contrastive, _np_contrastive),
    "softer": (
        lambda: Contrastive(temperature=0.2, teacher_temperature=0.5),
        lambda x, y: _np_contrastive(x, y, tau=0.2, teacher=0.5),
    ),
    "infonce": (lambda: Contrastive(targets="hard"), lambda x, y: _np_contrastive(x, y, hard=True)),
}
every = pytest.mark.parametrize("name", CASES)
VANISHING = ["gram", "arkd", "arkd_angle", "rkd", "soft"]


def _groups(x: Tensor, mask: Tensor) -> list[Array]:
    """The vectors that count, group by group: the batch of summaries, or each image."""
    if x.ndim == 2:
        return [x.double().numpy()[mask[:, 0].numpy()]]
    rows = x.double().flatten(2).mT.numpy()
    return [r[m] for r, m in zip(rows, mask.flatten(1).numpy(), strict=True)]


def _expected(group: Group, x: Tensor, y: Tensor, mask: Tensor) -> float:
    sums = [group(a, b) for a, b in zip(_groups(x, mask), _groups(y, mask), strict=True)]
    return sum(s for s, _ in sums) / sum(n for _, n in sums)


@every
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 2, 3)])
def test_equals_numpy_with_and_without_mask(name: str, shape: tuple[int, ...]) -> None:
    build, group = CASES[name]
    x, y = random_pair(shape)
    full = torch.ones(shape[0], 1, *shape[2:], dtype=torch.bool)
    assert build()(x, y).item() == pytest.approx(_expected(group, x, y, full), rel=1e-4)
    mask = torch.rand(full.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    assert 0 < mask.sum() < mask.numel()
    assert build()(x, y, mask).item() == pytest.approx(_expected(group, x, y, mask), rel=1e-4)


@every
def test_gradient_equals_finite_differences_of_numpy(name: str) -> None:
    build, group = CASES[name]
    x, y = random_pair((6, 4), seed=3)
    a, b, step = x.double().numpy(), y.double().numpy(), 1e-5
    expected = np.zeros_like(a)
    for index in np.ndindex(*a.shape):
        up, down = a.copy(), a.copy()
        up[index] += step
        down[index] -= step
        (high, number), (low, _) = group(up, b), group(down, b)
        expected[index] = (high - low) / (2 * step) / number
    x.requires_grad_()
    y.requires_grad_()
    build()(x, y).backward()
    assert x.grad is not None and y.grad is None
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", VANISHING)
def test_is_zero_at_the_target(name: str) -> None:
    for shape in [(9, 7), (2, 5, 4, 4)]:
        x, _ = random_pair(shape)
        assert CASES[name][0]()(x, x).item() == pytest.approx(0, abs=1e-7)


def test_invariances_of_each_loss() -> None:
    x, _ = random_pair((9, 6))
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    assert Gram()(x @ rotation * torch.rand(9, 1), x).item() == pytest.approx(0, abs=1e-10)
    for asymmetric in (True, False):
        assert Relational(asymmetric=asymmetric)(3 * x @ rotation + 1, x).item() == pytest.approx(0, abs=1e-9)
    assert Contrastive()(5 * x, x).item() == pytest.approx(0, abs=1e-6)
    assert Contrastive()(x @ rotation, x).item() > 0.1


def test_arkd_penalises_one_direction_only() -> None:
    """Two pairs, far from each other: the near may come nearer (and, by the mean, the far farther), not the reverse."""

    def pairs_of(spread: float) -> Tensor:
        return torch.tensor([[spread, 0, -8], [-spread, 0, -8], [0, spread, 8], [0, -spread, 8]])

    tighter, looser = pairs_of(0.5), pairs_of(2.0)
    assert Relational()(tighter, pairs_of(1.0)).item() == 0
    assert Relational()(looser, pairs_of(1.0)).item() > 1e-3
    symmetric = Relational(asymmetric=False)
    assert symmetric(looser, pairs_of(1.0)).item() == pytest.approx(Relational()(looser, pairs_of(1.0)).item())
    assert symmetric(tighter, pairs_of(1.0)).item() > 1e-4


def test_infonce_is_the_limit_of_small_teacher_temperature() -> None:
    x, y = random_pair((12, 8))
    cold = Contrastive(teacher_temperature=1e-3)(x, y)
    assert cold.item() == pytest.approx(Contrastive(targets="hard")(x, y).item(), rel=1e-5)


@every
def test_all_masked_is_zero_with_zero_gradient(name: str) -> None:
    for shape in [(3, 4), (2, 3, 4, 4)]:
        x, y = random_pair(shape)
        x.requires_grad_()
        value = CASES[name][0]()(x, y, torch.zeros(shape[0], 1, *shape[2:], dtype=torch.bool))
        value.backward()
        assert value.item() == 0
        assert torch.equal(x.grad, torch.zeros_like(x))


@every
def test_masked_positions_have_no_effect_even_as_nan(name: str) -> None:
    check_masked_positions_have_no_effect(CASES[name][0]())


@every
def test_degenerate_vectors_have_finite_gradients(name: str) -> None:
    zero, e, tiny = torch.zeros(3), torch.tensor([1.0, 2.0, -2.0]), torch.full((3,), 1e-30)
    x = torch.stack([e, e, zero, e, zero, tiny, -e, e])
    y = torch.stack([e, -e, e, zero, zero, e, e, 3 * e])
    for a, b in [(x, y), (x[:1], y[:1]), (x[:2], y[:2]), (torch.ones(4, 3), y[:4]), (y[:4], torch.ones(4, 3))]:
        a = a.clone().requires_grad_()
        value = CASES[name][0]()(a, b)
        value.backward()
        assert math.isfinite(value.item())
        assert a.grad is not None and torch.isfinite(a.grad).all()


@every
def test_losses_are_float32_for_any_input(name: str) -> None:
    loss = CASES[name][0]()
    x, y = random_pair((5, 7))
    assert loss(x.bfloat16(), y.double()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(x, y)
    assert torch.equal(inside, loss(x, y))


@every
def test_shapes_are_checked(name: str) -> None:
    loss = CASES[name][0]()
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="differ"):
        loss(x, torch.zeros(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\)"):
        loss(x, x, torch.ones(2, 4, 4, dtype=torch.bool))


class _Sum(Relation):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def relate(self, x: Tensor, y: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(2), valid


def _taken(target: Tensor, positions: int, mask: Tensor | None = None) -> Tensor:
    """The positions that a call compares: those with a gradient."""
    x = torch.zeros_like(target, requires_grad=True)
    _Sum(positions)(x, target, mask).backward()
    assert x.grad is not None
    return x.grad[:, 0].flatten(1) != 0


def test_large_maps_are_sampled_the_same_way_every_call() -> None:
    _, y = random_pair((3, 2, 12, 13))
    first = _taken(y, 40)
    assert torch.equal(first.sum(1), torch.full((3,), 40))
    assert torch.equal(first[0], first[1]) and torch.equal(first, _taken(y, 40))
    state = torch.random.get_rng_state()
    assert not torch.equal(first, _taken(y + 1, 40))
    assert torch.equal(state, torch.random.get_rng_state())
    assert _taken(y, 156).all()
    mask = torch.rand(3, 1, 12, 13) > 0.5
    spoiled = torch.where(mask, y, float("nan"))
    assert torch.equal(_taken(torch.where(mask, y, 0.0), 40, mask), _taken(spoiled, 40, mask))
    # Over many batches all positions are sampled about equally often.
    share = torch.stack([_taken(torch.randn(1, 1, 12, 13), 40)[0] for _ in range(300)]).float().mean(0)
    assert share.min() > 0.12 and share.max() < 0.42


@every
def test_sampled_maps_agree_with_their_part(name: str) -> None:
    """A map of 6 x 6 of which 10 positions are taken gives what these positions give alone."""
    x, y = random_pair((2, 4, 6, 6))
    loss = CASES[name][0]()
    loss.tokens = 10
    taken = _taken(y, 10)[0]
    part = [t.flatten(2)[:, :, taken].unflatten(2, (2, 5)) for t in (x, y)]
    torch.testing.assert_close(loss(x, y), loss(*part))


def test_am_radio_is_the_weighted_sum() -> None:
    x, y = random_pair((3, 4, 2, 5))
    a, b = x.double().numpy(), y.double().numpy()
    cosine = 1 - (_unit(np.moveaxis(a, 1, -1)) * _unit(np.moveaxis(b, 1, -1))).sum(-1)
    d = np.abs(a - b)

    def expected(alpha: float, beta: float, huber: float) -> Array:
        return alpha * cosine + beta * np.where(d < huber, d * d / (2 * huber), d - huber / 2).mean(1)

    assert AMRadio()(x, y).item() == pytest.approx(expected(0.9, 0.1, 1).mean(), rel=1e-5)
    other = AMRadio(alpha=0.3, beta=2.0, huber=2.0)
    mask = torch.rand(3, 1, 2, 5) > 0.4
    assert other(x, y, mask).item() == pytest.approx(expected(0.3, 2, 2)[mask[:, 0].numpy()].mean(), rel=1e-5)
    assert AMRadio()(x, x).item() == 0
    assert AMRadio(beta=0)(3 * x, x).item() == pytest.approx(0, abs=1e-6)
    assert AMRadio()(3 * x, x).item() > 0.1


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: AMRadio(alpha=-1), "alpha"),
        (lambda: AMRadio(alpha=0, beta=0), "both 0; at least one must be positive"),
        (lambda: AMRadio(huber=float("nan")), "huber"),
        (lambda: Relational(beta=-1), "beta"),
        (lambda: Relational(tokens=1), "tokens"),
        (lambda: Gram(tokens=0), "tokens"),
        (lambda: Contrastive(temperature=0), "temperature"),
        (lambda: Contrastive(teacher_temperature=-1), "teacher_temperature"),
    ],
)
def test_bad_options_are_refused(build: Callable[[], Loss], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        build()
