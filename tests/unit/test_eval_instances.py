"""COCO's average precision: hand-computed values, files of ``agglo segment``, and SAM 3 on a model's features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from agglo.config import build
from agglo.decoders.sam3 import Sam3
from agglo.evals._concepts import decoded, overlaps
from agglo.evals.base import ProbeError
from agglo.evals.instances import average_precision
from agglo.segmentation.instances import run_lengths
from agglo.types import ConfigError
from support.checkpoints import tiny_sam3
from support.sam3 import student

pytest.importorskip("faster_coco_eval")
pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore:.*kernels library.*")]
SIZE = (40, 60)


def coded(*box: int, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """Run lengths of a rectangle ``x0, y0, x1, y1``."""
    mask = np.zeros(size, bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return {"size": list(size), "counts": run_lengths(mask)}


def truth(*objects: tuple[int, int, dict[str, Any]]) -> dict[str, Any]:
    """Two images and two classes; objects ``(image, class, mask)``."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"image_id": image, "category_id": name, "segmentation": mask} for image, name, mask in objects
        ],
    }


def result(image: int, name: int, score: float, *box: int) -> dict[str, Any]:
    return {"image_id": image, "category_id": name, "score": score, "segmentation": coded(*box)}


def test_hand_computed_values() -> None:
    whole = truth((1, 1, coded(0, 0, 10, 10)), (2, 1, coded(20, 10, 40, 30)))
    perfect = [result(1, 1, 0.9, 0, 0, 10, 10), result(2, 1, 0.8, 20, 10, 40, 30)]
    assert average_precision(whole, perfect) == pytest.approx(
        dict.fromkeys(("ap", "ap50", "ap75", "ap_small", "ar"), 1.0)
    )
    # IoU 0.72 (9 x 8 of 10 x 10 pixels): a match at 0.50, 0.55, 0.60, 0.65 and 0.70 of ten thresholds.
    worse = [result(1, 1, 0.9, 0, 0, 9, 8), perfect[1]]
    found = average_precision(whole, worse)
    # Above 0.70 the higher-scored one is false: precision 1/2 at recall 1/2, and 101 recalls of which 51 are reached.
    assert found["ap"] == pytest.approx(0.5 * 1 + 0.5 * 0.5 * 51 / 101) and found["ap50"] == 1
    assert found["ar"] == pytest.approx(0.75) and found["ap75"] == pytest.approx(0.5 * 51 / 101)
    # A second class that nothing finds halves the mean over classes.
    both = truth((1, 1, coded(0, 0, 10, 10)), (2, 1, coded(20, 10, 40, 30)), (2, 2, coded(0, 0, 5, 5)))
    assert average_precision(both, perfect)["ap"] == pytest.approx(0.5)
    assert average_precision(whole, [])["ap"] == 0


def test_polygons_and_sizes_that_are_not_square() -> None:
    whole = truth((1, 1, coded(0, 0, 50, 10)))
    whole["annotations"][0]["segmentation"] = [[0, 0, 50, 0, 50, 10, 0, 10]]
    assert average_precision(whole, [result(1, 1, 0.9, 0, 0, 50, 10)])["ap"] == pytest.approx(1)


def test_own_run_lengths_and_overlaps_equal_the_librarys() -> None:
    from faster_coco_eval.core import mask as library

    rng = np.random.default_rng(0)
    masks = [rng.random((23, 31)) < share for share in (0.01, 0.3, 0.7, 1.0)]
    theirs = [library.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    assert [run_lengths(mask) for mask in masks] == [each["counts"].decode() for each in theirs]
    for mask, each in zip(masks, theirs, strict=True):
        assert (decoded({**each, "counts": each["counts"].decode()}, (23, 31), "a") == mask).all()
    assert overlaps(masks, masks) == pytest.approx(np.asarray(library.iou(theirs, theirs, [0] * 4)))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    rng = np.random.default_rng(1)
    for name in (1, 2):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(tmp_path / f"{name}.png")
    whole = truth((1, 1, coded(0, 0, 30, 30)), (2, 2, coded(20, 10, 40, 30)))
    (tmp_path / "truth.json").write_text(json.dumps(whole))
    return {"annotations": str(tmp_path / "truth.json"), "images": str(tmp_path)}


def test_results_of_the_command_are_matched_by_names(files: dict[str, str], tmp_path: Path) -> None:
    rows = [
        {**result(7, 9, 0.9, 0, 0, 30, 30), "file_name": "photos/1.png", "category": "cat"},
        {**result(8, 8, 0.8, 20, 10, 40, 30), "file_name": "photos/2.png", "category": "dog"},
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(rows))
    score = lambda: build("evals", {"kind": "instances", **files, "predictions": str(path)}).run(student())  # noqa: E731
    assert score()["ap"] == pytest.approx(1)
    path.write_text(json.dumps([{**rows[0], "category": "fox"}]))
    with pytest.raises(ConfigError, match=r"result 0 is of 'fox' in 1.png, which is not annotated; use class names"):
        score()
    path.write_text(json.dumps([result(3, 1, 0.9, 0, 0, 5, 5)]))
    with pytest.raises(ConfigError, match="an image_id or a category_id that is not annotated"):
        score()
    path.write_text(json.dumps([{"image_id": 1}]))
    with pytest.raises(ConfigError, match="result 0 lacks segmentation or score"):
        score()


@torch.inference_mode()
def test_sam3_on_the_models_features(files: dict[str, str], tmp_path: Path) -> None:
    """Annotations that are SAM 3's own masks on the model's features are found with an average precision of 1."""
    sam3, model = tiny_sam3(tmp_path), student()
    sam = Sam3(sam3, "test")
    whole = json.loads(Path(files["annotations"]).read_text())
    whole["annotations"] = []
    for name in (1, 2):
        with Image.open(tmp_path / f"{name}.png") as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB").resize((128, 128), Image.Resampling.BILINEAR)))
        out = model(pixels.permute(2, 0, 1)[None] / 255)
        spatial = out.heads["sam3"].spatial
        assert spatial is not None
        found = sam.segment(sam.embed(spatial), "cat", SIZE)
        whole["annotations"] += [
            {"image_id": name, "category_id": 1, "segmentation": {"size": list(SIZE), "counts": run_lengths(mask)}}
            for mask in found.masks.numpy()
            if mask.any()
        ]
    assert whole["annotations"]
    Path(files["annotations"]).write_text(json.dumps(whole))
    numbers = build("evals", {"kind": "instances", **files, "decoder": sam3, "least": 0.5}).run(model)
    assert numbers["ap"] == pytest.approx(1) and numbers["ap75"] == pytest.approx(1)
    assert build("evals", {"kind": "instances", **files, "decoder": sam3, "classes": "present"}).run(model)["ap"] > 0.3
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"left an image without predictions: .*1.png"):
        fewer = build("evals", {"kind": "instances", **files, "decoder": sam3, "least": 0.5}).run(model)
    assert fewer["ap"] < 1
    (tmp_path / "2.png").unlink()
    with (
        pytest.warns(UserWarning, match="left an image"),
        pytest.raises(ProbeError, match="none of the 2 annotated images can be read"),
    ):
        build("evals", {"kind": "instances", **files, "decoder": sam3}).run(model)


def test_options_and_files_that_do_not_fit(files: dict[str, str], tmp_path: Path) -> None:
    for keys, message in (
        ({}, "set annotations to a file in COCO's layout"),
        ({**files}, "set either decoder, a SAM 3 such as facebook/sam3"),
        ({"annotations": "a", "decoder": "b"}, "decoder needs images"),
        ({**files, "decoder": "b", "least": 1.0}, r"least in \[0, 1\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            build("evals", {"kind": "instances", **keys})
    (tmp_path / "empty.json").write_text("[]")
    made = build("evals", {"kind": "instances", "annotations": str(tmp_path / "empty.json"), "predictions": "a"})
    with pytest.raises(ConfigError, match="has no images: use a file in COCO's layout"):
        made.run(student())
