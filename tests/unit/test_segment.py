"""``agglo.segment`` and its command: masks equal those of transformers' own calls, files hold what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import agglo
from agglo.evals._concepts import decoded
from agglo.integrations.sam3 import install
from agglo.segmentation.instances import Instances, boxes_of, run_lengths
from agglo.segmentation.prompts import Prompts, parse
from agglo.segmentation.run import Sam3Segmenter
from agglo.types import AssetError, ConfigError
from support.commands import agglo as command
from support.sam3 import T, build, released, student

pytest.importorskip("torchvision")
pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore:.*kernels library.*")]

PICTURE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (50, 70, 3), np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video checkpoint, a student, and pictures."""
    path = tmp_path_factory.mktemp("segment")
    released(path)
    (path / "pictures").mkdir()
    PICTURE.save(path / "pictures" / "a.png")
    PICTURE.rotate(180).save(path / "pictures" / "b.png")
    (path / "pictures" / "broken.png").write_bytes(b"no picture")
    return path


def where(folder: Path) -> dict[str, str]:
    return {"model": str(folder / "student"), "decoder": str(folder / "whole")}


@torch.inference_mode()
def by_transformers(folder: Path, **prompt: Any) -> tuple[np.ndarray, np.ndarray]:
    """Masks and scores by transformers' processor and its own post-processing."""
    model, made = install(T.Sam3Model.from_pretrained(folder / "whole").eval(), str(folder / "student"))
    inputs = made(images=PICTURE, return_tensors="pt", **prompt)
    original = inputs.pop("original_sizes")
    found = made.post_process_instance_segmentation(model(**inputs), 0.5, 0.5, original.tolist())[0]
    order = found["scores"].argsort(descending=True)
    return found["masks"][order].bool().numpy(), found["scores"][order].numpy()


def test_texts_and_boxes_give_the_masks_of_transformers(folder: Path) -> None:
    found = agglo.segment(PICTURE, ["cat", "dog"], **where(folder))
    assert len(found) == 1 and found[0].size == (50, 70)
    cat, dog = (by_transformers(folder, text=text) for text in ("cat", "dog"))
    assert len(cat[0]) and len(dog[0])
    masks, scores = np.concatenate([cat[0], dog[0]]), np.concatenate([cat[1], dog[1]])
    some = masks.reshape(len(masks), -1).any(1)
    assert (found[0].masks == masks[some]).all()
    assert found[0].scores == pytest.approx(scores[some], abs=1e-5)
    assert set(found[0].labels) <= {"cat", "dog"}
    for text in (None, "cat"):
        boxed = agglo.segment(PICTURE, text, boxes=[(5, 8, 40, 45)], **where(folder))[0]
        prompt = {} if text is None else {"text": text}
        wanted = by_transformers(folder, input_boxes=[[[5.0, 8.0, 40.0, 45.0]]], **prompt)
        some = wanted[0].reshape(len(wanted[0]), -1).any(1)
        assert (boxed.masks == wanted[0][some]).all() and len(boxed)
        assert set(boxed.labels) == {text or "box"}
    negative = agglo.segment(PICTURE, boxes=[(5, 8, 40, 45), (50, 2, 60, 9, 0)], **where(folder))[0]
    assert len(negative) != len(boxed) or not (negative.masks == boxed.masks).all()


def test_points_give_the_trackers_mask(folder: Path) -> None:
    found = agglo.segment(PICTURE, points=[(12, 30), (50, 9, 0)], threshold=0, **where(folder))[0]
    assert found.labels == ("points",)
    model, made = install(T.Sam3TrackerVideoModel.from_pretrained(folder / "whole").eval(), str(folder / "student"))
    with torch.inference_mode():
        session = made.init_video_session(video=[np.array(PICTURE)])
        made.add_inputs_to_inference_session(
            session, 0, 1, input_points=[[[[12, 30], [50, 9]]]], input_labels=[[[1, 0]]]
        )
        out = model(session, frame_idx=0)
    full = torch.nn.functional.interpolate(out.pred_masks, (50, 70), mode="bilinear", align_corners=False)[0, 0] > 0
    assert (found.masks[0] == full.numpy()).all() and 0 < full.float().mean() < 1
    assert not (agglo.segment(PICTURE, points=[(60, 5)], threshold=0, **where(folder))[0].masks == found.masks).all()


def test_command_writes_masks_overlays_and_coco(folder: Path, tmp_path: Path) -> None:
    options = ["-m", folder / "student", "--decoder", folder / "whole", "--window", 4, "-o", tmp_path / "out"]
    result = command("segment", folder / "pictures", "--text", "cat, dog", *options)
    assert result.exit_code == 0, result.output
    assert "skipped 1 image" in result.output and "broken.png" in result.output
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    facts = json.loads((tmp_path / "out" / "images.json").read_text())
    assert [image["id"] for image in facts["images"]] == [1, 2] and facts["images"][0]["height"] == 50
    direct = agglo.segment(folder / "pictures" / "a.png", ["cat", "dog"], window=4, **where(folder))[0]
    mine = [row for row in rows if row["image_id"] == 1]
    assert len(mine) == len(direct) > 0
    for row, mask in zip(mine, direct.masks, strict=True):
        assert (decoded(row["segmentation"], (50, 70), "a") == mask).all()
        x, y, w, h = row["bbox"]
        assert mask[int(y) : int(y + h), int(x) : int(x + w)].sum() == mask.sum()
    files = sorted((tmp_path / "out" / "masks" / "a").iterdir())
    assert len(files) == len(direct)
    with Image.open(files[0]) as mask:
        assert ((np.array(mask) == 255) == direct.masks[0]).all()
    assert files[0].name.startswith("000-cat-0.")
    with Image.open(tmp_path / "out" / "overlays" / "b.png") as overlay:
        assert overlay.size == (70, 50)
    again = command("segment", folder / "pictures", "--text", "cat", *options)
    assert again.exit_code == 2 and "use --overwrite" in again.output
    once = command("segment", folder / "pictures" / "b.png", "--text", "cat", "--overwrite", *options)
    assert once.exit_code == 0, once.output
    assert not (tmp_path / "out" / "masks" / "a").exists()  # of the earlier results


def test_bad_prompts() -> None:
    for options, message in (
        ({}, "nothing to segment: give a text, boxes or points"),
        ({"text": ["cat", " "]}, "a text is empty"),
        ({"text": [3]}, "3 is a int; give strings"),
        ({"boxes": [(5, 5, 5, 9)]}, "5,5,5,9 is empty; give x0,y0,x1,y1"),
        ({"boxes": [(1, 2, 3)]}, "not x0,y0,x1,y1 in pixels"),
        ({"boxes": "1,2,3,4"}, "is a str; give a list"),
        ({"boxes": [(1, 2, float("nan"), 4)]}, "not a finite number"),
        ({"boxes": [(1, 2, 3, 4, 5)]}, "label 5 of .* is neither 1"),
        ({"text": ["a", "b"], "boxes": [(1, 2, 3, 4)]}, "give one text with them, not 2"),
        ({"points": [(1, 2)], "text": "cat"}, "do not combine"),
        ({"points": [(1, 2, 0)]}, "all have label 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Prompts.of(**options)
    with pytest.raises(ConfigError, match="give numbers separated by commas"):
        parse("1;2", "points")
    with pytest.raises(ConfigError, match=r"box 5,5,80,9 is not inside a.png, 70 pixels wide and 50 high"):
        Prompts.of(boxes=[(5, 5, 80, 9)]).check_inside((50, 70), "a.png")
    with pytest.raises(ConfigError, match=r"point 70.5,3 is not inside"):
        Prompts.of(points=torch.tensor([[70.5, 3.0]])).check_inside((50, 70), "a.png")  # type: ignore[arg-type]


def test_checkpoints_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"no SAM 3 in .*; use a folder"):
        agglo.segment(PICTURE, "cat", model=student(), decoder=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"none has them: sam3 \(24\)"):
        agglo.segment(PICTURE, "cat", model=student(24), decoder=str(folder / "whole"))
    with pytest.raises(ConfigError, match="has 39 tokens and SAM 3's text encoder takes 32"):
        agglo.segment(PICTURE, "abcdefghijklmnopqrstuvwxyzabcdefghijk", **where(folder))
    with pytest.raises(ConfigError, match="threshold 2 is not between 0 and 1"):
        agglo.segment(PICTURE, "cat", threshold=2, **where(folder))
    image_only = tmp_path / "image"
    build("Sam3Model").save_pretrained(image_only)
    with pytest.raises(AssetError, match="is a sam3 checkpoint without a tracker, which points and videos need"):
        Sam3Segmenter(student(), str(image_only), points=True)


def test_run_lengths_and_boxes() -> None:
    rng = np.random.default_rng(0)
    for mask in (*(rng.random((7, 9)) < p for p in (0, 0.1, 0.5, 1)), np.ones((300, 400), bool)):
        assert (decoded({"size": list(mask.shape), "counts": run_lengths(mask)}, mask.shape, "a") == mask).all()
    mask = np.zeros((2, 6, 8), bool)
    mask[0, 1:3, 2:5] = True
    assert boxes_of(mask).tolist() == [[2, 1, 5, 3], [0, 0, 0, 0]]
    found = Instances("a", (6, 8), mask[:1], np.ones(1, np.float32), boxes_of(mask[:1]), ("a cat",))
    picture = np.array(found.overlay(Image.new("RGB", (8, 6), (10, 10, 10))))
    assert picture.shape == (6, 8, 3) and not (picture == 10).all()
