"""The shape checks of the contract tests reject each wrong dimension."""

import pytest
import torch
from beartype.roar import BeartypeException
from jaxtyping import TypeCheckError

from agglo.heads.base import Head
from agglo.losses.base import Loss
from agglo.normalizers.identity import Identity
from agglo.students.base import Student
from agglo.teachers.base import Teacher
from agglo.text.base import TextTower
from agglo.types import Features, FeatureSpec
from support import shapes

SPEC = FeatureSpec(summary=8, spatial=6, stride=16, step=16)
WRONG = (TypeCheckError, BeartypeException)


def fake(contract: type, result: object, **attributes: object) -> object:
    """An instance of ``contract`` whose every call returns ``result``."""

    def forward(self: object, *_: object, **__: object) -> object:
        return result

    methods = dict.fromkeys(("forward", "by_image", "inverse", "encode", *contract.__abstractmethods__), forward)
    made = type("Fake", (contract,), methods).__new__(type("Fake", (contract,), methods))
    torch.nn.Module.__init__(made)
    for name, value in attributes.items():
        object.__setattr__(made, name, value)
    return made


IMAGES = torch.rand(2, 3, 64, 32)
RIGHT = Features(torch.rand(2, 8), torch.rand(2, 6, 4, 2))
FEATURES = {
    "batch of the summary": Features(torch.rand(1, 8), RIGHT.spatial),
    "width of the summary": Features(torch.rand(2, 7), RIGHT.spatial),
    "channels": Features(RIGHT.summary, torch.rand(2, 5, 4, 2)),
    "transposed grid": Features(RIGHT.summary, torch.rand(2, 6, 2, 4)),
    "tokens instead of a map": Features(RIGHT.summary, torch.rand(2, 8, 6)),
    "integers": Features(RIGHT.summary, torch.ones(2, 6, 4, 2, dtype=torch.long)),
}


@pytest.mark.parametrize(("contract", "call"), [(Student, shapes.encode), (Teacher, shapes.teach)])
@pytest.mark.parametrize("wrong", FEATURES)
def test_wrong_features_are_rejected(contract: type, call, wrong: str) -> None:
    call(fake(contract, RIGHT, spec=SPEC), IMAGES)
    with pytest.raises(WRONG):
        call(fake(contract, FEATURES[wrong], spec=SPEC), IMAGES)


def test_a_teacher_without_summary_must_say_so_in_its_spec() -> None:
    with pytest.raises(AssertionError, match="summary and spec disagree"):
        shapes.teach(fake(Teacher, Features(None, RIGHT.spatial), spec=SPEC), IMAGES)


@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (2, 6, 4), (1, 6, 4, 2), (2, 5, 4, 2)])
def test_wrong_projections_are_rejected(shape: tuple[int, ...]) -> None:
    x = torch.rand(2, 7, 4, 2)
    shapes.project(fake(Head, torch.rand(2, 6, 4, 2), source=7, target=6), x)
    with pytest.raises(WRONG):
        shapes.project(fake(Head, torch.rand(shape), source=7, target=6), x)


def test_wrong_losses_are_rejected() -> None:
    pair = torch.rand(2, 6, 4, 2), torch.rand(2, 6, 4, 2)
    shapes.measure(fake(Loss, torch.tensor(1.0)), *pair)
    shapes.measure_by_image(fake(Loss, torch.rand(2)), *pair)
    for wrong in (torch.rand(2), torch.rand(1), torch.tensor(1.0, dtype=torch.bfloat16)):
        with pytest.raises(WRONG):
            shapes.measure(fake(Loss, wrong), *pair)
    for wrong in (torch.tensor(1.0), torch.rand(6), torch.rand(2, 1)):
        with pytest.raises(WRONG):
            shapes.measure_by_image(fake(Loss, wrong), *pair)
    with pytest.raises(WRONG):  # the arguments share their sizes too
        shapes.measure(fake(Loss, torch.tensor(1.0)), torch.rand(2, 6, 4, 2), torch.rand(2, 6, 2, 4))


def test_wrong_targets_are_rejected() -> None:
    features = torch.rand(2, 6, 4, 2)
    shapes.normalize(Identity(6), features)
    for call in (shapes.normalize, shapes.denormalize):
        with pytest.raises(WRONG):
            call(fake(Identity, features.transpose(2, 3)), features)


def test_wrong_text_vectors_are_rejected() -> None:
    shapes.encode_text(fake(TextTower, torch.rand(2, 5), width=5), ["a", "b"])
    for wrong in (torch.rand(1, 5), torch.rand(2, 4), torch.rand(2, 5).double()):
        with pytest.raises(WRONG):
            shapes.encode_text(fake(TextTower, wrong, width=5), ["a", "b"])
