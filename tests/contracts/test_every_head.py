"""Every kind of head keeps the contract."""

import pytest
import torch

from agglo.config import build, kinds
from agglo.heads.base import Head


@pytest.fixture(params=kinds("heads", installed=False))
def head(request: pytest.FixtureRequest) -> Head:
    torch.manual_seed(0)
    made = build("heads", {"kind": request.param}, 24, 10).eval()
    for buffer in made.buffers():
        buffer.normal_()
    return made


def test_a_map_is_projected_position_by_position(head: Head) -> None:
    x = torch.randn(2, 24, 3, 5)
    out = head(x)
    assert out.shape == (2, 10, 3, 5)
    torch.testing.assert_close(out[:, :, 1, 4], head(x[:, :, 1, 4]), rtol=1e-4, atol=1e-5)
    assert (head.source, head.target) == (24, 10)


def test_fold_is_the_denormalizer_or_a_refusal(head: Head) -> None:
    x, matrix, mean = torch.randn(4, 24), torch.randn(10, 10), torch.randn(10)
    before = head(x)
    try:
        head.fold(matrix, mean)
    except ValueError:
        torch.testing.assert_close(head(x), before)  # refused, and nothing lost
    else:
        torch.testing.assert_close(head(x), before @ matrix.T + mean, rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_parameter(head: Head) -> None:
    head(torch.randn(8, 24)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
