"""SAM on another encoder, cut before or after its neck: replayed features give the stock masks, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from agglo.integrations.sam import install
from support.checkpoints import tiny_sam
from support.sam3 import Replay, T, equal, student

pytestmark = pytest.mark.libraries
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
PROMPTS: tuple[dict[str, Any], ...] = (
    {"input_points": [[[12, 30], [50, 9]]], "input_labels": [[1, 0]]},
    {"input_boxes": [[[5, 8, 40, 35]]]},
    {"input_points": [[[12, 30]]], "input_labels": [[1]], "input_boxes": [[[5, 8, 40, 35]]]},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Blocks of 12 channels, a decoder of 16, on 4 x 4 cells of 16 pixels."""
    path = tiny_sam(tmp_path_factory.mktemp("sam"))
    size = {"longest_edge": 64}
    T.SamProcessor(T.SamImageProcessor(size=size, pad_size={"height": 64, "width": 64})).save_pretrained(path)
    return path


def outputs(model: Any, made: Any) -> list[Tensor]:
    found = []
    for prompt in PROMPTS:
        inputs = made(images=PICTURE, return_tensors="pt", **prompt)
        kept = {name: inputs[name] for name in ("pixel_values", *prompt)}
        out = model(**{name: x.float() if x.dtype == torch.float64 else x for name, x in kept.items()})
        found += [out.pred_masks, out.iou_scores]
    assert all(torch.isfinite(each).all() for each in found)
    return found


@torch.inference_mode()
@pytest.mark.parametrize("cut", ["before the neck", "after the neck"])
def test_replayed_features_give_identical_masks(folder: str, cut: str) -> None:
    stock = T.SamModel.from_pretrained(folder).eval()
    made = T.SamProcessor.from_pretrained(folder)
    maps: list[Tensor] = []
    if cut == "before the neck":
        hook: Any = lambda module, given: maps.append(given[0].permute(0, 3, 1, 2).clone())  # noqa: E731
        stock.vision_encoder.neck.register_forward_pre_hook(hook)
    else:
        stock.vision_encoder.register_forward_hook(lambda module, given, out: maps.append(out[0].clone()))
    wanted = outputs(stock, made)
    assert [x.shape[1] for x in maps] == [12 if cut == "before the neck" else 16] * len(PROMPTS)
    replay = Replay(list(maps))
    model, adapted = install(T.SamModel.from_pretrained(folder).eval(), replay)
    assert equal(outputs(model, adapted), wanted)
    assert replay.sizes == {(64, 64)}
    changed = maps[0].clone()
    changed[0, 0, 1, 2] += 0.01
    sequence = maps[0].flatten(2)
    prefix_left = torch.cat([torch.ones_like(sequence[..., :1]), sequence[..., :-1]], 2).view_as(maps[0])
    for fault in (changed, maps[0].mT.contiguous(), maps[0] * 1.02, prefix_left):
        model, adapted = install(T.SamModel.from_pretrained(folder).eval(), Replay([fault] * len(PROMPTS)))
        assert not equal(outputs(model, adapted), wanted)


@torch.inference_mode()
@pytest.mark.parametrize("width", [12, 16])
def test_save_and_reload(folder: str, width: int, tmp_path: Path) -> None:
    model, made = install(T.SamModel.from_pretrained(folder).eval(), student(width, "sam"), window=2)
    wanted = outputs(model, made)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert equal(outputs(again.eval(), made), wanted)
    assert type(T.AutoModel.from_pretrained(tmp_path)) is type(model)
    assert (again.vision_encoder.neck is None) == (width == 16)


@torch.inference_mode()
def test_student_of_other_patches_is_resized_inside(folder: str) -> None:
    model, made = install(T.SamModel.from_pretrained(folder).eval(), student(16, "sam", patch=8, max_grid=8))
    pixels = made(images=PICTURE, return_tensors="pt")["pixel_values"]
    assert pixels.shape[-1] == 64
    assert model.vision_encoder(pixels)[0].shape == (1, 16, 4, 4)  # 32 pixels of 8


def test_gradients_reach_the_student(folder: str) -> None:
    trained = student(12, "sam").requires_grad_(True)
    stock = T.SamModel.from_pretrained(folder).eval().requires_grad_(False)
    model, made = install(stock, trained)
    out = model(**{k: v for k, v in made(images=PICTURE, return_tensors="pt").items() if k == "pixel_values"})
    out.pred_masks.square().mean().backward()
    assert float(trained.student.blocks[0].attn.qkv.weight.grad.abs().sum()) > 0  # type: ignore[attr-defined]
    assert all(p.grad is None for p in model.mask_decoder.parameters())
