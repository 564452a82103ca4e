"""The fixed balancer: the weighted sum, its gradient, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from agglo.balancers.fixed import Fixed

WEIGHTS = {"dino/summary": 1.0, "dino/spatial": 0.5, "sam/summary": 0.0}


def test_weighted_sum_and_gradient() -> None:
    terms = {name: torch.tensor(float(k + 2), requires_grad=True) for k, name in enumerate(WEIGHTS)}
    total = Fixed(WEIGHTS)(terms)
    total.backward()
    assert total.item() == 1.0 * 2 + 0.5 * 3
    assert terms["dino/summary"].grad == 1.0 and terms["dino/spatial"].grad == 0.5
    assert terms["sam/summary"].grad is None


def test_a_term_of_weight_zero_may_be_nan() -> None:
    total = Fixed(WEIGHTS)({"dino/spatial": torch.tensor(4.0), "sam/summary": torch.tensor(float("nan"))})
    assert total.item() == 2.0


def test_a_step_without_weighed_terms_is_zero_and_can_go_backward() -> None:
    total = Fixed(WEIGHTS)({"sam/summary": torch.tensor(float("nan"), requires_grad=True)})
    total.backward()
    assert total.item() == 0


def test_weights_are_copied() -> None:
    weights = dict(WEIGHTS)
    balancer = Fixed(weights)
    weights["dino/summary"] = 100.0
    assert balancer({"dino/summary": torch.tensor(2.0)}).item() == 2.0


def test_unknown_terms_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(KeyError, match="did you mean 'dino/spatial'"):
        Fixed(WEIGHTS)({"dino/spatal": torch.tensor(1.0)})
    with pytest.raises(KeyError, match="announced are"):
        Fixed(WEIGHTS)({"zzz": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="no loss terms"):
        Fixed(WEIGHTS)({})


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_bad_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="a/spatial"):
        Fixed({"a/spatial": weight, "b/spatial": 1.0})


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to learn"):
        Fixed({"a/spatial": 0.0})
