"""Every kind of head keeps the contract."""

import pytest
import torch
from torch import Tensor

from agglo.config import build, kinds
from agglo.heads.base import Head
from agglo.types import ConfigError
from support.shapes import project

SOURCE, TARGET = 32, 10
MAPS_ONLY = {"attention"}
"""Kinds that mix positions: they take maps only and raise for single vectors."""


@pytest.fixture(params=kinds("heads", installed=False))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def head(kind: str) -> Head:
    made = build("heads", {"kind": kind}, SOURCE, TARGET).eval()
    for buffer in made.buffers():
        buffer.normal_()
    return made


@pytest.fixture
def x(kind: str) -> Tensor:
    """Legal input: vectors, or maps for the kinds that need them."""
    return torch.randn(2, SOURCE, 2, 3) if kind in MAPS_ONLY else torch.randn(8, SOURCE)


def test_head_keeps_the_grid(kind: str, head: Head) -> None:
    x = torch.randn(2, SOURCE, 3, 5)
    out = project(head, x)
    assert out.shape == (2, TARGET, 3, 5)
    assert (head.source, head.target) == (SOURCE, TARGET)
    if kind in MAPS_ONLY:
        with pytest.raises(ConfigError, match="maps"):
            head(x[:, :, 1, 4])
        torch.testing.assert_close(out[1:], head(x[1:]), rtol=1e-4, atol=1e-5)  # images are independent
    else:
        torch.testing.assert_close(out[:, :, 1, 4], project(head, x[:, :, 1, 4]), rtol=1e-4, atol=1e-5)


def test_fold_applies_the_denormalizer_or_raises(head: Head, x: Tensor) -> None:
    matrix, mean = torch.randn(TARGET, TARGET), torch.randn(TARGET)
    before = head(x)
    try:
        head.fold(matrix, mean)
    except ValueError:
        torch.testing.assert_close(head(x), before)  # unchanged
    else:
        expected = (before.movedim(1, -1) @ matrix.T + mean).movedim(-1, 1)
        torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_parameter(head: Head, x: Tensor) -> None:
    head(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
