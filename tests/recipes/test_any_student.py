"""Any backbone trains with a recipe that was written for another: one line changes."""

import json
from pathlib import Path

import pytest

from agglo import recipe
from agglo.config import build, read_yaml
from agglo.training.loop import train_model
from agglo.types import ConfigError

pytestmark = pytest.mark.training

STUDENTS = {
    "a ConvNet": "{kind: timm, model: test_convnext, stages: [2, 3]}",
    "a hierarchical transformer": "{kind: timm, model: pvt_v2_b0, stages: [2, 3]}",
    "a hierarchical transformer of windows": "{kind: timm, model: swin_tiny_patch4_window7_224, stages: [2, 3]}",
    "a mobile net": "{kind: timm, model: mobilenetv4_conv_small, stages: [3, 4]}",
    "a mobile net of branches": "{kind: timm, model: mobileone_s0}",
    "a residual net": "{kind: timm, model: resnet18}",
    "a plain transformer": "{kind: timm, model: test_vit}",
    "E-RADIO": "{kind: hybrid}",
    "RADIO1D": "{kind: vit_1d, width: 48, depth: 4, heads: 2}",
}


OF_BIG_RECIPES = {
    "resnet": "{kind: timm, model: test_resnet}",
    "convnext": "{kind: timm, model: test_convnext}",
    "mobilenet": "{kind: timm, model: mobilenetv4_conv_small}",
    "mobileone": "{kind: timm, model: mobileone_s0}",
    "ViT of patch 14": "{kind: timm, model: eva02_tiny_patch14_224}",
}


@pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS.keys())
@pytest.mark.filterwarnings("ignore:train.windows")
@pytest.mark.filterwarnings("ignore:train.spectral")
def test_small_recipe_trains_any_student(student: str, tmp_path: Path) -> None:
    changes = [
        f"student={student}",  # the one line
        # The rest makes it quick: two cheap teachers, and no photographs to wait for.
        "teachers={a: {kind: toy}, b: {kind: hog, cell: 8, group: 2, summary_weight: 0}}",
        "partitions=[{sizes: [64, 96], batch: 4}]",
        "targets.estimate_images=16",
        "train.spectral=true",
        "data.workers=0",
    ]
    loaded = recipe.load("small", changes, smoke=True)
    assert loaded.train.windows, "the recipe has windows, DAMP and SE-MESA: what not every student can do"
    assert loaded.train.damp
    assert "mesa" in loaded.losses.model_fields_set
    model = train_model(loaded, tmp_path / "run", quiet=True)
    assert set(model.heads) == {"a", "b"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == loaded.train.steps
    assert {term for line in lines for term in line["terms"]} >= {"a/summary", "a/spatial", "b/spatial"}
    written = read_yaml((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["student"]["kind"] == loaded.student["kind"]


@pytest.mark.parametrize("name", ["c_radio_v4_h", "phi_s"])
@pytest.mark.parametrize("student", OF_BIG_RECIPES.values(), ids=OF_BIG_RECIPES.keys())
@pytest.mark.filterwarnings("ignore:train.windows")
@pytest.mark.filterwarnings("ignore:train.spectral")
def test_large_recipes_train_any_student(name: str, student: str, tmp_path: Path) -> None:
    """At sizes that are no multiples of its stride, as their 432 px is none of 32 or 14."""
    teachers = ("siglip2-g", "dino_v3", "sam3") if name == "c_radio_v4_h" else ("dfn_clip", "siglip", "dino_v2", "sam")
    quick = ", ".join(f"{teacher}: {{kind: toy, seed: {seed}}}" for seed, teacher in enumerate(teachers))
    changes = [
        f"student={student}",  # the one line
        f"teachers={{{quick}}}",
        "partitions=[{sizes: [72, 104], batch: 4}]",
        "stages=[]",
        "targets.estimate_images=16",
        "data.workers=0",
    ]
    run = tmp_path / "run"
    model = train_model(recipe.load(name, changes, smoke=True), run, quiet=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2
    step = model.spec.step
    assert all(line["size"] % step == 0 for line in lines)
    assert read_yaml((run / "recipe.yaml").read_text())["partitions"][0]["sizes"] == [72, 104]
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_unsupported_stochastic_depth_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"student\.drop_path: vgg11 has no stochastic depth: omit it"):
        build("students", {"kind": "timm", "model": "vgg11", "drop_path": 0.1}, (), where="student")
