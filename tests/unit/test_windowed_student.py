"""Evals, visualisations and embeddings resize images to whole windows of a student."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from agglo.config import build
from agglo.embedding import embed, image_features
from agglo.evals._features import encode, layered, whole_view
from agglo.evals.base import EvalContext, input_size, step_of
from agglo.evals.fixed_pattern import FixedPattern
from agglo.evals.knn import Knn
from agglo.evals.latency import Latency
from agglo.evals.memory import Memory
from agglo.evals.mode_switch import ModeSwitch
from agglo.evals.vlm import padded
from agglo.model.model import HeadConfig, Model
from agglo.report import visuals
from agglo.types import ConfigError
from support.models import Squares

STUDENT = {"kind": "vit", "width": 32, "depth": 4, "heads": 2, "patch": 8, "max_grid": 16, "num_global": 2, "window": 4}
TALL = Image.new("RGB", (40, 100), (200, 10, 10))


@pytest.fixture
def model() -> Model:
    """Its preferred size is whole patches, but not whole windows of 32 pixels."""
    torch.manual_seed(0)
    return Model(STUDENT, {}, preferred_size=72).eval()


def test_sizes_are_whole_windows(model: Model) -> None:
    assert step_of(model) == 32
    assert input_size(model, 72) == (64, 64) and input_size(model, (40, 88)) == (32, 96)
    assert whole_view(model, TALL, (72, 72)) == (192, 64)  # aspect kept: 180 x 72
    assert padded(TALL, 72, model).shape == (3, 64, 32)
    assert model(padded(TALL, 72, model)[None]).spatial.shape[-2:] == (8, 4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Latency, {"size": 72, "repeats": 1, "warmup": 0}),
        (Memory, {"size": 72}),
        (FixedPattern, {"size": 72, "source": Squares(3)}),
        (ModeSwitch, {"sizes": (40, 104), "source": Squares(3)}),
        (Knn, {"k": 1, "size": 40, "aspect": "keep", "train": Squares(6), "test": Squares(3, seed=1)}),
    ],
)
def test_evals_run_at_sizes_that_windows_do_not_divide(model: Model, kind: Any, options: dict[str, Any]) -> None:
    found = kind(**options).run(model)
    assert found and all(np.isfinite(value) for value in found.values())


def test_features_are_those_at_the_nearest_whole_windows(model: Model) -> None:
    source = Squares(2)
    cropped = encode(model, source, 72, EvalContext(), want="spatial").spatial
    assert cropped is not None and cropped.shape[-2:] == (8, 8)
    with torch.inference_mode():
        expected = model(np.asarray(source.read(0).resize((64, 64), Image.Resampling.BICUBIC))).summary[0]
    kept = encode(model, source, 72, EvalContext(), want="summary", aspect="keep").summary
    assert kept is not None
    torch.testing.assert_close(kept[0], expected, rtol=1e-4, atol=1e-5)
    several, count = layered(model, 2)
    maps = encode(several, source, 72, EvalContext(), want="spatial").spatial
    assert count == 2 and maps is not None and maps.shape[1:] == (64, 8, 8)


def test_galleries_and_searches_use_whole_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visuals, "PIXELS", 72)
    head = HeadConfig({"kind": "mlp", "hidden": 8}, None, 8, None)
    model = Model(STUDENT, {"say": head}, preferred_size=72).eval()
    toy = build("teachers", {"kind": "toy", "stride": 8, "channels": 6, "summary": 5})
    seen: list[tuple[int, ...]] = []
    toy.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[-2:])))
    found = visuals.gallery(visuals.Models(model, model, {"toy": toy}), None, [("tall", TALL), ("red", TALL)])
    assert [column.title for column in found.columns] == ["image", "untrained", "student", "toy"]
    assert seen == [(64, 64)]
    assert visuals.search_size(model, None) == 224
    recipe: Any = SimpleNamespace(evals=[{"kind": "retrieval", "size": 72}])
    assert visuals.search_size(model, recipe) == 64


def test_embeddings_use_whole_windows(model: Model, tmp_path: Path) -> None:
    TALL.save(tmp_path / "tall.png")
    assert embed(tmp_path, model).size == (64, 64)
    looks, _ = image_features([tmp_path / "tall.png"], model)
    assert looks[0].spatial.shape == (32, 64, 24)  # 512 x 205 pixels come to 512 x 192
    with pytest.raises(ConfigError, match="must be a multiple of 32; nearest legal height: 64 or 96"):
        embed(tmp_path, model, size=72)
