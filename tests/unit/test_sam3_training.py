"""A student trained by the recipe ``sam3_trunk``, with mosaics and windows, takes the place of a SAM 3's trunk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agglo import recipe
from agglo.config import build
from agglo.integrations.sam3 import install, vision_encoder
from agglo.model.model import Model
from agglo.training.loop import train_model
from support.sam3 import T

pytest.importorskip("torchvision")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = [pytest.mark.training, pytest.mark.filterwarnings("ignore:.*kernels library.*")]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not part of this distribution")
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import sam3_student

    return sam3_student


def test_logits_approach_those_of_sam3_and_features_are_in_its_raw_space(bench: Any, tmp_path: Path) -> None:
    sam3 = bench.write_sam3(tmp_path / "sam3")
    source = build("sources", {"kind": "photos", "split": "heldout"})
    images = [source.read(index) for index in range(len(source))]
    changes = [*bench.overrides(sam3, "[{kind: photos, split: train}]", 60), "targets.estimate_images=64"]
    run = tmp_path / "run"
    train_model(recipe.load("sam3_trunk", changes), run, quiet=True)
    before, after = (bench.measure(sam3, Model.load(run / name), images) for name in ("initial", "model"))
    assert abs(bench.other_images(sam3, images)["mean"]) < 0.3  # a correlation is no property of any image
    assert after["mean"] > max(0.5, before["mean"] + 0.3)

    stock, own = T.Sam3Model.from_pretrained(sam3).eval(), T.Sam3Processor.from_pretrained(sam3)
    model, adapted = install(T.Sam3Model.from_pretrained(sam3).eval(), Model.load(run / "model"))
    wanted, found = (maps(sam, processor, images) for sam, processor in ((stock, own), (model, adapted)))
    assert error(found, wanted) == pytest.approx(after["feature_error"], rel=1e-3) and error(found, wanted) < 0.6
    normalizer = build("normalizers", {"kind": "phi_s"}, wanted.shape[1])
    normalizer.update(wanted)
    normalizer.freeze()
    assert error(normalizer(found), wanted) > 1  # the space that the head was trained in


@torch.inference_mode()
def maps(model: Any, processor: Any, images: list[Any]) -> Tensor:
    """Features ``(B, 32, 8, 8)`` of a trunk."""
    pixels = torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for image in images])
    return vision_encoder(model).backbone(pixels).last_hidden_state.transpose(1, 2).unflatten(2, (8, 8))


def error(found: Tensor, wanted: Tensor) -> float:
    """Mean squared error relative to the variance."""
    deviation = wanted - wanted.mean((0, 2, 3), keepdim=True)
    return float((found - wanted).square().mean() / deviation.square().mean())
