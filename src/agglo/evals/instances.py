"""COCO's average precision of instance masks, by SAM 3's decoder on the model's features."""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from agglo.decoders.sam3 import Sam3
from agglo.decoding import decode
from agglo.evals._features import need_spatial
from agglo.evals._sam import features_for
from agglo.evals.base import Backbone, Eval, EvalContext, Place, ProbeError, device_of, frozen, input_size
from agglo.extras import require
from agglo.preprocess import fit
from agglo.types import ConfigError, ImageError

_WHERE = "evals.instances"
_METRICS = {
    "AP_all": "ap", "AP_50": "ap50", "AP_75": "ap75", "AP_small": "ap_small", "AP_medium": "ap_medium",
    "AP_large": "ap_large", "AR_third": "ar",
}  # fmt: skip
"""Names of faster-coco-eval → ours. Its ``AR_all`` allows one mask per image and class, ``AR_third`` 100."""


class Instances(Eval):
    """Average precision of instance masks on COCO's files: SAM 3 with its trunk replaced, prompted with class names.

    The metric is COCO's own (Lin et al. 2014, arXiv:1405.0312), computed by faster-coco-eval: ``ap`` (the mean over IoU
    thresholds of 0.50 to 0.95, and over classes), ``ap50``, ``ap75``, ``ap_small``, ``ap_medium``, ``ap_large`` and
    ``ar`` (recall at 100 masks per image), as fractions. A metric without any object of its size is left out.

    With ``decoder`` and ``images``, the model's features replace SAM 3's trunk, as in ``sa_co``, and each class name is
    one text prompt. With ``predictions``, a file is scored: COCO results, or ``results.json`` of ``agglo segment``,
    whose file names and texts are matched with those of the annotations.

    Args:
        annotations: a file in COCO's layout: ``images``, ``annotations`` and ``categories``.
        images: folder of its file names.
        decoder: a SAM 3 of transformers with its tokenizer: ``facebook/sam3`` on the hub, or a folder.
        predictions: results to score instead.
        head: to read features from.
        size: side of the square input; None for the number of cells of SAM 3's trunk (72).
        classes: prompt every image with ``all`` classes, or with those ``present`` in it, which measures masks rather
            than recognition and is not comparable with published numbers.
        least: predictions with lower scores are dropped.

    Raises:
        ConfigError: neither ``decoder`` nor ``predictions``, or both; a file that is not in COCO's layout.
    """

    needs_heads = True
    bundled = False
    places: ClassVar[Mapping[str, Place]] = {
        "annotations": "data",
        "images": "data",
        "decoder": "weights",
        "predictions": "answers",
    }

    def __init__(
        self,
        *,
        annotations: str = "",
        images: str | None = None,
        decoder: str | None = None,
        predictions: str | None = None,
        head: str | None = None,
        size: int | None = None,
        classes: Literal["all", "present"] = "all",
        least: float = 0.05,
    ) -> None:
        if not annotations:
            raise ConfigError(f"{_WHERE}: set annotations to a file in COCO's layout, such as instances_val2017.json")
        if (decoder is None) == (predictions is None):
            raise ConfigError(
                f"{_WHERE}: set either decoder, a SAM 3 such as facebook/sam3, to run it on the model's features, or "
                "predictions, a file of COCO results, to score it"
            )
        if decoder is not None and images is None:
            raise ConfigError(f"{_WHERE}: decoder needs images, the folder of the annotated images")
        if (size is not None and size < 1) or not 0 <= least < 1:
            raise ConfigError(f"{_WHERE}: size must be at least 1 and least in [0, 1), got {size} and {least}")
        self.annotations = os.path.expanduser(annotations)
        self.images, self.decoder, self.predictions = (
            each and os.path.expanduser(each) for each in (images, decoder, predictions)
        )
        self.head, self.size, self.classes, self.least = head, size, classes, least

    @cached_property
    def _truth(self) -> dict[str, Any]:
        found = _json(self.annotations)
        for key in ("images", "annotations", "categories"):
            if not isinstance(found, dict) or not isinstance(found.get(key), list) or not found[key]:
                raise ConfigError(f"{self.annotations} has no {key}: use a file in COCO's layout")
        return found

    def members(self, key: str) -> Sequence[str] | None:
        """The annotated files of ``images``."""
        return sorted(str(each["file_name"]) for each in self._truth["images"]) if key == "images" else None

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        mask = require("faster_coco_eval.core.mask", "eval")
        if self.decoder is None:
            found = self._read()
        else:
            found = [_result(mask, *each) for each in self._predict(self.decoder, model, context)]
        return average_precision(self._truth, [each for each in found if each["score"] >= self.least])

    def _read(self) -> list[dict[str, Any]]:
        """Results with ids of the annotations."""
        files = {Path(str(each["file_name"])).name: each["id"] for each in self._truth["images"]}
        entries = _json(str(self.predictions))
        if not isinstance(entries, list):
            raise ConfigError(f"{self.predictions} is not a list of COCO results")
        names = {str(each["name"]): each["id"] for each in self._truth["categories"]}
        images, categories = set(files.values()), set(names.values())
        found = []
        for number, each in enumerate(entries):
            where = f"{self.predictions}: result {number}"
            if not isinstance(each, dict) or not {"segmentation", "score"} <= each.keys():
                raise ConfigError(f"{where} lacks segmentation or score: use COCO results of masks")
            if {"file_name", "category"} <= each.keys():  # agglo segment numbers images and texts by itself
                file = Path(str(each["file_name"])).name
                if file not in files or each["category"] not in names:
                    raise ConfigError(
                        f"{where} is of {each['category']!r} in {file}, which is not annotated; use class names of "
                        f"{self.annotations} as texts"
                    )
                each = {**each, "image_id": files[file], "category_id": names[each["category"]]}
            if each.get("image_id") not in images or each.get("category_id") not in categories:
                raise ConfigError(f"{where} has an image_id or a category_id that is not annotated")
            found.append(each)
        return found

    def _predict(
        self, decoder: str, model: Backbone, context: EvalContext
    ) -> Iterator[tuple[int, int, float, np.ndarray]]:
        """``(image_id, category_id, score, mask)`` of every predicted instance."""
        need_spatial(model, "instances")
        names = {each["id"]: str(each["name"]) for each in self._truth["categories"]}
        present: dict[Any, list[int]] = {}
        for each in self._truth["annotations"]:
            present.setdefault(each["image_id"], []).append(each["category_id"])
        sam = Sam3(decoder, _WHERE).to(device_of(model))
        view = input_size(model, self.size or sam.side * model.spec.stride)
        readable, images = 0, self._truth["images"]
        for index, each in enumerate(images, 1):
            context.report(f"image {index}/{len(images)}")
            file, size = str(each["file_name"]), (int(each["height"]), int(each["width"]))
            try:
                image = decode(Path(str(self.images)) / file, file, upright=False, size=size)
                if (image.height, image.width) != size:
                    raise ImageError(file, f"is {image.height}x{image.width} pixels (HxW), annotated as {size}")
            except ImageError as error:
                warnings.warn(f"left an image without predictions: {error}", stacklevel=2)
                continue
            readable += 1
            shown = fit(image, view, "stretch", resample=Image.Resampling.BILINEAR)[None]
            asked = names if self.classes == "all" else dict.fromkeys(present.get(each["id"], ()))
            found = []
            with frozen(model, sam):
                out = model(shown.to(device_of(model)))
                embeddings = sam.embed(features_for(out, self.head, {sam.width}, "instances", file, usual="sam3"))
                for category in asked:
                    one = sam.segment(embeddings, names[category], size, least=self.least)
                    pairs = zip(one.scores.tolist(), one.masks.cpu().numpy(), strict=True)
                    found += [(each["id"], category, score, mask) for score, mask in pairs if mask.any()]
            yield from found
        if not readable:
            raise ProbeError(f"none of the {len(images)} annotated images can be read: nothing to score")


def average_precision(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """COCO's metrics of masks, by faster-coco-eval.

    Args:
        truth: content of a file in COCO's layout.
        results: ``image_id``, ``category_id``, ``segmentation`` and ``score`` of each predicted mask.
    """
    library = require("faster_coco_eval", "eval")
    # The library writes into what it is given.
    rows = [{key: each[key] for key in ("image_id", "category_id", "segmentation", "score")} for each in results]
    with contextlib.redirect_stdout(io.StringIO()):
        annotated = library.COCO(_with_defaults(truth))
        scored = library.COCOeval_faster(annotated, annotated.loadRes(rows), "segm")
        scored.run()
    numbers = scored.stats_as_dict
    return {ours: float(numbers[theirs]) for theirs, ours in _METRICS.items() if numbers[theirs] >= 0}


def _with_defaults(truth: Mapping[str, Any]) -> dict[str, Any]:
    """Annotations with the keys that the metric reads and small files leave out."""
    mask = require("faster_coco_eval.core.mask", "eval")
    sizes = {each["id"]: (each["height"], each["width"]) for each in truth["images"]}
    made = []
    for number, each in enumerate(truth["annotations"], 1):
        each = {"iscrowd": 0, "id": number, **each}
        if "area" not in each or "bbox" not in each:
            coded = mask.segmToRle(each["segmentation"], *sizes[each["image_id"]])
            each = {"area": float(mask.area(coded)), "bbox": [float(v) for v in mask.toBbox(coded)], **each}
        made.append(each)
    return {**truth, "annotations": made}


def _result(mask: Any, image: int, category: int, score: float, found: np.ndarray) -> dict[str, Any]:
    coded = mask.encode(np.asfortranarray(found.astype(np.uint8)))
    return {"image_id": image, "category_id": category, "score": score, "segmentation": coded}


def _json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): use an existing JSON file") from error
