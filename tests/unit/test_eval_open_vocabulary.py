"""The open_vocabulary eval: closed forms, refinements of single cells, bad input."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import agglo
from agglo.config import build
from agglo.decoders.dense import Cells, cell_scores, image_cells, text_scores, without_outliers
from agglo.evals.base import Inapplicable
from agglo.evals.open_vocabulary import OpenVocabulary, chance
from agglo.sources.base import Source
from agglo.types import ConfigError, Features, FeatureSpec

TEXTS = ("sky", "road", "background")


class Colours(Source):
    """Images whose red channel is the class: stripes of 16, 16 and 32 columns."""

    classes = ("sky", "road")

    def __init__(self, unlabelled: bool = False) -> None:
        mask = np.zeros((64, 64), np.uint8)
        mask[:, 16:32], mask[:, 32:] = 1, 2
        self.mask = np.where(mask == 0, 255, mask) if unlabelled else mask

    def __len__(self) -> int:
        return 2

    def name(self, index: int) -> str:
        return f"c{index}"

    def read(self, index: int) -> Image.Image:
        array = np.zeros((64, 64, 3), np.uint8)
        array[..., 0] = np.where(self.mask == 255, 0, self.mask)
        return Image.fromarray(array)

    def annotation(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(semantic=self.mask)


class Knows(nn.Module):
    """Maps each 16-pixel cell to the one-hot text of its colour, or of ``always``."""

    def __init__(self, always: int | None = None) -> None:
        super().__init__()
        self.spec, self.always = FeatureSpec(3, 3, stride=16, step=16), always

    def forward(self, images: Tensor) -> Features:
        number = (F.avg_pool2d(images[:, 0], 16) * 255).round().long()
        order = torch.tensor([2, 0, 1])[number]  # class 0 is the background text, the last one
        if self.always is not None:
            order = torch.full_like(order, self.always)
        spatial = F.one_hot(order, 3).permute(0, 3, 1, 2).float()
        return Features(summary=spatial.mean((2, 3)), spatial=spatial)

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self(images).summary, dim=-1)

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.eye(3)[[TEXTS.index(text) if text in TEXTS else 2 for text in texts]]


def run(model: nn.Module, source: Source | None = None, **keys: Any) -> dict[str, float]:
    options: dict[str, Any] = {"size": 64, "background": ["background"], "affinity": None, "centre": 0.0}
    return OpenVocabulary(**{**options, "source": source or Colours(), **keys}).run(model)


def test_a_map_that_is_the_truth() -> None:
    """Boundaries of classes fall between cells, so that the upsampling moves none."""
    found = run(Knows())
    assert found["miou"] == found["miou_plain"] == found["pixel_accuracy"] == 1
    refined = run(Knows(), affinity=0.05, centre=0.5)
    assert refined["miou"] == 1


def test_a_constant_map_and_chance() -> None:
    """Every pixel `sky`: an IoU of its share 1/4, and 0 for the other two classes."""
    found = run(Knows(always=0))
    assert found["miou"] == pytest.approx(1 / 4 / 3) and found["pixel_accuracy"] == 1 / 4
    expected = [s / 3 / (s + 1 / 3 - s / 3) for s in (1 / 4, 1 / 4, 1 / 2)]
    assert found["miou_chance"] == pytest.approx(sum(expected) / 3)
    assert chance(torch.diag(torch.tensor([1.0, 1.0]))) == pytest.approx(1 / 3)


def test_pixels_of_no_class_are_left_out_without_a_background() -> None:
    for source in (Colours(), Colours(unlabelled=True)):
        found = run(Knows(always=0), source, background=[])
        assert found["pixel_accuracy"] == pytest.approx(1 / 3) and found["miou"] == pytest.approx(1 / 6)


def test_outlying_tokens_get_their_neighbours_mean() -> None:
    random = torch.Generator().manual_seed(0)
    spatial = F.normalize(torch.randn(1, 8, 6, 6, generator=random), dim=1)
    spatial = spatial * (1 + 0.01 * torch.randn(1, 1, 6, 6, generator=random))
    cells = torch.randn(1, 4, 6, 6, generator=random)
    spatial[..., 2, 3] *= 20
    found, calmed = without_outliers(cells, spatial, 6)
    around = [(y, x) for y in (1, 2, 3) for x in (2, 3, 4) if (y, x) != (2, 3)]
    for before, after in ((cells, found), (spatial, calmed)):
        expected = torch.stack([before[..., y, x] for y, x in around]).mean(0)
        torch.testing.assert_close(after[..., 2, 3], expected)
        after = after.clone()
        after[..., 2, 3] = before[..., 2, 3]
        torch.testing.assert_close(after, before)
    with pytest.raises(ConfigError, match="outliers: 0 is not positive"):
        without_outliers(cells, spatial, 0)
    scores = cell_scores(Cells(cells, spatial), torch.eye(4), outliers=6)
    assert scores.shape == (1, 4, 6, 6) and not torch.equal(scores, cell_scores(Cells(cells, spatial), torch.eye(4)))


@pytest.mark.weights
def test_sliding_windows_of_a_real_model() -> None:
    photos = build("sources", {"kind": "photos", "split": "all"})
    image, model = photos.read(0), agglo.load("agglo-lite", heads="text")
    with torch.inference_mode():
        whole = image_cells(model, image, size=384)
        for found, expected in zip(image_cells(model, image, size=384, slide=4000), whole, strict=True):
            torch.testing.assert_close(found, expected)  # one window
        windows = image_cells(model, image, size=384, slide=200)
        assert [each.shape for each in windows] == [each.shape for each in whole]
        torch.testing.assert_close(windows.text.norm(dim=1), torch.ones_like(windows.text[:, 0]))
        likeness = (windows.text * whole.text).sum(1)
        assert likeness.mean() > 0.5 and likeness.min() < 0.9999  # the same places, seen with less around them
        for slide in (32, 100):
            assert text_scores(model, image, ["a", "b"], size=384, slide=slide).shape == (2, image.height, image.width)
    with pytest.raises(ConfigError, match="slide: 0 is not a positive number"):
        image_cells(model, image, slide=0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"templates": []}, "templates need {}"),
        ({"templates": ["a photo"]}, "got 'a photo'"),
        ({"background": [" "]}, "holds an empty text"),
        ({"size": 0}, "size must be positive, got 0"),
        ({"slide": -1}, "slide must be positive, got -1"),
        ({"slide": 65, "size": 64}, "slide 65 exceeds size 64"),
        ({"background": ["wall", "Wall"]}, "'wall' occurs twice"),
        ({"centre": 2.0}, r"centre must be in \[0, 1\], got 2.0"),
        ({"source": {"kind": "photos"}}, "Photos has no classes or no masks"),
    ],
)
def test_bad_options_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("evals", {"kind": "open_vocabulary", **keys}).run(Knows())


def test_models_without_a_map_of_texts_are_not_measured() -> None:
    class Narrow(Knows):
        def encode_text(self, texts: list[str]) -> Tensor:
            return F.pad(super().encode_text(texts), (0, 2))

    with pytest.raises(Inapplicable, match="a map of the texts' 5 channels; Narrow: 3 channels"):
        run(Narrow())


@pytest.mark.weights
def test_a_head_without_texts_is_named() -> None:
    model = agglo.load("agglo-lite")
    with pytest.raises(Inapplicable, match="lite2 has no text tower; those that have text towers: conse"):
        run(model, head="lite2")
