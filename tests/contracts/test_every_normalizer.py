"""Every kind of normalizer keeps the contract."""

import pytest
import torch

from agglo.config import build, kinds
from agglo.heads.mlp import Mlp
from agglo.normalizers.base import Normalizer
from support.shapes import denormalize, normalize


def made(kind: str) -> Normalizer:
    return build("normalizers", {"kind": kind}, 12)


@pytest.fixture(params=kinds("normalizers", installed=False))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator) * torch.logspace(-1, 1, 12)
    return torch.einsum("cd,bdhw->bchw", mixing, torch.randn(6, 12, 5, 5, generator=generator)) + 3


def fitted(kind: str, features: torch.Tensor) -> Normalizer:
    normalizer = made(kind)
    if normalizer.needs_statistics:
        normalizer.update(features)
        normalizer.freeze()
    return normalizer


def test_inverse_undoes_forward(kind: str, features: torch.Tensor) -> None:
    normalizer = fitted(kind, features)
    torch.testing.assert_close(denormalize(normalizer, normalize(normalizer, features)), features, rtol=1e-3, atol=1e-3)


def test_folding_into_a_head_equals_the_inverse(kind: str, features: torch.Tensor) -> None:
    normalizer, head = fitted(kind, features), Mlp(7, 12, hidden=16).eval()
    x = torch.randn(2, 7, 3, 3)
    expected = normalizer.inverse(head(x))
    head.fold(normalizer.unwhiten, normalizer.mean)
    torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-4)


def test_normalizer_is_fitted_exactly_once(kind: str, features: torch.Tensor) -> None:
    normalizer = made(kind)
    if not normalizer.needs_statistics:
        assert torch.equal(normalizer(features), features)
        return
    with pytest.raises(RuntimeError):
        normalizer(features)
    with pytest.raises(RuntimeError):
        normalizer.freeze()
    normalizer.update(features)
    normalizer.freeze()
    with pytest.raises(RuntimeError):
        normalizer.freeze()


def test_state_round_trips(kind: str, features: torch.Tensor) -> None:
    normalizer, other = fitted(kind, features), made(kind)
    other.load_state_dict(normalizer.state_dict())
    assert torch.equal(other(features), normalizer(features))


def test_masked_positions_are_ignored(kind: str, features: torch.Tensor) -> None:
    normalizer = made(kind)
    if not normalizer.needs_statistics:
        assert torch.equal(normalizer(features), features)  # nothing is gathered, so there is nothing to mask
        return
    mask = torch.rand(6, 1, 5, 5, generator=torch.Generator().manual_seed(1)) > 0.3
    spoiled, other = torch.where(mask, features, torch.full_like(features, 1e4)), made(kind)
    normalizer.update(spoiled, mask)
    other.update(features, mask)
    normalizer.freeze()
    other.freeze()
    torch.testing.assert_close(normalizer(features), other(features), rtol=1e-4, atol=1e-4)
