"""Every kind of student keeps the contract; a new file is picked up by its name."""

import pytest
import torch

from agglo.config import build, kinds
from agglo.students.base import Student
from support.shapes import encode

TINY = {
    "vit": {"width": 32, "depth": 2, "heads": 2, "max_grid": 8},
    "timm": {"model": "test_efficientnet", "stages": [2, 3]},
}
TEACHERS = ("one", "two", "three")


@pytest.fixture(params=kinds("students", installed=False))
def student(request: pytest.FixtureRequest) -> Student:
    torch.manual_seed(0)
    return build("students", {"kind": request.param, **TINY.get(request.param, {})}, TEACHERS).eval()


def test_features_match_the_spec_at_any_legal_size(student: Student) -> None:
    step, stride = student.spec.step, student.spec.stride
    for height, width in [(step * 2, step * 2), (step * 3, step * 2), (step * 2, step * 5)]:
        summary, spatial = encode(student, torch.rand(2, 3, height, width))
        assert summary.shape == (2, student.spec.summary)
        assert spatial.shape == (2, student.spec.spatial, height // stride, width // stride)
        assert torch.isfinite(summary).all()
        assert torch.isfinite(spatial).all()
    assert student.spec.slots in (1, len(TEACHERS))
    assert student.spec.summary % student.spec.slots == 0


def test_illegal_size_names_the_nearest_legal_ones(student: Student) -> None:
    step = student.spec.step
    with pytest.raises(ValueError, match=rf"{2 * step}\D.*{3 * step}|{3 * step}\D.*{2 * step}"):
        student(torch.rand(1, 3, 2 * step + 1, 2 * step))


def test_images_are_independent_in_eval_mode(student: Student) -> None:
    images = torch.rand(3, 3, 2 * student.spec.step, 2 * student.spec.step)
    alone, together = student(images[:1]), student(images)
    torch.testing.assert_close(alone.summary, together.summary[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.spatial, together.spatial[:1], rtol=1e-4, atol=1e-5)


def test_both_outputs_reach_trainable_parameters(student: Student) -> None:
    student.train()
    images = torch.rand(4, 3, 2 * student.spec.step, 2 * student.spec.step)
    out = student(images)
    for tensor in (out.summary, out.spatial):
        grads = torch.autograd.grad(
            tensor.square().sum(), list(student.parameters()), retain_graph=True, allow_unused=True
        )
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_weights_round_trip(student: Student) -> None:
    torch.manual_seed(1)
    kind = next(k for k in kinds("students", installed=False) if type(student).__module__.endswith(k))
    other = build("students", {"kind": kind, **TINY.get(kind, {})}, TEACHERS).eval()
    other.load_state_dict(student.state_dict())
    images = torch.rand(1, 3, 2 * student.spec.step, 2 * student.spec.step)
    assert torch.equal(other(images).spatial, student(images).spatial)


def test_names_excluded_from_weight_decay_exist(student: Student) -> None:
    assert student.no_weight_decay() <= {name for name, _ in student.named_parameters()}
