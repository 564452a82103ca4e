"""Whole images: the aspect is kept, images of one shape go through together, crops and whole images are kept apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from agglo.evals._cache import Encoded
from agglo.evals._features import encode
from agglo.evals.base import EvalContext
from agglo.evals.knn import Knn
from agglo.evals.zero_shot import ZeroShot
from agglo.sources.base import Source
from agglo.teachers.toy import Toy
from agglo.types import ConfigError, Features, FeatureSpec
from support.models import Noise


class Shapes(Source):
    """Images of several shapes, numbered by their red, bright at the right end."""

    SIZES = ((40, 80), (40, 40), (80, 40), (40, 80), (24, 100))

    def __len__(self) -> int:
        return len(self.SIZES)

    def name(self, index: int) -> str:
        return f"shape-{index}"

    def label(self, index: int) -> str:
        return "ab"[index % 2]

    def read(self, index: int) -> Image.Image:
        h, w = self.SIZES[index]
        image = Image.new("RGB", (w, h), (10 * index, 0, 0))
        image.paste((10 * index, 255, 0), (w - 8, 0, w, h))
        return image


class Size(torch.nn.Module):
    """Its summary is what it saw: height, width, red, and whether it saw the right end."""

    spec = FeatureSpec(summary=4, spatial=None, stride=16, step=16)

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Features:
        self.batches.append(len(images))
        h, w = images.shape[-2:]
        rows = [[h, w, float(i[0].max()) * 255, float(i[1, :, -1].mean())] for i in images]
        return Features(torch.tensor(rows), None)


def encoded(
    model: Any, source: Any, aspect: str, context: EvalContext | None = None, precision: torch.dtype = torch.float32
) -> Encoded:
    return encode(model, source, 32, context or EvalContext(), want="summary", aspect=aspect, precision=precision)


def test_sizes_order_and_batches() -> None:
    model = Size()
    found = encoded(model, Shapes(), "keep")
    assert found.summary is not None
    assert found.summary[:, :2].tolist() == [[32, 64], [32, 32], [64, 32], [32, 64], [32, 128]]
    assert found.summary[:, 2].round().tolist() == [0, 10, 20, 30, 40]
    assert (found.summary[:, 3] > 0.9).all()  # the right end is there
    assert sorted(model.batches) == [1, 1, 1, 2]
    cropped = encoded(model, Shapes(), "crop").summary
    assert cropped is not None and cropped[:, :2].unique(dim=0).tolist() == [[32, 32]]
    assert cropped[0, 3] == 0  # and here it is cut off


def test_cache_separates_crops_from_whole_images() -> None:
    model, source = Size(), Shapes()
    context = EvalContext()
    first = encoded(model, source, "keep", context).summary
    crops = encoded(model, source, "crop", context).summary
    calls = len(model.batches)
    assert encoded(model, source, "keep", context).summary is first
    assert len(model.batches) == calls
    assert first is not None and crops is not None and not torch.equal(first, crops)


def test_model_without_summary_is_pooled_in_half_precision() -> None:
    found = encode(
        Noise(summary=False), Shapes(), 32, EvalContext(), want="summary", aspect="keep", precision=torch.float16
    ).summary
    assert found is not None and found.shape == (5, 4) and found.dtype == torch.float16


def test_teachers_choose_their_input_size() -> None:
    teacher = Toy()
    h, w = teacher.input_size((32, 64), teacher.spec.stride)
    seen: list[tuple[int, ...]] = []
    teacher.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[-2:])))
    encoded(teacher, Shapes(), "keep")
    assert (h, w) in seen
    fixed = Toy()
    fixed.canvas = 32
    with pytest.warns(UserWarning, match="aspect: keep had no effect: Toy takes 32x32 pixels only"):
        kept = encode(
            fixed, Shapes(), 32, EvalContext(), want="summary", aspect="keep"
        ).summary  # one canvas only: crops, as ever
    crops = encoded(fixed, Shapes(), "crop").summary
    assert kept is not None and crops is not None and torch.equal(kept, crops)


@pytest.mark.parametrize("kind", [Knn, ZeroShot])
def test_aspect_must_be_crop_or_keep(kind: Any) -> None:
    with pytest.raises(ConfigError, match="aspect must be crop or keep, not 'whole'"):
        kind(aspect="whole")
    assert kind(aspect="keep").aspect == "keep"


def test_knn_encodes_whole_images() -> None:
    model = Size()
    Knn(k=1, size=32, aspect="keep", train=Shapes(), test=Shapes()).run(model)  # type: ignore[arg-type]
    assert sum(model.batches) == 10 and len(model.batches) == 8
