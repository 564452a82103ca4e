"""SAM's decoder on other features: a random decoder, whose own output is the reference."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agglo.decoders.sam import load, masks
from agglo.evals.base import EvalContext, ProbeError
from agglo.evals.promptable import Promptable, instances, overlap, padded
from agglo.types import AssetError, ConfigError, Features, FeatureSpec
from support.checkpoints import tiny_sam
from support.models import Squares, Student

pytestmark = pytest.mark.libraries

pytest.importorskip("transformers")


class Things(Squares):
    """Squares whose instances are the coloured square, and one pixel of dust."""

    def annotation(self, index: int) -> SimpleNamespace:
        found = super().annotation(index)
        found.instances = (found.semantic > 0).astype(np.uint8)
        found.instances[-1, -1] = 7
        return found


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_sam(tmp_path_factory.mktemp("decoder"))


class Wide(nn.Module):
    """Features of any width on a grid of cells of 16 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spec = FeatureSpec(summary=None, spatial=width, stride=16, step=16)
        draw = torch.Generator().manual_seed(0)
        self.weight = torch.randn(width, 3, 16, 16, generator=draw) / 16
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Features:
        self.shapes.append(tuple(images.shape))
        return Features(None, torch.conv2d(images, self.weight, stride=16))


@pytest.mark.parametrize("width", [12, 16])
def test_decoder_equals_the_original_model(decoder: str, width: int) -> None:
    """12 channels go through the neck, 16 are the decoder's: masks equal those of the whole model of transformers."""
    source, model = Things(5), Wide(width)
    context = EvalContext()
    found = Promptable(decoder=decoder, least=2, source=source).run(model, context)  # type: ignore[arg-type]
    assert model.shapes == [(1, 3, 64, 64)] * 5  # the decoder's own size
    sam = load(decoder, "test")
    own = []
    for i in range(5):
        image = source.read(i).resize((64, 64), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            map_ = torch.conv2d(x, model.weight, stride=16)
            if width == 12:
                map_ = sam.vision_encoder.neck(map_.permute(0, 2, 3, 1))
            truth = source.annotation(i).instances == 1
            y, x_ = np.nonzero(truth)
            box = torch.tensor([[[x_.min(), y.min(), x_.max() + 1, y.max() + 1]]]).float() * 2  # 32 pixels are 64
            low = sam(image_embeddings=map_, input_boxes=box, multimask_output=False).pred_masks[0]
        up = torch.nn.functional.interpolate(low, size=(64, 64), mode="bilinear", align_corners=False)
        mask = (
            torch.nn.functional.interpolate(up, size=(32, 32), mode="bilinear", align_corners=False)[0, 0] > 0
        ).numpy()
        own.append((mask & truth).sum() / max(1, (mask | truth).sum()))
    assert found["miou"] == pytest.approx(np.mean(own), abs=1e-12)
    assert found["iou@0.50"] == np.mean([iou >= 0.5 for iou in own])
    assert list(context.records.images["miou"].values()) == pytest.approx(own)
    assert 0 < found["miou"] < 1
    assert Promptable(decoder=decoder, least=2, source=source).run(model) == found  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_decoder_stored_in_half_precision_computes_in_float32(
    decoder: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """transformers loads it as stored; the numbers are those of its rounded weights in float32."""
    from transformers import SamModel

    sam = SamModel.from_pretrained(decoder, dtype=dtype)
    numbers = {}
    for name, stored in (("half", dtype), ("rounded", torch.float32)):
        sam.to(stored).save_pretrained(tmp_path / name)
        source: Any = Things(3)
        numbers[name] = Promptable(decoder=str(tmp_path / name), source=source).run(Wide(12))
    assert load(str(tmp_path / "half"), "test").dtype == torch.float32
    assert numbers["half"] == numbers["rounded"]


def test_heads_are_chosen_by_width(decoder: str) -> None:
    heads: dict[str, Any] = {"sam": Wide(12), "clip": lambda x: Features(None, x), "text": lambda x: Features(x, None)}
    source: Any = Things(2)
    found = Promptable(decoder=decoder, source=source).run(Student(**heads))
    assert found == Promptable(decoder=decoder, source=source).run(Wide(12))
    assert found == Promptable(decoder=decoder, head="sam", source=source).run(Student(**heads))
    with pytest.raises(ConfigError, match=r"takes 12 or 16 channels, and several heads have them: .*set `head`"):
        Promptable(decoder=decoder, source=source).run(Student(**heads, sam3=Wide(16)))
    with pytest.raises(ConfigError, match=r"none has them: clip \(3\)"):
        Promptable(decoder=decoder, source=source).run(Student(clip=heads["clip"]))
    with pytest.raises(ConfigError, match="no head 'sma'; did you mean 'sam'"):
        Promptable(decoder=decoder, head="sma", source=source).run(Student(**heads))
    with pytest.raises(ConfigError, match="head 'clip' has 3 channels; the decoder takes 12 or 16"):
        Promptable(decoder=decoder, head="clip", source=source).run(Student(**heads))


def test_wide_image_is_padded_at_the_bottom(decoder: str) -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    full = padded(image, (64, 64), SimpleNamespace(fill=(0.1, 0.2, 0.3)))
    assert full.shape == (3, 64, 64)
    assert full[:, 0, 0].tolist() == full[:, 31, 63].tolist() == [1, 0, 0]
    torch.testing.assert_close(full[:, 32, 0], torch.tensor([0.1, 0.2, 0.3]))
    sam = load(decoder, "test")
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(1, 16, 4, 4, generator=draw)
    boxes = torch.rand(40, 4, generator=draw) * 10 + torch.tensor([0.0, 0.0, 20.0, 10.0])
    with torch.no_grad():
        many = masks(sam, features, boxes, (20, 40))  # more than one block of boxes
        one = masks(sam, features, boxes[35:36], (20, 40))
    assert many.shape == (40, 20, 40)
    assert torch.equal(many[35:36], one)


def test_instances_and_their_boxes() -> None:
    mask = np.zeros((6, 8), np.uint8)
    mask[1:3, 2:5], mask[5, 7] = 3, 9
    image = Image.new("RGB", (8, 6))
    found = instances(SimpleNamespace(instances=mask), image, "a", 1)
    assert found is not None
    assert found.boxes.tolist() == [[2, 1, 5, 3], [7, 5, 8, 6]]
    assert found.masks.sum((1, 2)).tolist() == [6, 1]
    large = instances(SimpleNamespace(instances=mask), image, "a", 2)
    assert large is not None
    assert len(large.boxes) == 1
    assert instances(SimpleNamespace(instances=mask * 0), image, "a", 1) is None
    with pytest.raises(ConfigError, match=r"a: is 6x8 pixels \(HxW\) and its instances \(8, 6\)"):
        instances(SimpleNamespace(instances=mask.T), image, "a", 1)
    with pytest.raises(ConfigError, match="a has no instances"):
        instances(SimpleNamespace(), image, "a", 1)


def test_overlapping_instances_are_whole() -> None:
    masks = np.zeros((2, 6, 8), bool)
    masks[0, 1:5, 1:7], masks[1, 2:4, 2:4] = True, True
    objects = [SimpleNamespace(box=(1, 1, 7, 5)), SimpleNamespace(box=(2, 2, 4, 4))]
    instance = np.where(masks[1], 2, masks[0].astype(int))  # what a map keeps of them
    known, image = SimpleNamespace(instances=instance, masks=masks, objects=objects), Image.new("RGB", (8, 6))
    found = instances(known, image, "a", 1)
    assert found is not None
    assert found.masks.sum((1, 2)).tolist() == [24, 4]
    assert found.boxes.tolist() == [[1, 1, 7, 5], [2, 2, 4, 4]]
    large = instances(known, image, "a", 5)
    assert large is not None and large.boxes.tolist() == [[1, 1, 7, 5]]
    assert instances(known, image, "a", 25) is None
    with pytest.raises(ConfigError, match=r"a: is 8x6 pixels \(HxW\) and its masks \(6, 8\)"):
        instances(known, Image.new("RGB", (6, 8)), "a", 1)


def test_overlap_in_closed_form() -> None:
    a = torch.zeros(3, 2, 4, dtype=torch.bool)
    b = a.clone()
    a[0, 0], b[0, :, :2] = True, True  # 2 of 6
    a[1, 0] = True
    assert overlap(a, b).tolist() == [2 / 6, 0, 0]


def test_promptable_refuses_bad_input(decoder: str, tmp_path: Path) -> None:
    assert not Promptable.bundled
    with pytest.raises(ConfigError, match="set decoder to a SAM checkpoint"):
        Promptable()
    with pytest.raises(ConfigError, match="at least 1"):
        Promptable(decoder=decoder, least=0)
    with pytest.raises(AssetError, match=r"no SAM in .*nowhere.*facebook/sam-vit-huge"):
        Promptable(decoder=str(tmp_path / "nowhere"), source=Things(1)).run(Wide(12))  # type: ignore[arg-type]
    with pytest.raises(ProbeError, match="no image has an instance of 5000 pixels"):
        Promptable(decoder=decoder, least=5000, source=Things(1)).run(Wide(12))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="squares/0/0 has no instances"):
        Promptable(decoder=decoder, source=Squares(1)).run(Wide(12))  # type: ignore[arg-type]
    broken = tmp_path / "broken"
    broken.mkdir()
    state = load_file(Path(decoder) / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "mask_decoder" not in k}, broken / "model.safetensors", {"format": "pt"}
    )
    (broken / "config.json").write_text(json.dumps(json.loads((Path(decoder) / "config.json").read_text())))
    with pytest.raises(AssetError, match=r"lacks \d+ weights of a SAM, such as mask_decoder"):
        load(str(broken), "test")
