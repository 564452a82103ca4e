"""Every kind of loss keeps the contract."""

import pytest
import torch

from agglo.config import build, kinds
from agglo.losses.base import Loss
from support.shapes import measure, measure_by_image


@pytest.fixture(params=kinds("losses", installed=False))
def loss(request: pytest.FixtureRequest) -> Loss:
    made = build("losses", {"kind": request.param})
    made.fit(torch.randn(256, 6, generator=torch.Generator().manual_seed(3)))
    return made


def test_loss_is_zero_at_the_target_and_positive_elsewhere(loss: Loss) -> None:
    target = torch.randn(3, 6, 4, 4)
    assert float(loss(target.clone(), target)) == pytest.approx(0, abs=1e-5)
    assert float(loss(target + torch.randn_like(target), target)) > 1e-3


def test_loss_is_a_float32_scalar(loss: Loss) -> None:
    for shape in [(3, 6), (3, 6, 4, 5)]:
        value = measure(loss, torch.randn(shape).bfloat16(), torch.randn(shape))
        assert value.shape == ()
        assert value.dtype == torch.float32


def test_only_the_prediction_gets_a_gradient(loss: Loss) -> None:
    # Eight: the distances of three samples may all differ from the teacher's in the direction ARKD leaves free.
    prediction, target = torch.randn(8, 6, requires_grad=True), torch.randn(8, 6, requires_grad=True)
    loss(prediction, target).backward()
    assert torch.isfinite(prediction.grad).all()
    assert prediction.grad.abs().sum() > 0
    assert target.grad is None


def test_masked_positions_are_ignored(loss: Loss) -> None:
    prediction, target = torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4)
    mask = torch.rand(2, 1, 4, 4) > 0.5
    spoiled = torch.where(mask, prediction, torch.full_like(prediction, 1e3))
    torch.testing.assert_close(loss(spoiled, target, mask), loss(prediction, target, mask))
    assert float(loss(prediction, target, torch.zeros_like(mask))) == 0


def test_different_shapes_raise(loss: Loss) -> None:
    with pytest.raises(ValueError, match="shape"):
        loss(torch.randn(2, 6, 4, 4), torch.randn(2, 6, 2, 2))


def test_zero_vectors_have_finite_gradients(loss: Loss) -> None:
    prediction = torch.zeros(2, 6, requires_grad=True)
    loss(prediction, torch.zeros(2, 6)).backward()
    assert torch.isfinite(prediction.grad).all()


def test_by_image_equals_the_loss_of_each_image(loss: Loss) -> None:
    generator = torch.Generator().manual_seed(5)
    prediction, target = (torch.randn(4, 6, 3, 4, generator=generator) for _ in range(2))
    mask = torch.rand(4, 1, 3, 4, generator=generator) > 0.3
    mask[3] = False
    for given in (None, mask):
        values = measure_by_image(loss, prediction, target, given)
        assert values.shape == (4,)
        assert values.dtype == torch.float32
        for row in range(4):
            alone = slice(row, row + 1)
            expected = loss(prediction[alone], target[alone], None if given is None else given[alone])
            torch.testing.assert_close(values[row], expected)
    assert values[3] == 0  # nothing of it counts


def test_by_image_averages_to_the_loss_without_a_mask(loss: Loss) -> None:
    for shape in [(5, 6), (5, 6, 3, 4)]:
        prediction, target = torch.randn(shape), torch.randn(shape)
        torch.testing.assert_close(loss.by_image(prediction, target).mean(), loss(prediction, target))


def test_by_image_agrees_with_the_default_implementation(loss: Loss) -> None:
    prediction, target = torch.randn(3, 6, 4, 4), torch.randn(3, 6, 4, 4)
    mask = torch.rand(3, 1, 4, 4) > 0.3
    torch.testing.assert_close(loss.by_image(prediction, target, mask), Loss.by_image(loss, prediction, target, mask))
