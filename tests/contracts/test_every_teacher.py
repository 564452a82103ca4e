"""Every kind of teacher keeps the contract, on its real weights where it has some."""

import pytest
import torch
from torch import nn

from agglo.config import build, kinds
from agglo.teachers.base import Teacher

OFFLINE = {"timm": {"model": "tf_efficientnet_lite0"}}


@pytest.fixture(scope="module", params=kinds("teachers", installed=False))
def teacher(request: pytest.FixtureRequest) -> Teacher:
    return build("teachers", {"kind": request.param, **OFFLINE.get(request.param, {})})


@torch.inference_mode()
def test_returns_what_its_spec_says(teacher: Teacher) -> None:
    spec = teacher.spec
    assert spec.summary is not None or spec.spatial is not None
    size = max(64, 2 * spec.step)
    out = teacher(torch.rand(2, 3, size, size))
    assert (None if out.summary is None else tuple(out.summary.shape)) == (spec.summary and (2, spec.summary))
    if spec.spatial is None:
        assert out.spatial is None
    else:
        assert out.spatial.shape == (2, spec.spatial, size // spec.stride, size // spec.stride)


@torch.inference_mode()
def test_is_frozen_and_stays_in_eval_mode(teacher: Teacher) -> None:
    images = torch.rand(2, 3, 64, 64)
    before = teacher(images)
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    after = teacher(images)
    for one, two in ((before.summary, after.summary), (before.spatial, after.spatial)):
        assert one is None or torch.equal(one, two)


def test_says_under_which_licence_its_weights_are(teacher: Teacher) -> None:
    assert teacher.licence


def test_input_size_is_legal(teacher: Teacher) -> None:
    for size in [(96, 96), (100, 130)]:
        assert all(side % teacher.spec.step == 0 and side > 0 for side in teacher.input_size(size, 16))


def test_text_and_vocabulary_agree(teacher: Teacher) -> None:
    vocabulary = teacher.vocabulary()
    if vocabulary is None:
        with pytest.raises(TypeError, match="text"):
            teacher.encode_text(["a cat"])
        return
    assert vocabulary.text.shape == (len(vocabulary.names), teacher.spec.summary)
    text = teacher.encode_text(["a cat", "a truck"])
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(2), rtol=1e-4, atol=1e-4)
