"""The balancers: closed forms, gradients, what they remember, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from agglo.balancers._weights import Weighted
from agglo.balancers.adaloss import AdaLoss
from agglo.balancers.dwa import Dwa
from agglo.balancers.fixed import Fixed
from agglo.balancers.schedule import Schedule
from agglo.balancers.teacher_drop import TeacherDrop
from agglo.balancers.uncertainty import Uncertainty
from agglo.config import build
from agglo.types import ConfigError

WEIGHTS = {"dino/summary": 1.0, "dino/spatial": 0.5, "sam/summary": 0.0}
KINDS: list[tuple[type[Weighted], dict[str, Any]]] = [
    (Fixed, {}),
    (AdaLoss, {}),
    (Uncertainty, {}),
    (Dwa, {"every": 2}),
    (TeacherDrop, {}),
    (Schedule, {"points": {"dino": [(0.0, 1.0)]}}),
]


def scalars(**values: float) -> dict[str, Tensor]:
    """``a_b=1`` is the term ``a/b``."""
    return {name.replace("_", "/"): torch.tensor(float(value)) for name, value in values.items()}


def test_weighted_sum_and_gradient() -> None:
    terms = {name: torch.tensor(float(k + 2), requires_grad=True) for k, name in enumerate(WEIGHTS)}
    total = Fixed(WEIGHTS)(terms)
    total.backward()
    assert total.item() == 1.0 * 2 + 0.5 * 3
    assert terms["dino/summary"].grad == 1.0 and terms["dino/spatial"].grad == 0.5
    assert terms["sam/summary"].grad is None


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_term_of_weight_zero_may_be_nan(kind: type[Weighted], options: dict[str, Any]) -> None:
    balancer = kind(WEIGHTS, **options)
    expected = 2.0 + (0.5 * math.log(2) if kind is Uncertainty else 0)
    for step in range(4):
        total = balancer({"dino/spatial": torch.tensor(4.0), "sam/summary": torch.tensor(float("nan"))}, step=step)
        assert total.item() == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_step_without_active_terms_is_zero_and_differentiable(kind: type[Weighted], options: dict[str, Any]) -> None:
    total = kind(WEIGHTS, **options)({"sam/summary": torch.tensor(float("nan"), requires_grad=True)})
    total.backward()
    assert total.item() == 0


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_non_finite_values_do_not_change_the_state(kind: type[Weighted], options: dict[str, Any]) -> None:
    weights = {"dino/summary": 1.0, "dino/spatial": 0.5}
    balancer = kind(weights, **options)
    for step in range(3):
        balancer(scalars(dino_summary=1 + step, dino_spatial=2), step=step)
    before = {name: value.clone() for name, value in balancer.state_dict().items()}
    total = balancer(scalars(dino_summary=float("nan"), dino_spatial=float("inf")), step=3)
    assert not bool(total.isfinite())  # the loop sees it and skips the step
    for name, value in balancer.state_dict().items():
        assert bool(value.isfinite().all()), name
        assert name != "average" or torch.equal(value, before[name])
    assert bool(balancer(scalars(dino_summary=1, dino_spatial=2), step=4).isfinite())


def test_weights_are_copied() -> None:
    weights = dict(WEIGHTS)
    balancer = Fixed(weights)
    weights["dino/summary"] = 100.0
    assert balancer({"dino/summary": torch.tensor(2.0)}).item() == 2.0


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_unknown_terms_are_refused_with_the_nearest_name(kind: type[Weighted], options: dict[str, Any]) -> None:
    balancer = kind(WEIGHTS, **options)
    with pytest.raises(KeyError, match="did you mean 'dino/spatial'"):
        balancer({"dino/spatal": torch.tensor(1.0)})
    with pytest.raises(KeyError, match="known are"):
        balancer({"zzz": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="no loss terms"):
        balancer({})


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_bad_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="a/spatial"):
        Fixed({"a/spatial": weight, "b/spatial": 1.0})


def test_all_zero_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="all loss weights are 0"):
        Fixed({"a/spatial": 0.0})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("adaloss", {"momentum": 1.0}, "momentum"),
        ("adaloss", {"clip": [2, 5]}, "clip"),
        ("dwa", {"every": 0}, "every"),
        ("dwa", {"temperature": 0}, "temperature"),
        ("teacher_drop", {"p": 1.1}, "p must"),
        ("teacher_drop", {"seed": -1}, "seed"),
        ("schedule", {}, "points: missing"),
        ("schedule", {"points": {"dinno": [[0, 1]]}}, "did you mean 'dino'"),
        ("schedule", {"points": {"dino": []}}, "no points"),
        ("schedule", {"points": {"dino": [[0.5, 1], [0.2, 1]]}}, "in order"),
        ("schedule", {"points": {"dino": [[0, -1]]}}, "factor"),
        ("schedule", {"points": {"dino": [[5000, 1]]}}, "progress"),
    ],
)
def test_bad_keys_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("balancers", {"kind": kind, **options}, WEIGHTS)


# --- adaloss ----------------------------------------------------------------------------------------------------------


def test_adaloss_is_the_inverse_of_the_average_and_sums_to_the_number_of_terms() -> None:
    balancer = AdaLoss({"a/summary": 1.0, "b/summary": 3.0}, momentum=0.9)
    balancer(scalars(a_summary=1, b_summary=2))
    total = balancer(scalars(a_summary=2, b_summary=2))
    average = torch.tensor([0.9 * 1 + 0.1 * 2, 2.0])
    torch.testing.assert_close(balancer.average, average)
    expected = 2 * (1 / average) / (1 / average).sum()
    torch.testing.assert_close(balancer.factors(), expected)
    torch.testing.assert_close(total, expected[0] * 2 + 3 * expected[1] * 2)


def test_adaloss_is_detached_and_clipped() -> None:
    balancer = AdaLoss({f"{t}/summary": 1.0 for t in "abcdefgh"})
    terms = {name: torch.tensor(1e-6 if name[0] == "a" else 1.0, requires_grad=True) for name in balancer.names}
    balancer(terms).backward()
    assert terms["a/summary"].grad == 5.0
    assert terms["b/summary"].grad == torch.tensor(0.2)


def test_adaloss_keeps_the_averages_of_absent_terms() -> None:
    balancer = AdaLoss({"a/summary": 1.0, "b/summary": 1.0})
    assert balancer(scalars(a_summary=7)).item() == 7  # alone it is worth itself
    assert torch.equal(balancer.average, torch.tensor([7.0, 0.0]))
    balancer.eval()
    balancer(scalars(a_summary=100, b_summary=100))
    assert torch.equal(balancer.average, torch.tensor([7.0, 0.0]))


# --- uncertainty ------------------------------------------------------------------------------------------------------


def test_uncertainty_starts_at_one_and_has_its_closed_optimum() -> None:
    weights = {"a/summary": 1.0, "b/summary": 4.0}
    balancer = Uncertainty(weights)
    assert [p.shape for p in balancer.parameters()] == [(2,)]
    terms = scalars(a_summary=0.3, b_summary=9)
    assert balancer(terms).item() == pytest.approx(0.3 + 4 * 9 + 5 * math.log(2))
    loss = torch.tensor([0.3, 9.0])
    best = (-loss + (loss**2 + 4 * loss).sqrt()) / (2 * loss)  # L λ² + L λ = 1
    with torch.no_grad():
        balancer.log_variance.copy_(-best.log())
    balancer(terms).backward()
    torch.testing.assert_close(balancer.log_variance.grad, torch.zeros(2), atol=1e-6, rtol=0)


def test_uncertainty_ignores_absent_terms() -> None:
    balancer = Uncertainty({"a/summary": 1.0, "b/summary": 1.0})
    balancer(scalars(b_summary=2)).backward()
    assert balancer.log_variance.grad is not None
    torch.testing.assert_close(balancer.log_variance.grad, torch.tensor([0.0, 0.5 - 2.0]))


# --- dwa --------------------------------------------------------------------------------------------------------------


def test_dwa_follows_the_ratio_of_two_windows() -> None:
    balancer = Dwa({"a/summary": 1.0, "b/summary": 1.0, "mesa": 2.0}, every=2)
    a, b = [4, 2, 1, 2], [1, 1, 2, 2]
    for step in range(4):
        terms = scalars(a_summary=a[step], b_summary=b[step])
        if step == 2:
            terms["mesa"] = torch.tensor(1.0)  # in one window only: its ratio is 1
        assert balancer(terms, step=step).item() == pytest.approx(a[step] + b[step] + (2 if step == 2 else 0))
    total = balancer(scalars(a_summary=9, b_summary=9), step=4)
    ratio = torch.tensor([1.5 / 3, 2 / 1, 1.0])
    expected = 3 * torch.softmax(ratio / 2, 0)
    torch.testing.assert_close(balancer.factors(), expected)
    torch.testing.assert_close(total, 9 * (expected[0] + expected[1]))


def test_dwa_resumes_in_the_middle_of_a_window() -> None:
    def terms(step: int) -> dict[str, Tensor]:
        return scalars(a_summary=1 / (step + 1), b_summary=2 + step % 3)

    straight, resumed = Dwa({"a/summary": 1.0, "b/summary": 1.0}, every=3), None
    for step in range(14):
        if step == 7:
            resumed = Dwa({"a/summary": 1.0, "b/summary": 1.0}, every=3)
            resumed.load_state_dict({k: v.clone() for k, v in straight.state_dict().items()})
        total = straight(terms(step), step=step)
        if resumed is not None:
            assert torch.equal(resumed(terms(step), step=step), total)
    assert straight.factors().max() > 1.01


# --- teacher_drop -----------------------------------------------------------------------------------------------------


def drop(p: float, **weights: float) -> TeacherDrop:
    return TeacherDrop({name.replace("_", "/"): weight for name, weight in weights.items()}, p=p)


def test_teacher_drop_keeps_the_worst_teacher_of_each_image() -> None:
    balancer = drop(1.0, a_summary=1, a_spatial=3, b_spatial=1, mesa=1)
    rows = {
        "a/summary": torch.tensor([1.0, 9.0, 1.0]),
        "a/spatial": torch.tensor([1.0, 1.0, 5.0]),  # a scores 1, 3, 4
        "b/spatial": torch.tensor([2.0, 2.0, float("nan")]),  # b scores 2, 2, never the worst
    }
    rows = {name: row.requires_grad_() for name, row in rows.items()}
    terms = {name: row.mean() for name, row in rows.items()} | {"mesa": torch.tensor(0.5)}
    total = balancer(terms, per_image=rows)
    a = 2 * (9 + 1 + 3 * (1 + 5)) / 3
    b = 2 * 2 / 3
    assert total.item() == pytest.approx(a + b + 0.5)
    total.backward()
    torch.testing.assert_close(rows["a/summary"].grad, torch.tensor([0.0, 2 / 3, 2 / 3]))
    torch.testing.assert_close(rows["b/spatial"].grad, torch.tensor([2 / 3, 0.0, 0.0]))


def test_teacher_drop_without_per_image_draws_once_per_batch() -> None:
    balancer = drop(1.0, a_summary=1, b_summary=1, c_summary=2)
    assert balancer(scalars(a_summary=1, b_summary=3, c_summary=2)).item() == 3 * 3
    assert balancer(scalars(a_summary=4)).item() == 4  # without other terms its factor is 1
    balancer.eval()
    assert balancer(scalars(a_summary=1, b_summary=3, c_summary=2)).item() == 8


def test_teacher_drop_with_p_zero_equals_fixed() -> None:
    rows = {f"{t}/summary": torch.rand(6) for t in "abc"}
    terms = {name: row.mean() for name, row in rows.items()}
    weights = {"a/summary": 1.0, "b/summary": 2.0, "c/summary": 0.5}
    torch.testing.assert_close(TeacherDrop(weights, p=0.0)(terms, per_image=rows), Fixed(weights)(terms))


def test_teacher_drop_draws_depend_on_seed_and_step_alone() -> None:
    rows = {f"{t}/summary": torch.rand(64) for t in "abc"}
    terms = {name: row.mean() for name, row in rows.items()}
    weights = dict.fromkeys(rows, 1.0)
    one, two, other = TeacherDrop(weights), TeacherDrop(weights), TeacherDrop(weights, seed=1)
    first = one(terms, step=5, per_image=rows)
    torch.manual_seed(3)
    torch.rand(10)
    assert torch.equal(two(terms, step=5, per_image=dict(reversed(rows.items()))), first)
    assert not torch.equal(one(terms, step=6, per_image=rows), first)
    assert not torch.equal(other(terms, step=5, per_image=rows), first)


def test_teacher_drop_has_rate_p_and_equal_image_weights() -> None:
    balancer = TeacherDrop({"a/summary": 1.0, "b/summary": 1.0, "c/summary": 1.0}, p=0.3)
    rows = {f"{t}/summary": torch.full((4000,), 1.0 + (t == "b"), requires_grad=True) for t in "abc"}
    balancer({name: row.mean() for name, row in rows.items()}, per_image=rows).backward()
    grads = {name: row.grad * 4000 for name, row in rows.items() if row.grad is not None}
    assert (grads["a/summary"] > 0).float().mean().item() == pytest.approx(0.7, abs=0.03)
    both = (grads["a/summary"] > 0) & (grads["c/summary"] > 0)
    assert both.float().mean().item() == pytest.approx(0.49, abs=0.03)  # each on its own
    assert bool((grads["b/summary"] > 0).all())
    torch.testing.assert_close(sum(grads.values()), torch.full((4000,), 3.0))


def test_teacher_drop_needs_all_terms_per_image_or_none() -> None:
    balancer = drop(0.5, a_summary=1, b_summary=1)
    terms = scalars(a_summary=1, b_summary=3)
    with pytest.raises(ValueError, match="per_image lacks b/summary"):
        balancer(terms, per_image={"a/summary": torch.ones(2)})
    with pytest.raises(ValueError, match=r"must be \(B,\)"):
        balancer(terms, per_image={"a/summary": torch.ones(2), "b/summary": torch.ones(3)})


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_schedule_is_piecewise_linear() -> None:
    balancer = Schedule({"a/summary": 2.0}, points={"a": [(0.25, 1.0), (0.5, 3.0), (0.5, 0.0), (1.0, 1.0)]})
    at = [0.0, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5]
    assert [balancer.factors(progress)["a/summary"] for progress in at] == [1, 1, 2, 0, 0.5, 1, 1]
    # Step 0 has progress 0, the last step 1.
    assert balancer(scalars(a_summary=5), step=0, total=5).item() == 10
    assert balancer(scalars(a_summary=5), step=3, total=5).item() == 5
    assert balancer(scalars(a_summary=5), step=4, total=5).item() == 10
    assert balancer(scalars(a_summary=5)).item() == 10


def test_schedule_omits_terms_with_factor_zero() -> None:
    balancer = Schedule({"sam/spatial": 1.0, "dino/spatial": 1.0}, points={"sam": [(0.0, 0.0), (1.0, 1.0)]})
    assert balancer(scalars(sam_spatial=float("nan"), dino_spatial=3), total=10).item() == 3
    alone = balancer({"sam/spatial": torch.tensor(float("nan"), requires_grad=True)}, total=10)
    alone.backward()
    assert alone.item() == 0


def test_schedule_uses_the_most_specific_key() -> None:
    weights = {"a/summary": 1.0, "a/spatial": 1.0, "b/spatial": 1.0, "mesa": 1.0}
    points = {"*/spatial": [(0.0, 2.0)], "a": [(0.0, 3.0)], "a/summary": [(0.0, 4.0)], "*": [(0.0, 5.0)]}
    expected = {"a/summary": 4.0, "a/spatial": 3.0, "b/spatial": 2.0, "mesa": 5.0}
    assert Schedule(weights, points=points).factors(0.0) == expected
    assert Schedule(weights, points={"mesa": [(0.0, 0.5)]}).factors(1.0)["b/spatial"] == 1.0


@pytest.mark.parametrize("kind", ["fixed", "adaloss", "dwa", "uncertainty", "teacher_drop"])
def test_a_share_is_applied_after_balancing(kind: str) -> None:
    """Doubling a term's share doubles its gradient, whatever the balancer makes of the term."""
    slopes = []
    for share in (0.01, 0.02, 1.0):
        balancer = build("balancers", {"kind": kind}, {"a/spatial": 1.0, "mesa": 1.0})
        for step in range(3):
            term = torch.tensor(2.0, requires_grad=True)
            total = balancer({"a/spatial": torch.tensor(3.0), "mesa": term}, step=step, total=9, shares={"mesa": share})
        total.backward()
        slopes.append(float(term.grad))
    assert slopes[1] == pytest.approx(2 * slopes[0])
    assert slopes[2] == pytest.approx(100 * slopes[0])
