"""Published teachers at their real size, on the meta device: parameters, widths, grids (docs/method.md, 1.5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agglo.config import build
from agglo.recipe import from_dict, load
from agglo.teachers._published import OPEN_CLIP, PUBLISHED
from agglo.teachers.base import spec_of
from agglo.types import FeatureSpec

pytestmark = pytest.mark.weights

REAL = {
    # name: millions of parameters, summary, channels, patch, side, grid
    "google/siglip2-giant-opt-patch16-384": (1163.7, 1536, 1536, 16, 384, 24),
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": (6716.0, 4096, 4096, 16, 256, 16),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": (840.6, 1280, 1280, 16, 256, 16),
    "facebook/sam3": (446.2, None, 1024, 14, 1008, 72),
    "google/siglip2-so400m-patch16-384": (428.3, 1152, 1152, 16, 384, 24),
    "google/siglip2-so400m-patch16-naflex": (427.9, 1152, 1152, 16, 256, 16),
    "google/siglip-so400m-patch14-384": (428.2, 1152, 1152, 14, 378, 27),
    "openai/clip-vit-large-patch14-336": (304.3, 768, 1024, 14, 336, 24),
    "facebook/dinov2-giant": (1136.5, 1536, 1536, 14, 224, 16),
    "facebook/dinov2-with-registers-giant": (1136.5, 1536, 1536, 14, 224, 16),
    "facebook/sam-vit-huge": (636.1, None, 1280, 16, 1024, 64),
    "nvidia/C-RADIOv4-H": (651.7, 2560, 1280, 16, 256, 16),
}


def bare(options: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return build("teachers", options)


@pytest.mark.parametrize("name", REAL)
def test_parameters_widths_and_grids(name: str) -> None:
    pytest.importorskip("transformers")
    millions, summary, channels, patch, side, grid = REAL[name]
    options = {"kind": "transformers", "model": name, "weights": "random"}
    teacher = bare(options)
    assert sum(p.numel() for p in teacher.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    out = teacher(torch.zeros(1, 3, side, side, device="meta"))
    assert (None if out.summary is None else tuple(out.summary.shape)) == (summary and (1, summary))
    assert out.spatial.shape == (1, channels, grid, grid)
    assert (teacher.spec.summary, teacher.spec.spatial, teacher.spec.stride) == (summary, channels, patch)
    assert spec_of(options) == spec_of({**options, "weights": "pretrained"}) == teacher.spec


def test_published_names_have_spec_and_licence() -> None:
    pytest.importorskip("transformers")
    for name, facts in PUBLISHED.items():
        spec = spec_of({"kind": "transformers", "model": name})
        assert spec.spatial and spec.stride in (14, 16), name
        assert facts.licence and (facts.gated == ("License" in facts.licence and "NVIDIA" not in facts.licence)), name
        assert all(0 <= each <= 1 for each in (*facts.mean, *facts.std))


def test_open_clip_names_are_known_offline() -> None:
    pytest.importorskip("open_clip")
    expected = FeatureSpec(summary=1024, spatial=1280, stride=14, step=378)
    for name in OPEN_CLIP:
        assert spec_of({"kind": "open_clip", "model": f"hf-hub:{name}"}).summary == 1024
    teacher = bare({"kind": "open_clip", "model": "ViT-H-14-378-quickgelu", "weights": "random"})
    assert teacher.spec == expected == spec_of({"kind": "open_clip", "model": "hf-hub:apple/DFN5B-CLIP-ViT-H-14-378"})
    assert sum(p.numel() for p in teacher.parameters()) / 1e6 == pytest.approx(632.7, abs=0.1)
    assert (teacher.canvas, teacher.patch) == (378, 14)


def test_spec_of_other_kinds() -> None:
    pytest.importorskip("timm")
    for options in ({"kind": "toy"}, {"kind": "hog"}, {"kind": "timm", "model": "test_vit", "weights": "random"}):
        assert spec_of(options) == build("teachers", options).spec
    assert spec_of({"kind": "timm", "model": "vit_small_patch14_dinov2", "weights": "hub"}).summary == 384


def test_a_recipe_decodes_without_network_or_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: str, **_: object) -> None:
        raise AssertionError(f"decoding a recipe needs {arguments}")

    monkeypatch.setattr("agglo.hub.download", refuse)
    for module in ("_families", "open_clip"):
        monkeypatch.setattr(f"agglo.teachers.{module}.require", refuse)
    tree = load("quickstart").to_dict()
    tree["teachers"] = {
        "siglip2-g": {"kind": "transformers", "model": "google/siglip2-giant-opt-patch16-384", "dtype": "bfloat16"},
        "sam3": {"kind": "transformers", "model": "facebook/sam3", "summary_weight": 0},
        "clip": {"kind": "open_clip", "model": "hf-hub:apple/DFN5B-CLIP-ViT-H-14-378"},
    }
    tree["evals"] = []
    recipe = from_dict(tree)
    assert recipe.teachers["siglip2-g"].teacher["dtype"] == "bfloat16"
    assert from_dict(recipe.to_dict()) == recipe
