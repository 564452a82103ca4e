"""Any backbone trains with a recipe that was written for another: one line changes."""

import json
from pathlib import Path

import pytest

from agglo import recipe
from agglo.config import read_yaml
from agglo.train.loop import distill

STUDENTS = {
    "a ConvNet": "{kind: timm, model: test_convnext, stages: [2, 3]}",
    "a hierarchical transformer": "{kind: timm, model: pvt_v2_b0, stages: [2, 3]}",
    "a hierarchical transformer of windows": "{kind: timm, model: swin_tiny_patch4_window7_224, stages: [2, 3]}",
    "a mobile net": "{kind: timm, model: mobilenetv4_conv_small, stages: [3, 4]}",
    "a plain transformer": "{kind: timm, model: test_vit}",
    "E-RADIO": "{kind: hybrid}",
    "RADIO1D": "{kind: vit_1d, width: 48, depth: 4, heads: 2}",
}


@pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS.keys())
@pytest.mark.filterwarnings("ignore:train.windows")
@pytest.mark.filterwarnings("ignore:train.spectral")
def test_the_small_recipe_trains_it(student: str, tmp_path: Path) -> None:
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
    model = distill(loaded, tmp_path / "run", quiet=True)
    assert set(model.heads) == {"a", "b"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == loaded.train.steps
    assert {term for line in lines for term in line["terms"]} >= {"a/summary", "a/spatial", "b/spatial"}
    written = read_yaml((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["student"]["kind"] == loaded.student["kind"]
