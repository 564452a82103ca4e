"""Every kind of teacher keeps the contract, with bundled weights where it has some."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from agglo.config import build, kinds
from agglo.teachers.base import Teacher
from support.shapes import teach


def tiny_transformers(folder: Path) -> dict[str, Any]:
    """A folder with a model's configuration; weights are random."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "dinov3_vit", **sizes, "patch_size": 16, "image_size": 64, "num_register_tokens": 4}
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 64, "width": 64}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return {"model": str(folder), "weights": "random"}


def tiny_open_clip(folder: Path) -> dict[str, Any]:
    """A folder with an architecture; weights are random."""
    vision = {"image_size": 64, "layers": 1, "width": 16, "head_width": 16, "patch_size": 16}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return {"model": str(folder), "weights": "random"}


OFFLINE = {"timm": {"model": "tf_efficientnet_lite0"}}
LOCAL = {"transformers": tiny_transformers, "open_clip": tiny_open_clip}


@pytest.fixture(scope="module", params=kinds("teachers", installed=False))
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    kind = request.param
    if kind in LOCAL:
        pytest.importorskip(kind)
        return build("teachers", {"kind": kind, **LOCAL[kind](tmp_path_factory.mktemp(kind))})
    return build("teachers", {"kind": kind, **OFFLINE.get(kind, {})})


@torch.inference_mode()
def test_features_match_the_spec(teacher: Teacher) -> None:
    spec = teacher.spec
    assert spec.summary is not None or spec.spatial is not None
    size = teacher.canvas or max(64, 2 * spec.step)
    summary, spatial = teach(teacher, torch.rand(2, 3, size, size))
    assert (None if summary is None else tuple(summary.shape)) == (spec.summary and (2, spec.summary))
    if spec.spatial is None:
        assert spatial is None
    else:
        assert spatial.shape == (2, spec.spatial, size // spec.stride, size // spec.stride)


@torch.inference_mode()
def test_teacher_is_frozen_and_stays_in_eval_mode(teacher: Teacher) -> None:
    images = torch.rand(2, 3, 64, 64)
    before = teacher(images)
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    after = teacher(images)
    for one, two in ((before.summary, after.summary), (before.spatial, after.spatial)):
        assert one is None or torch.equal(one, two)


def test_licence_is_stated(teacher: Teacher) -> None:
    assert teacher.licence


def test_input_size_is_legal(teacher: Teacher) -> None:
    for size in [(96, 96), (100, 130)]:
        assert all(side % teacher.spec.step == 0 and side > 0 for side in teacher.input_size(size, 16))
        assert teacher.canvas is None or teacher.input_size(size, 16) == (teacher.canvas, teacher.canvas)
        assert all(side % (teacher.patch or 1) == 0 for side in teacher.matched_size(size, 16))
        assert all(0 <= channel <= 1 for channel in teacher.fill)


def test_text_and_vocabulary_agree(teacher: Teacher) -> None:
    vocabulary = teacher.vocabulary()
    if vocabulary is None:
        with pytest.raises(TypeError, match="text"):
            teacher.encode_text(["a cat"])
        return
    assert vocabulary.text.shape == (len(vocabulary.names), teacher.spec.summary)
    text = teacher.encode_text(["a cat", "a truck"])
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(2), rtol=1e-4, atol=1e-4)
